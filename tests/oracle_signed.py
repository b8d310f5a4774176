"""A moment that stands alone, by NumPy in float64: levels, scales and rounding from their
definitions, one group at a time."""

import numpy as np

PER_OCTAVE = 256
LOWEST = -126.0
NOT_FINITE = 65535
REACH = {2: 0.85, 3: 1.0, 4: 0.95}  # outermost level over the largest magnitude


def levels(width: int) -> np.ndarray:
    """What each code stands for, as a part of the scale."""
    half = 2 ** (width - 1)
    if width < 4:  # on either side of zero
        return 0.25 * (np.arange(-half, half) + 0.5)
    return np.arange(1 - half, half) / half


def scale_of(code: int) -> float:
    if code == 0:
        return 0.0
    return np.nan if code == NOT_FINITE else 2.0 ** (LOWEST + (code - 1) / PER_OCTAVE)


def decode(codes: np.ndarray, scale: int, width: int) -> np.ndarray:
    return levels(width)[codes] * scale_of(scale)


def position(x: np.ndarray, largest: float, width: int) -> np.ndarray:
    """Where values lie among the codes of a group, as real numbers; before rounding."""
    half = 2 ** (width - 1)
    cells = half if width < 4 else half - 1
    z = x / largest * cells / REACH.get(width, 1.0)
    return z - 0.5 + half if width < 4 else z + half - 1


def rounded(
    x: np.ndarray, old: np.ndarray, dither: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of a group that is neither zero nor infinite, and how near each was to another."""
    largest = np.abs(x).max()
    here, before, zero = (position(y, largest, width) for y in (x, old, 0 * x))
    distances = [np.abs(here - before)]
    if width < 4:
        distances.append(np.abs(here - zero))
    random = np.min(distances, axis=0) < 0.5
    exact = here + np.where(random, dither, 0.5)
    codes = np.clip(np.floor(exact), 0, len(levels(width)) - 1).astype(int)
    doubt = [np.abs(exact - np.round(exact)), *(np.abs(d - 0.5) for d in distances)]
    return codes, np.min(doubt, axis=0)


def scale_code(x: np.ndarray, codes: np.ndarray, coin: float, width: int) -> float:
    """The scale that keeps the group's length, before it is rounded down."""
    ratio = np.linalg.norm(x) / np.linalg.norm(levels(width)[codes])
    return (np.log2(ratio) - LOWEST) * PER_OCTAVE + 1 + coin
