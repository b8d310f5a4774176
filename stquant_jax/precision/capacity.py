"""What a number of bits per state element holds: rows of the arena, and widths to fill them where
nothing is measured.
"""

import itertools
import math
from typing import Any

import numpy as np

from stquant_jax.precision.policy import ROW_BYTES, Policy
from stquant_jax.precision.slots import MU, MU_WIDTHS, NU, NU_WIDTHS, Slots, is_whole
from stquant_jax.precision.statistics import MU_ERROR, NU_NOISE, NU_SPREAD


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


class Capacity(Policy):
    """Base of policies that fill a number of all-in ``bits`` per state element."""

    bits: float
    interval: int | None

    def __post_init__(self):
        super().__post_init__()
        name, steps = type(self).__name__, self.interval
        if not is_number(self.bits) or not 0 < self.bits <= 32:
            raise ValueError(
                f"{name}(bits={self.bits!r}): expected a number of bits per state element, above 0 "
                "and at most 32"
            )
        if steps is not None and not is_whole(steps, 1):
            raise ValueError(
                f"{name}(interval={steps!r}): expected a number of steps of at least 1, or None; "
                "below 2**31"
            )

    def rows(self, slots: Slots, fixed_bytes: int, reference_bytes: int) -> int:
        """Raises ValueError below the floor, naming the smallest budget that fits."""
        rows = int((self.bits / 32 * reference_bytes - fixed_bytes) // ROW_BYTES)
        floor = int(np.sum(slots.tiles * slots.narrowest))
        if rows < floor:
            smallest = np.ceil(32e3 * (fixed_bytes + ROW_BYTES * floor) / reference_bytes) / 1000
            advice = (
                "; budgets end at 32: keep more leaves exact by Storage(min_size=...), for each "
                "fills whole tiles, or unpin some"
            )
            pinned = ", pins" if self.pins else ""
            raise ValueError(
                f"{type(self).__name__}(bits={self.bits}) is below the floor: the smallest budget "
                f"that fits these parameters is {smallest:g} bits per state element (mu at "
                f"{MU_WIDTHS[0]} bits, nu at {NU_WIDTHS[0]}, scales{pinned} and exact leaves "
                f"included){advice if smallest > 32 else ''}"
            )
        return min(rows, int(np.sum(slots.tiles * slots.widest)))

    def first_widths(self, slots: Slots, rows: int) -> np.ndarray:
        return fill(slots, rows)

    def refit(self, slots: Slots, rows: int, widths: np.ndarray) -> np.ndarray:
        return refit(slots, rows, widths)


def fill(slots: Slots, rows: int, widths: np.ndarray | None = None) -> np.ndarray:
    """int[slots]: widths that fill so many rows, when nothing is measured and all slots of a moment
    gain alike; from the narrowest on, or from given ones.

    Takes the steps in the order of gain per bit, each for as many slots as fit, the largest first.
    """
    widths = slots.narrowest if widths is None else widths.copy()
    free = rows - int(np.sum(slots.tiles * widths))
    for moment, width, wider in _by_gain():
        for slot in np.argsort(-slots.tiles, kind="stable"):
            cost = int(slots.tiles[slot]) * (wider - int(widths[slot]))
            here = slots.moment[slot] == moment and width <= widths[slot] < wider
            if here and slots.allowed[slot, wider] and cost <= free:
                widths[slot] = wider
                free -= cost
    return widths


def refit(slots: Slots, rows: int, widths: np.ndarray) -> np.ndarray:
    """int[slots]: given widths, made to fill another number of rows: the least useful bits go, the
    smallest slots first, then `fill`. With more rows no slot becomes narrower."""
    widths = widths.copy()
    for moment, width, wider in reversed(_by_gain()):
        for slot in np.argsort(slots.tiles, kind="stable"):
            here = slots.moment[slot] == moment and width < widths[slot] <= wider
            if here and slots.allowed[slot, width] and np.sum(slots.tiles * widths) > rows:
                widths[slot] = width
    return fill(slots, rows, widths)


def _by_gain() -> list[tuple[int, int, int]]:
    """Steps (moment, width, next width) by the fall of error per bit, on the convex hulls.

    What lies between two widths of a hull has the gain from one to the other: all slots take the
    first step there before any takes the second. A moment without codes cannot be measured, so a
    policy does better with few bits everywhere than with many here and none there.
    """
    steps = []
    nu_error = {w: 1 / (1 / NU_NOISE[w] + 1 / NU_SPREAD) for w in NU_WIDTHS}
    for moment, errors in ((MU, {w: MU_ERROR[w] for w in MU_WIDTHS}), (NU, nu_error)):
        for low, high in itertools.pairwise(_hull(errors)):
            gain = (errors[low] - errors[high]) / (high - low)
            between = itertools.pairwise([w for w in errors if low <= w <= high])
            steps += [(gain, moment, width, wider) for width, wider in between]
    return [step[1:] for step in sorted(steps, key=lambda step: (-step[0], step[2]))]


def _hull(errors: dict[int, float]) -> list[int]:
    """Widths on the lower convex hull of their errors."""
    hull: list[int] = []
    for width in sorted(errors):
        while len(hull) > 1:
            a, b = hull[-2:]
            slope = (errors[width] - errors[a]) / (width - a)
            if errors[a] + slope * (b - a) > errors[b]:
                break
            hull.pop()
        hull.append(width)
    return hull
