"""Precision policies: how many bits each slot gets. A policy sees sizes, widths and statistics,
never the arena.

All are frozen dataclasses: `optax.inject_hyperparams` would turn bare numbers into traced arrays,
and shapes depend on these.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import numpy as np

MU_WIDTHS = (2, 8)  # bits of a code, from and to
NU_WIDTHS = (0, 8)
WINDOWS = (1, 2, 3, 4, 6, 8)  # octaves
# The window of nu that served best in the closed loop, by width.
DEFAULT_WINDOW = (2, 2, 2, 3, 3, 3, 3, 3, 4)

# Squared error of the update that a moment costs in the closed loop at each width, over the
# update's energy: convex hulls of what benchmarks/codec.py measures on its GPT and ViT streams,
# rounded. They rank the steps of the first plan. Width 1 of nu is not on its hull: with rows, two
# levels tell less than they disturb.
MU_ERROR = {2: 0.34, 3: 0.12, 4: 0.0335, 5: 0.0084, 6: 0.0023, 7: 0.00085, 8: 0.0005}
NU_ERROR = {0: 0.0547, 2: 0.0361, 3: 0.0268, 4: 0.0175, 5: 0.0094, 6: 0.0045, 7: 0.0023, 8: 0.0011}


class PrecisionState(NamedTuple):
    """The part of the state that a policy owns; slots are ordered leaf by leaf, mu before nu."""

    widths: jax.Array  # int32[slots]
    windows: jax.Array  # int32[slots]: octaves, 0 for mu


Plan = tuple[np.ndarray, np.ndarray]  # widths and windows, int32[slots], on the host


class Policy(Protocol):
    """What a policy offers. Tiles are those of each slot, int[slots]; bytes of the whole state."""

    def rows(self, tiles: np.ndarray, fixed_bytes: int, reference_bytes: int) -> int:
        """Rows of the arena."""
        ...

    def first_plan(self, tiles: np.ndarray, rows: int) -> Plan:
        """Widths and windows to start with."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same widths for all slots, from the first step to the last.

    Attributes:
      mu: bits of a code of the first moment, 2..8.
      nu: bits of a code of the second moment, 0..8.
      window: octaves that the second moment's lattice spans, 1, 2, 3, 4, 6 or 8; None for the best
        at that width.
    """

    mu: int = 5
    nu: int = 4
    window: int | None = None

    def __post_init__(self):
        for name, (low, high) in (("mu", MU_WIDTHS), ("nu", NU_WIDTHS)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(
                    f"Fixed({name}={value!r}): expected an integer width from {low} to {high}"
                )
        if self.window is not None and self.window not in WINDOWS:
            raise ValueError(f"Fixed(window={self.window!r}): expected None or one of {WINDOWS}")

    def rows(self, tiles: np.ndarray, fixed_bytes: int, reference_bytes: int) -> int:
        return int(np.sum(tiles * self._widths(tiles)))

    def first_plan(self, tiles: np.ndarray, rows: int) -> Plan:
        return _plan(self._widths(tiles), self.window)

    def _widths(self, tiles: np.ndarray) -> np.ndarray:
        return np.tile(np.array([self.mu, self.nu]), len(tiles) // 2)


@dataclass(frozen=True)
class Budget:
    """Fill a budget that counts everything: planes, scales, exact leaves, schedule, padding.

    The first plan raises the width that lowers the update's error most per byte, until nothing
    fits: near 5 bits mu has 5 and nu 4, near 4 bits 5 and 2, near 3 bits 5 and 0. Widths live in
    the state; so far they stay as first planned.

    Attributes:
      bits: all-in bits per state element; the state takes at most bits/32 of the bytes of Optax's
        float32 Adam state.
    """

    bits: float = 5.0

    def __post_init__(self):
        if (
            not isinstance(self.bits, (int, float))
            or isinstance(self.bits, bool)
            or not 0 < self.bits <= 32
        ):
            raise ValueError(
                f"Budget(bits={self.bits!r}): expected a number of bits per state element, above 0 "
                "and at most 32"
            )

    def rows(self, tiles: np.ndarray, fixed_bytes: int, reference_bytes: int) -> int:
        """Raises ValueError below the floor, naming the smallest budget that fits."""
        rows = int((self.bits / 32 * reference_bytes - fixed_bytes) // 512)
        floor = int(np.sum(tiles * _floor(tiles)))
        if rows < floor:
            smallest = np.ceil(32 * (fixed_bytes + 512 * floor) / reference_bytes * 1000) / 1000
            advice = "; raise Storage(min_size=...), small leaves fill whole tiles"
            raise ValueError(
                f"Budget(bits={self.bits}) is below the floor: the smallest budget that fits these "
                f"parameters is {smallest:g} bits per state element (mu at {MU_WIDTHS[0]} bits, nu "
                f"at {NU_WIDTHS[0]}, scales and exact leaves included)"
                f"{advice if smallest > 32 else ''}"
            )
        return min(rows, int(np.sum(tiles)) * MU_WIDTHS[1])

    def first_plan(self, tiles: np.ndarray, rows: int) -> Plan:
        widths = _floor(tiles)
        kind = np.arange(len(tiles)) % 2
        free = rows - int(np.sum(tiles * widths))
        # Every element's error counts the same, so all slots of a moment gain alike: take the steps
        # in the order of gain per bit, each for as many slots as fit, the largest first.
        for moment, width, wider in _by_gain():
            for slot in np.argsort(-tiles, kind="stable"):
                cost = int(tiles[slot]) * (wider - width)
                if kind[slot] == moment and widths[slot] == width and cost <= free:
                    widths[slot] = wider
                    free -= cost
        return _plan(widths, None)


def _by_gain() -> list[tuple[int, int, int]]:
    """Steps (moment, width, next width) by the fall of error per bit: on a hull, in order."""
    steps = []
    for moment, errors in enumerate((MU_ERROR, NU_ERROR)):
        for (width, error), (wider, less) in itertools.pairwise(errors.items()):
            steps.append(((error - less) / (wider - width), moment, width, wider))
    return [step[1:] for step in sorted(steps, key=lambda step: (-step[0], step[2]))]


def _floor(tiles: np.ndarray) -> np.ndarray:
    return np.tile(np.array([MU_WIDTHS[0], NU_WIDTHS[0]]), len(tiles) // 2)


def _plan(widths: np.ndarray, window: int | None) -> Plan:
    windows = np.array(DEFAULT_WINDOW)[widths] if window is None else np.full_like(widths, window)
    windows[0::2] = 0
    return widths.astype(np.int32), windows.astype(np.int32)
