"""What is stored where, and why: `plan` before training, `report` during it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from stquant_jax import arena as rows
from stquant_jax.backends import settle
from stquant_jax.checks import check_concrete, check_precision, check_state
from stquant_jax.finding import find_state
from stquant_jax.layout import Layout, Storage
from stquant_jax.planning import (
    capacity_for,
    layout_for,
    rows_for,
    schedule_bytes,
    slots_for,
)
from stquant_jax.precision import Budget, Policy
from stquant_jax.precision.slots import WIDEST
from stquant_jax.sharding import Sharding, sharding_for


@dataclass(frozen=True)
class LeafReport:
    """What one device keeps of one leaf."""

    path: str
    shape: tuple[int, ...]
    part: tuple[int, ...]  # the shape of one device's part; without a sharding, of all
    divided: tuple[str, ...]  # by which axes of the mesh
    kind: str  # "tiled", "folded", "flat" or "exact"
    reason: str
    mu_width: int  # bits of a code; 32 where exact
    nu_width: int
    bytes: int  # planes and scales, or the exact moments

    @property
    def bits(self) -> float:
        """Bits per state element, padding included."""
        return 8 * self.bytes / (2 * max(1, math.prod(self.part)))


@dataclass(frozen=True)
class Report:
    """All leaves of a state, and the bytes that belong to none. Prints as a table; `markdown`
    renders one. Sharded, all bytes are those of one device.

    Attributes:
      leaves: one entry per leaf, in tree order; nothing stays unquantized without being named here.
      schedule_bytes: count, plan, statistics and the policy's memory.
      free_bytes: rows of the arena that no slot uses.
      reference_bytes: what `optax.scale_by_adam` would take, divided in the same way.
      backend: what runs the update.
      devices: how many hold different parts of the state.
    """

    leaves: tuple[LeafReport, ...]
    schedule_bytes: int
    free_bytes: int
    reference_bytes: int
    backend: str
    devices: int = 1

    @property
    def total_bytes(self) -> int:
        """Of the state, on one device."""
        return sum(leaf.bytes for leaf in self.leaves) + self.schedule_bytes + self.free_bytes

    @property
    def bits(self) -> float:
        """All-in bits per state element."""
        return 32 * self.total_bytes / self.reference_bytes

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the entries of ``widths`` and ``distortion`` among `stquant.metrics`, "path/mu"
        and "path/nu" of every quantized leaf."""
        return tuple(f"{leaf.path}/{moment}" for leaf in self._quantized for moment in rows.MOMENTS)

    @property
    def _quantized(self) -> list[LeafReport]:
        return [leaf for leaf in self.leaves if leaf.kind != "exact"]

    def plot(self, path: str | Path, history: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Draw the widths of all quantized leaves over time, a heat map for each moment.

        Args:
          path: the file, of any kind that matplotlib writes.
          history: what `stquant.metrics` gave along a run, ``count`` and ``widths`` of it; each
            entry is drawn up to the next. None draws the widths of this report alone.

        Raises:
          ImportError: matplotlib is missing.
          ValueError: an empty history, or one of another model; no leaf is quantized.
        """
        if history is None:
            now = [width for leaf in self._quantized for width in (leaf.mu_width, leaf.nu_width)]
            history = [{"count": 0, "widths": now}]
        try:
            counts = [int(entry["count"]) for entry in history]
            widths = [np.asarray(entry["widths"]) for entry in history]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"history is {type(history).__name__} ({error!r}): expected a list of what "
                "stquant.metrics returned along a run"
            ) from None
        sizes = {x.size for x in widths}
        if sizes != {len(self.slots)} or not self.slots:
            raise ValueError(
                f"history has {len(history)} entries with widths of {sorted(sizes)} slots: "
                f"expected at least one, and the {len(self.slots)} slots of this report, above 0"
            )
        edges = [*counts, 2 * counts[-1] - counts[-2] if len(counts) > 1 else counts[-1] + 1]
        _draw(Path(path), [leaf.path for leaf in self._quantized], edges, np.stack(widths, axis=1))

    def _rows(self) -> list[tuple[str, ...]]:
        body = [
            (
                leaf.path,
                _shape(leaf),
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
                "count, plan, statistics",
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
        where = f", on each of {self.devices} devices" if self.devices > 1 else ""
        return (
            f"{ratio:.1%} of float32 Adam's {self.reference_bytes:,} bytes{where}; "
            f"backend {self.backend}"
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


def _shape(leaf: LeafReport) -> str:
    whole, part = ("x".join(map(str, shape)) or "scalar" for shape in (leaf.shape, leaf.part))
    return f"{part} of {whole}, by {'+'.join(leaf.divided)}" if leaf.divided else whole


_MOST_LABELS = 40  # of leaves along an axis


def _draw(path: Path, leaves: list[str], edges: list[int], widths: np.ndarray) -> None:
    """Widths int[slots, times] between the steps ``edges``."""
    try:
        from matplotlib import colormaps
        from matplotlib.colors import BoundaryNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Report.plot needs matplotlib: pip install 'stquant-jax[examples]'"
        ) from error
    every = -(-len(leaves) // _MOST_LABELS)
    height = 1.5 + 0.22 * min(len(leaves), _MOST_LABELS)
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(1, len(rows.MOMENTS), sharey=True)
    norm = BoundaryNorm(np.arange(WIDEST + 2) - 0.5, WIDEST + 1)
    colors = colormaps["viridis"].resampled(WIDEST + 1)
    for i, (moment, axes) in enumerate(zip(rows.MOMENTS, panels, strict=True)):
        lines = np.arange(len(leaves) + 1) - 0.5
        image = axes.pcolormesh(edges, lines, widths[i::2], cmap=colors, norm=norm)
        axes.set(title=moment, xlabel="step")
        if len(edges) == 2:  # one column, at no time in particular
            axes.set(xlabel=None, xticks=[])
    panels[0].set_yticks(range(0, len(leaves), every), leaves[::every], fontsize="small")
    panels[0].invert_yaxis()
    bar = figure.colorbar(image, ax=panels, label="bits of a code")
    bar.set_ticks(range(WIDEST + 1))
    bar.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plan(
    params: Any,
    precision: Policy = Budget(5.0),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> Report:
    """What the state of these parameters will hold: bytes per leaf and device, and why each leaf
    got its format.

    Args:
      params: arrays or ShapeDtypeStructs; nothing is allocated on a device.
      precision, storage, sharding: as for `scale_by_adam_q`.

    Raises:
      ValueError: as `scale_by_adam_q` and its ``init``.
    """
    check_precision(precision, storage)
    layout = layout_for(params, precision, storage, sharding_for(params, sharding))
    capacity = capacity_for(layout, precision)
    widths = precision.first_widths(slots_for(layout, precision), rows_for(layout, precision))
    return _report(layout, widths, capacity, schedule_bytes(layout, precision), storage)


def report(
    state: Any,
    params: Any,
    precision: Policy = Budget(),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> Report:
    """What a state holds now: widths and bytes of every leaf, on each device.

    Args:
      state: a concrete `ScaleByAdamQState`, or an optimizer's state that holds one.
      params: arrays or ShapeDtypeStructs; shapes only.
      precision, storage, sharding: those the optimizer was made with; of the first only pins
        matter.

    Raises:
      ValueError: the state was built for other parameters or another storage, is traced, or holds
        no `ScaleByAdamQState`, or several.
    """
    check_precision(precision, storage)
    state = find_state(state)
    check_concrete(state, "report")
    layout = layout_for(params, precision, storage, sharding_for(params, sharding))
    check_state(state, layout)
    schedule = sum(x.nbytes for x in jax.tree.leaves((state.count, state.precision)))
    schedule += 8 * (layout.exact_columns - layout.exact_size)
    tally = state.precision.tally  # of which each device has its own
    schedule -= tally.digits.nbytes - tally.digits.nbytes // layout.devices
    widths = np.asarray(state.precision.plan.widths)
    capacity = state.arena.shape[0] // layout.devices
    return _report(layout, widths, capacity, schedule, storage)


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
        where = leaf.path, leaf.whole.shape, leaf.shape, leaf.all_axes
        leaves.append(LeafReport(*where, leaf.kind, leaf.reason, mu, nu, size))
    used = int(np.sum(widths * rows.slot_tiles(layout)))
    return Report(
        tuple(leaves),
        schedule_bytes,
        (capacity - used) * rows.ROW_BYTES,
        rows.reference_bytes(layout),
        str(settle(storage).backend),
        layout.devices,
    )
