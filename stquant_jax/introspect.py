"""What is stored where, and why: `plan` before training, `report` during it."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from rich.console import Console
from rich.table import Table

from stquant_jax import arena as rows
from stquant_jax.checks import check_precision, check_state
from stquant_jax.layout import Layout, Storage, layout_of
from stquant_jax.precision import Budget, Policy
from stquant_jax.transform import ScaleByAdamQState


@dataclass(frozen=True)
class LeafReport:
    """One leaf's part of the state."""

    path: str
    shape: tuple[int, ...]
    kind: str  # "tiled", "flat" or "exact"
    reason: str
    mu_width: int  # bits of a code; 32 where exact
    nu_width: int
    bytes: int  # planes and scales, or the exact moments

    @property
    def bits(self) -> float:
        """Bits per state element, padding included."""
        return 8 * self.bytes / (2 * max(1, int(np.prod(self.shape))))


@dataclass(frozen=True)
class Report:
    """All leaves of a state, and the bytes that belong to none. Prints as a table; `markdown`
    renders one.

    Attributes:
      leaves: one entry per leaf, in tree order; nothing stays unquantized without being named here.
      schedule_bytes: count, widths and windows.
      free_bytes: rows of the arena that no slot uses.
      reference_bytes: what `optax.scale_by_adam` would take.
      backend: what runs the update.
    """

    leaves: tuple[LeafReport, ...]
    schedule_bytes: int
    free_bytes: int
    reference_bytes: int
    backend: str

    @property
    def total_bytes(self) -> int:
        return sum(leaf.bytes for leaf in self.leaves) + self.schedule_bytes + self.free_bytes

    @property
    def bits(self) -> float:
        """All-in bits per state element."""
        return 32 * self.total_bytes / self.reference_bytes

    def _rows(self) -> list[tuple[str, ...]]:
        body = [
            (
                leaf.path,
                "x".join(map(str, leaf.shape)) or "scalar",
                leaf.kind,
                *(
                    "f32" if leaf.kind == "exact" else str(w)
                    for w in (leaf.mu_width, leaf.nu_width)
                ),
                f"{leaf.bytes:,}",
                f"{leaf.bits:.2f}",
                leaf.reason,
            )
            for leaf in self.leaves
        ]
        tail = [
            (
                "(schedule)",
                "",
                "",
                "",
                "",
                f"{self.schedule_bytes:,}",
                "",
                "count, widths, windows",
            ),
            (
                "(free)",
                "",
                "",
                "",
                "",
                f"{self.free_bytes:,}",
                "",
                "rows of the arena that no slot uses",
            ),
            ("total", "", "", "", "", f"{self.total_bytes:,}", f"{self.bits:.3f}", self._summary()),
        ]
        return body + tail

    def _summary(self) -> str:
        ratio = self.total_bytes / self.reference_bytes
        return (
            f"{ratio:.1%} of float32 Adam's {self.reference_bytes:,} bytes; backend {self.backend}"
        )

    _HEADER = ("leaf", "shape", "format", "mu", "nu", "bytes", "bits/element", "why")

    def markdown(self) -> str:
        """A GitHub-flavoured table."""
        lines = [self._HEADER, ("---",) * len(self._HEADER), *self._rows()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def __str__(self) -> str:
        table = Table(*self._HEADER, title="optimizer state")
        for row in self._rows():
            table.add_row(*row)
        console = Console(width=160, force_terminal=False)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def plan(params: Any, precision: Policy = Budget(5.0), storage: Storage = Storage()) -> Report:  # noqa: B008
    """What the state of these parameters will hold: bytes per leaf, and why each leaf got its
    format.

    Args:
      params: arrays or ShapeDtypeStructs; nothing is allocated on a device.
      precision, storage: as for `scale_by_adam_q`.

    Raises:
      ValueError: as `scale_by_adam_q` and its ``init``.
    """
    check_precision(precision, storage)
    layout = layout_of(params, storage)
    tiles = rows.slot_tiles(layout)
    schedule = rows.schedule_bytes(layout)
    capacity = precision.rows(tiles, rows.fixed_bytes(layout), rows.reference_bytes(layout))
    widths, _ = precision.first_plan(tiles, capacity)
    return _report(layout, widths, capacity, schedule, storage)


def report(state: ScaleByAdamQState, params: Any, storage: Storage = Storage()) -> Report:  # noqa: B008
    """What a state holds now: widths and bytes of every leaf.

    Args:
      state: a concrete `ScaleByAdamQState`, as found in the optimizer's state.
      params: arrays or ShapeDtypeStructs; shapes only.
      storage: the one the optimizer was made with.

    Raises:
      ValueError: the state was built for other parameters or another storage, or is traced.
    """
    layout = layout_of(params, storage)
    check_state(state, layout)
    if isinstance(state.precision.widths, Tracer):
        raise ValueError("state is traced: expected concrete arrays; call report outside jit")
    schedule = sum(x.nbytes for x in jax.tree.leaves((state.count, state.precision)))
    return _report(
        layout, np.asarray(state.precision.widths), state.arena.shape[0], schedule, storage
    )


def _report(
    layout: Layout, widths: np.ndarray, capacity: int, schedule_bytes: int, storage: Storage
) -> Report:
    pairs = iter(widths.reshape(-1, 2).tolist())
    leaves = []
    for leaf in layout.leaves:
        mu, nu = next(pairs) if leaf.tiles else (32, 32)
        size = (
            leaf.tiles * (rows.TILE_SCALE_BYTES + rows.ROW_BYTES * (mu + nu))
            if leaf.tiles
            else 8 * leaf.size
        )
        leaves.append(LeafReport(leaf.path, leaf.shape, leaf.kind, leaf.reason, mu, nu, size))
    used = int(np.sum(widths * rows.slot_tiles(layout)))
    return Report(
        tuple(leaves),
        schedule_bytes,
        (capacity - used) * rows.ROW_BYTES,
        rows.reference_bytes(layout),
        storage.backend or "xla",
    )
