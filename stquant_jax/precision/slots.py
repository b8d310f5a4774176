"""The slots as a policy knows them: sizes, names, widths that are possible, and pins.

A slot is (leaf, moment); slots are ordered leaf by leaf, mu before nu.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MU, NU = 0, 1
MU_WIDTHS = (2, 3, 4, 5, 6, 7, 8)  # bits of a code
# Width 1 of nu costs a plane and tells less than it disturbs: no policy takes it of its own accord.
NU_WIDTHS = (0, 2, 3, 4, 5, 6, 7, 8)
WIDEST = 8
EXACT = "exact"
_DIGIT, _LAST = 12, 2**12 - 1  # of a number of rows: bits of a digit, and the largest

Pins = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Slots:
    """Static facts, one entry per slot.

    Attributes:
      tiles: int[slots], rows of the arena that one bit of width costs.
      paths: leaf path of each slot.
      pins: pattern and widths (mu, nu) of leaves whose precision is given.
      kinds: int[slots], 0 for mu and 1 for nu; None where they are pairs.
    """

    tiles: np.ndarray
    paths: tuple[str, ...]
    pins: Pins = ()
    kinds: np.ndarray | None = None

    @property
    def moment(self) -> np.ndarray:
        """0 for mu, 1 for nu."""
        return np.arange(len(self.tiles)) % 2 if self.kinds is None else self.kinds

    @cached_property
    def allowed(self) -> np.ndarray:
        """bool[slots, 9]: widths that a slot may take."""
        table = np.zeros((len(self.tiles), WIDEST + 1), bool)
        for slot, (path, moment) in enumerate(zip(self.paths, self.moment, strict=True)):
            pin = pin_of(self.pins, path)
            widths = (MU_WIDTHS, NU_WIDTHS)[moment] if pin is None else pin[moment]
            table[slot, widths] = True
        return table

    def pinned(self, widths: np.ndarray) -> np.ndarray:
        """Widths, with those of pinned leaves in their place."""
        single = self.allowed.sum(axis=1) == 1
        return np.where(single, self.narrowest, widths)

    @property
    def narrowest(self) -> np.ndarray:
        return np.argmax(self.allowed, axis=1)

    @property
    def widest(self) -> np.ndarray:
        return WIDEST - np.argmax(self.allowed[:, ::-1], axis=1)


def room(rows: Any, tiles: np.ndarray, widths: jax.Array) -> jax.Array:
    """int32[]: how many of so many rows these widths leave free, below 0 if they take more.

    Rows and tiles are those of all devices together, where they may be beyond int32. Counted in two
    digits the outcome is exact; near 2**30 it stops.
    """
    parts = tiles >> _DIGIT, tiles & _LAST
    high, low = (jnp.sum(widths * jnp.asarray(part, jnp.int32)) for part in parts)
    high, low = (rows >> _DIGIT) - high, (rows & _LAST) - low
    high, low = high + (low >> _DIGIT), low & _LAST
    most = 2 ** (30 - _DIGIT)
    return (jnp.clip(high, -most, most - 1) << _DIGIT) + low


def is_whole(x: Any, least: int, most: int = 2**31 - 1) -> bool:
    """An integer in a range, of int32 at most; True and False are none."""
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def checked_pins(pins: Any) -> Pins:
    """Pins as a policy keeps them, hashable.

    Raises:
      ValueError: not a mapping from a regular expression to a width, a pair of widths or "exact".
    """
    try:
        items = [(p, value) for p, value in (pins.items() if isinstance(pins, Mapping) else pins)]
        for pattern, _ in items:
            re.search(pattern, "")
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(
            f"pins={pins!r}: expected a mapping from regular expressions of leaf paths to widths "
            f"({error})"
        ) from None
    checked = []
    for pattern, value in items:
        widths = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
        fits = [
            is_whole(w, low, WIDEST)
            for w, low in zip(widths, (MU_WIDTHS[0], NU_WIDTHS[0]), strict=True)
        ]
        exact = isinstance(value, str) and value == EXACT
        if not exact and not all(fits):
            raise ValueError(
                f"pins[{pattern!r}]={value!r}: expected a width from 2 to 8 for both moments, a "
                "pair (mu from 2 to 8, nu from 0 to 8), or 'exact'"
            )
        checked.append((pattern, EXACT if exact else widths))
    return tuple(checked)


def pin_of(pins: Pins, path: str) -> Any:
    """Of the first pattern that is found in a path; None without any."""
    return next((value for pattern, value in pins if re.search(pattern, path)), None)


def unmatched(pins: Pins, paths: list[str]) -> list[str]:
    """Patterns that are found in no path."""
    return [pattern for pattern, _ in pins if not any(re.search(pattern, path) for path in paths)]
