"""What `plan` and `report` return: every leaf's format and bytes, as a table or a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from stquant_jax.inspection.charts import bars, draw, heat_maps
from stquant_jax.storage import arena as rows


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
      small_bytes: of leaves that are too small to be quantized, where they do not fit into the
        budget and come on top; of a `stquant.plan`.
      others: elements of the parameters that the mask leaves to other optimizers; of a
        `stquant.plan`.
    """

    leaves: tuple[LeafReport, ...]
    schedule_bytes: int
    free_bytes: int
    reference_bytes: int
    backend: str
    devices: int = 1
    small_bytes: int = 0
    others: int = 0

    @property
    def total_bytes(self) -> int:
        """Of the state, on one device."""
        return sum(leaf.bytes for leaf in self.leaves) + self.schedule_bytes + self.free_bytes

    @property
    def bits(self) -> float:
        """All-in bits per state element."""
        return 32 * self.total_bytes / self.reference_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be known of these bytes beside the table."""
        notes, total, whole = [], self.total_bytes, self.reference_bytes
        if self.small_bytes:
            rest, of = total - self.small_bytes, whole - self.small_bytes
            notes.append(
                f"Small leaves come on top of the budget with {self.small_bytes:,} bytes, all "
                f"others take {32 * rest / of:.3f} bits per state element."
            )
        if self.others:
            exact = rows.EXACT_BYTES * self.others
            notes.append(
                f"With float32 Adam for the other {self.others:,} elements all parameters take "
                f"{32 * (total + exact) / (whole + exact):.3f} bits per state element."
            )
        return tuple(notes)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the entries of ``widths`` and ``distortion`` among `stquant.metrics`, "path/mu"
        and "path/nu" of every quantized leaf."""
        return tuple(f"{leaf.path}/{moment}" for leaf in self._quantized for moment in rows.MOMENTS)

    @property
    def _quantized(self) -> list[LeafReport]:
        return [leaf for leaf in self.leaves if leaf.kind != "exact"]

    def plot(self, path: str | Path, history: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Draw the widths of all quantized leaves, by moment: over time a heat map, else bars.

        Args:
          path: the file, of any kind that matplotlib writes.
          history: what `stquant.metrics` gave along a run, ``count`` and ``widths`` of it; each
            entry is drawn up to the next. None draws the widths of this report.

        Raises:
          ImportError: matplotlib is missing.
          ValueError: an empty history, or one of another model; no leaf is quantized.
        """
        names = [leaf.path for leaf in self._quantized]
        if history is None:
            if not names:
                raise ValueError("no leaf is quantized: expected widths to draw")
            now = [(leaf.mu_width, leaf.nu_width) for leaf in self._quantized]
            return draw(Path(path), names, partial(bars, widths=np.array(now)))
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
        maps = partial(heat_maps, edges=edges, widths=np.stack(widths, axis=1))
        draw(Path(path), names, maps)

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
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join([table, *self.notes])

    def __str__(self) -> str:
        table = Table(*self._HEADER, title="optimizer state")
        for row in self._rows():
            table.add_row(*row)
        console = Console(width=160, force_terminal=False)
        with console.capture() as capture:
            console.print(table)
        return "\n".join([capture.get().rstrip(), *self.notes]) + "\n"


def _shape(leaf: LeafReport) -> str:
    whole, part = ("x".join(map(str, shape)) or "scalar" for shape in (leaf.shape, leaf.part))
    return f"{part} of {whole}, by {'+'.join(leaf.divided)}" if leaf.divided else whole
