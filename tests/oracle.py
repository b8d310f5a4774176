"""The codecs and a step of Adam once more, from their definitions, in NumPy float64.

Nothing here comes from the library: two implementations that share code agree even where both are
wrong. Tables and logarithms stand where the library has polynomials on bits. A block is
[tiles, 32, 128]: the group axis, then lanes.
"""

from typing import NamedTuple

import numpy as np

from tests.oracle_storage import GROUP, Noise, Place, noise

TINY = 2.0**-126  # groups of less energy are zero

# --- second moment: log2 sigma = base - row / 32 - delta * code ---

BASE_LOWEST, BASE_STEP, BASE_NOT_FINITE = -63, 1 / 512, 2**16 - 1
ROW_STEP, ROW_LAST, ROW_MOST, ROW_GAIN = 1 / 32, 255, 8, 1 / 4
SHRINKAGE = (1, 0.7, 0.55, 0.5, 0.25, 0.1, 0.03, 0, 0)


def decode_nu(codes, scale, row, width: int, window: int) -> np.ndarray:
    """sigma of every element: 0 in a group of zeros, NaN in one that is not finite."""
    base = BASE_LOWEST + (scale - 1.0) * BASE_STEP
    sigma = 2.0 ** np.maximum(base - row * ROW_STEP - window / 2**width * codes, BASE_LOWEST)
    return sigma * np.where(scale == 0, 0, np.where(scale == BASE_NOT_FINITE, np.nan, 1))


class Nu(NamedTuple):
    codes: np.ndarray
    scale: np.ndarray
    row: np.ndarray
    used: np.ndarray  # v for the update, shrunk


def encode_nu(v, old_sigma, old: "Codes", inside, slot: "Slot", turn, random: Noise) -> Nu:
    """``turn`` is the one row of each tile that may move in this step."""
    width, dither = slot.nu, random.nu
    delta, last = slot.window / 2**width, 2**width - 1
    size = np.maximum(inside.sum(-2, keepdims=True), 1)
    energy = v.sum(-2, keepdims=True)
    mean = energy / size
    absent = old.nu_scale == 0
    alive = np.isfinite(energy) & (energy >= TINY)
    living = alive & inside

    # Octaves that each element moves beyond its group; an absent group starts level, at its mean.
    before = np.where(absent | ~inside, 1.0, old_sigma**2)
    codes = np.where(absent, 0, old.nu)
    growth = np.log2(energy / (before * inside).sum(-2, keepdims=True))
    own = 0.5 * (np.log2(v / before) - growth)

    # The row in turn makes up a quarter of what its mean code is off its tile's. Without codes it
    # takes its drift, for the 32 steps until its next turn. A row of padding stays.
    row = old.nu_row.astype(float)
    here = living[:, turn].sum(-1)
    if width:
        tile = (old.nu * living).sum((-2, -1)) / np.maximum(living.sum((-2, -1)), 1)
        far = (old.nu * living)[:, turn].sum(-1) / np.maximum(here, 1) - tile
        move = ROW_GAIN * delta * far
    else:
        move = -GROUP * np.where(living, own, 0)[:, turn].sum(-1) / np.maximum(here, 1)
    move = np.clip(np.where(here > 0, move, 0) / ROW_STEP, -ROW_MOST, ROW_MOST)
    row[:, turn, 0] += np.floor(move + dither[:, turn, 0])
    lowest = np.where(inside.any(-1, keepdims=True), row, ROW_LAST).min(-2, keepdims=True)
    row = np.minimum(row, lowest + ROW_LAST)
    down = (row - np.where(absent, 0, old.nu_row)) * ROW_STEP
    row = np.maximum(row - lowest, 0)

    codes = codes - np.floor((own + down) / delta + dither)
    codes = np.minimum(codes - np.where(inside, codes, np.inf).min(-2, keepdims=True), last)

    # The base gives the decoded group its true energy.
    shape = 2.0 ** (-row * ROW_STEP - delta * codes)
    base = 0.5 * np.log2(energy / (shape**2 * inside).sum(-2, keepdims=True))
    scale = np.clip(
        np.floor((base - BASE_LOWEST) / BASE_STEP + 1 + random.nu_coin), 1, BASE_NOT_FINITE - 1
    )
    scale = np.where(np.isfinite(energy), np.where(alive, scale, 0), BASE_NOT_FINITE)

    # The update sees elements pulled to what group and row predict.
    share = 2.0 ** (-2 * row * ROW_STEP) * np.ones(v.shape)
    predicted = mean * share / ((share * inside).sum(-2, keepdims=True) / size)
    used = (
        np.maximum(v, TINY) ** (1 - SHRINKAGE[width])
        * np.maximum(predicted, TINY) ** SHRINKAGE[width]
    )
    codes = np.where(living, codes, 0)
    return Nu(codes, scale, row, np.where(np.isfinite(energy), np.maximum(used, TINY), np.nan))


# --- first moment: m = sigma * 2**(log2 largest) * level ---

MU_ZERO, MU_NOT_FINITE, MU_FINE = (
    128,
    2**8 - 1,
    84,
)  # 3.5 octaves of 24 steps, then 5 steps an octave
REACH = {2: 0.85, 3: 1.0, 4: 0.95, 5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}


def mu_octaves(scale) -> np.ndarray:
    """log2 of the largest level of a scale."""
    n = np.abs(scale - MU_ZERO * 1.0)
    return np.sign(scale - MU_ZERO * 1.0) * (
        np.minimum(n, MU_FINE) / 24 + np.maximum(n - MU_FINE, 0) / 5
    )


def mu_levels(width: int) -> np.ndarray:
    """Level of each code, from -1 to 1: with a zero from 4 bits on, astride of it below."""
    if width < 4:
        return np.linspace(-1, 1, 2**width)
    return np.linspace(-1, 1, 2**width - 1)


def decode_mu(codes, scale, sigma, width: int) -> np.ndarray:
    largest = 2.0 ** mu_octaves(scale) * np.where(
        scale == 0, 0, np.where(scale == MU_NOT_FINITE, np.nan, 1)
    )
    levels = np.append(mu_levels(width), np.nan)  # the code that no level has is never written
    return levels[np.minimum(codes, len(levels) - 1)] * largest * sigma


def encode_mu(e, inside, alive, width: int, random: Noise) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of e = m / sigma. Decoded, a group keeps its length on average."""
    levels = mu_levels(width)
    largest = np.abs(e).max(-2, keepdims=True)
    y = e / np.where(largest > 0, largest, 1) / REACH[width]
    if width < 4:
        cells = y * len(levels) / 2
        cells = (
            np.floor(np.where(np.abs(cells) < 0.5, cells + random.mu - 0.5, cells))
            + len(levels) // 2
        )
    else:
        cells = np.floor(y * (len(levels) // 2) + 0.5) + len(levels) // 2
    codes = np.clip(np.where(alive, cells, 0), 0, len(levels) - 1).astype(int)
    length = (e**2).sum(-2, keepdims=True)
    ratio = length / np.maximum(((levels[codes] ** 2) * inside).sum(-2, keepdims=True), TINY)
    steps = np.arange(256)
    squares = 4.0 ** mu_octaves(steps)
    below = np.clip(np.searchsorted(squares, ratio, side="right") - 1, 0, 254)
    up = random.mu_coin < (ratio - squares[below]) / (squares[below + 1] - squares[below])
    scale = np.where(length < TINY, 0, np.clip(below + up, 0, 254))
    return codes, np.where(alive, scale, 0)


# --- one step of a leaf ---


class Codes(NamedTuple):
    mu: np.ndarray  # [tiles, 32, 128]
    nu: np.ndarray
    mu_scale: np.ndarray  # [tiles, 1, 128]
    nu_scale: np.ndarray
    nu_row: np.ndarray  # [tiles, 32, 1]


class Slot(NamedTuple):
    """What a leaf's codes mean: widths, window in octaves, and what its noise is seeded by."""

    mu: int
    nu: int
    window: int
    seed: int
    leaf: int


class Adam(NamedTuple):
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    nesterov: bool = False


def step(g, old: Codes, where: Place, adam: Adam, slot: Slot, count) -> tuple[np.ndarray, Codes]:
    """The update and the codes after step ``count`` (1 for the first) on gradient tiles ``g``."""
    b1, b2, eps = (float(np.float32(x)) for x in adam[:3])
    inside = where.element >= 0
    random = noise(slot.seed, slot.leaf, count, where.group)
    with np.errstate(all="ignore"):  # absent groups divide by zero and are masked
        sigma = decode_nu(old.nu, old.nu_scale, old.nu_row, slot.nu, slot.window) * inside
        m = b1 * decode_mu(old.mu, old.mu_scale, sigma, slot.mu) + (1 - b1) * g
        v = b2 * sigma**2 + (1 - b2) * g**2
        nu = encode_nu(v, sigma, old, inside, slot, count % GROUP, random)
        alive = (nu.scale != 0) & (nu.scale != BASE_NOT_FINITE)
        root = decode_nu(nu.codes, nu.scale, nu.row, slot.nu, slot.window)
        e = np.where(alive & inside, m / root, 0)
        mu, mu_scale = encode_mu(e, inside, alive, slot.mu, random)
        mu_scale = np.where(nu.scale == BASE_NOT_FINITE, MU_NOT_FINITE, mu_scale)
        if adam.nesterov:
            m_hat = b1 * m / (1 - b1 ** (count + 1)) + (1 - b1) * g / (1 - b1**count)
        else:
            m_hat = m / (1 - b1**count)
        update = m_hat / (np.sqrt(nu.used / (1 - b2**count) + adam.eps_root) + eps)
    return np.where(inside, update, 0), Codes(mu, nu.codes, mu_scale, nu.scale, nu.row)
