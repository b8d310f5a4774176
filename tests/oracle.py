"""The codecs and a step of Adam once more, from their definitions, in NumPy float64.

Nothing here comes from the library: two implementations that share code agree even where both are
wrong. Tables and logarithms stand where the library has polynomials on bits. A block is
[tiles, 32, 128]: the group axis, then lanes.
"""

from typing import NamedTuple

import numpy as np

from tests.oracle_storage import GROUP, Noise, Place, noise

TINY = 2.0**-126  # groups of less energy are zero

# --- second moment: sigma = 2**(base - row / 32) * root(code) ---

BASE_LOWEST, BASE_STEP, BASE_NOT_FINITE = -63, 1 / 512, 2**16 - 1
MOST_ENERGY = 2.0**127  # groups of more are not finite
ROW_STEP, ROW_LAST = 1 / 32, 255
CENTRED_MOST, CENTRED_PART = 8, 1 / 4
SHORT = 0.05  # steps by predictions would be too short: what is taken off v
YOUNG, SHORTLY = 10, 100  # how much faster than nu's memory fills shrinkage grows, and that


def root_nu(codes, delta: float) -> np.ndarray:
    """About 2**(-delta * code): between powers of two a cubic that is 1 at 1 and 2 at 2."""
    whole = np.floor(-delta * np.asarray(codes, float))
    m = 1 - delta * codes - whole
    return (m + (m - 1) * (m - 2) * (0.2263076823 + 0.0782679701 * m)) * 2.0**whole


def octaves_nu(ratio) -> np.ndarray:
    """About log2: a quartic on [sqrt(1/2), sqrt(2)], from which other numbers are octaves away."""
    whole = np.floor(np.log2(np.maximum(ratio, 2.0**-127)) + 0.5)
    f = ratio / 2.0**whole - 1
    series = np.polynomial.Polynomial([0, 1.4426950, -0.7232593, 0.5071921, -0.3335832])
    return np.where(ratio > 0, whole + series(f), -127)


def decode_nu(codes, scale, row, width: int, window: int) -> np.ndarray:
    """sigma of every element: 0 in a group of zeros, NaN in one that is not finite."""
    base = 2.0 ** (BASE_LOWEST + (scale - 1.0) * BASE_STEP)
    base = base * np.where(scale == 0, 0, np.where(scale == BASE_NOT_FINITE, np.nan, 1))
    return base * shape_nu(codes, row, width, window)


def shape_nu(codes, row, width: int, window: int) -> np.ndarray:
    """sigma over its group's base."""
    return 2.0 ** (-row * ROW_STEP) * root_nu(codes, window / 2**width)


class Nu(NamedTuple):
    codes: np.ndarray
    scale: np.ndarray
    row: np.ndarray
    used: np.ndarray  # v for the update, shrunk


def encode_nu(
    v, old: "Codes", inside, slot: "Slot", round_row, random: Noise, anew: bool = False
) -> Nu:
    """``round_row`` is the one row of each tile whose codes are centred in this step. ``anew``: v
    grew out of nothing, and rows are rounded to the nearest at every width."""
    width, dither = slot.nu, random.nu
    delta, last = slot.window / 2**width, 2**width - 1
    energy = v.sum(-2, keepdims=True)
    finite = energy < MOST_ENERGY
    alive = finite & (energy >= TINY)
    living = alive & inside
    row = old.nu_row.astype(float)

    # Parts of the group's energy, before and after: a group of zeros has the shape of its rows.
    shape = shape_nu(old.nu, row, width, slot.window) ** 2 * inside
    before = np.where(alive, shape / shape.sum(-2, keepdims=True), 0)
    now = np.where(alive, v / energy, 0)

    # A row's elements together grow as their row: without codes rounded at random, with codes to
    # the nearest. Then codes of the round-robin row are centred: a quarter of what their mean is
    # off their tile's. A row of padding stays.
    here = before.sum(-1, keepdims=True) > 0
    ratio = now.sum(-1, keepdims=True) / np.where(here, before.sum(-1, keepdims=True), 1)
    octaves = 0.5 * np.log2(np.maximum(ratio, TINY))
    move = np.floor((0.5 if width or anew else dither[..., :1]) - octaves / ROW_STEP)
    move = np.where(here, np.clip(move, -ROW_LAST, ROW_LAST), 0)
    if width:
        codes, count = old.nu * living, np.maximum(living.sum((-2, -1)), 1)
        own = np.maximum(living.sum(-1)[:, round_row], 1)
        off = codes.sum(-1)[:, round_row] / own - codes.sum((-2, -1)) / count
        far = np.clip(CENTRED_PART * delta * off / ROW_STEP, -CENTRED_MOST, CENTRED_MOST)
        centred = np.floor(far + dither[:, round_row, 0])
        move[:, round_row, 0] += np.where(living.any(-1)[:, round_row], centred, 0)
    row += move
    lowest = np.where(inside.any(-1, keepdims=True), row, ROW_LAST).min(-2, keepdims=True)
    row = np.minimum(row, lowest + ROW_LAST)
    down = (row - old.nu_row) * ROW_STEP
    row = np.maximum(row - lowest, 0)

    drift = 0.5 * octaves_nu(now / np.maximum(before, TINY))
    codes = old.nu - np.floor((drift + down) / delta + dither)
    codes = np.minimum(codes - np.where(inside, codes, np.inf).min(-2, keepdims=True), last)

    # The base gives the decoded group its true energy.
    codes = np.where(living, codes, 0)
    shape = shape_nu(codes, row, width, slot.window) ** 2
    base = 0.5 * np.log2(energy / (shape * inside).sum(-2, keepdims=True))
    scale = np.clip(
        np.floor((base - BASE_LOWEST) / BASE_STEP + 1 + random.nu_coin), 1, BASE_NOT_FINITE - 1
    )
    scale = np.where(finite, np.where(alive, scale, 0), BASE_NOT_FINITE)
    used = shrink(v, predict_nu(v, row, inside), slot)
    return Nu(codes, scale, row, np.where(finite, used, np.nan))


def predict_nu(v, row, inside) -> np.ndarray:
    """What group and row predict of v: the group's mean, shared out by the rows."""
    share = 4.0 ** (-row * ROW_STEP) * np.ones(v.shape)
    return share * v.sum(-2, keepdims=True) / (share * inside).sum(-2, keepdims=True)


def shrink(v, predicted, slot: "Slot") -> np.ndarray:
    """The update sees elements pulled part of the way to their prediction."""
    part = slot.shrinkage * (1 - slot.left**YOUNG)
    length = 1 - SHORT * slot.shrinkage * (1 - slot.left**SHORTLY)
    return length * ((1 - part) * v + part * predicted)


# --- first moment: m = sigma * 2**(log2 largest) * level ---

MU_ZERO, MU_NOT_FINITE, MU_FINE = (
    128,
    2**8 - 1,
    84,
)  # 3.5 octaves of 24 steps, then 5 steps an octave
REACH = {2: 0.85, 3: 1.0, 4: 0.95, 5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}


def mu_octaves(scale) -> np.ndarray:
    """log2 of a scale."""
    n = np.abs(scale - MU_ZERO * 1.0)
    return np.sign(scale - MU_ZERO * 1.0) * (
        np.minimum(n, MU_FINE) / 24 + np.maximum(n - MU_FINE, 0) / 5
    )


def mu_levels(width: int) -> np.ndarray:
    """Level of each code: with a zero from 4 bits on, astride of it below; each width's levels are
    among those of the next."""
    if width < 4:
        return (np.arange(2**width) - (2**width - 1) / 2) / 4
    return (np.arange(2**width - 1) - (2 ** (width - 1) - 1)) / 2 ** (width - 1)


def decode_mu(codes, scale, sigma, width: int) -> np.ndarray:
    largest = 2.0 ** mu_octaves(scale) * np.where(
        scale == 0, 0, np.where(scale == MU_NOT_FINITE, np.nan, 1)
    )
    levels = np.append(mu_levels(width), np.nan)  # the code that no level has is never written
    return levels[np.minimum(codes, len(levels) - 1)] * largest * sigma


def encode_mu(e, inside, alive, width: int, random: Noise) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of e = m / sigma. Decoded, a group keeps its length on average."""
    last = len(mu_levels(width)) - 1
    cells = mu_cells(e, width)
    if width < 4:
        cells = np.where(np.abs(cells) < 0.5, cells + random.mu, cells)
        codes = np.floor(cells) + (last + 1) // 2
    else:
        codes = np.floor(cells + 0.5) + last // 2
    codes = np.clip(np.where(alive, codes, 0), 0, last).astype(int)
    return codes, np.where(alive, mu_scale(e, codes, inside, width, random), 0)


def mu_cells(e, width: int) -> np.ndarray:
    """How many cells each element is away from zero."""
    largest = np.abs(e).max(-2, keepdims=True)
    return e / np.where(largest > 0, largest, 1) / REACH[width] * (len(mu_levels(width)) // 2)


def mu_scale(e, codes, inside, width: int, random: Noise) -> np.ndarray:
    """The scale with which these codes are, on average, as long as e."""
    levels = mu_levels(width)
    length = (e**2).sum(-2, keepdims=True)
    ratio = length / np.maximum(((levels[codes] ** 2) * inside).sum(-2, keepdims=True), TINY)
    steps = np.arange(256)
    squares = 4.0 ** mu_octaves(steps)
    below = np.clip(np.searchsorted(squares, ratio, side="right") - 1, 0, 254)
    up = random.mu_coin < (ratio - squares[below]) / (squares[below + 1] - squares[below])
    return np.where(length < TINY, 0, np.clip(below + up, 0, 254))


# --- from one plan to another; a moment's format is (width, window), of mu the width alone ---

SALT = 0x7C15  # the noise of a new plan: seed ^ SALT


def regroup_nu(codes, scale, row, inside, old, new, random: Noise) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales on a coarser lattice, or one of another window."""
    deltas = [window / 2**width for width, window in (old, new)]
    fresh = np.floor(codes * (deltas[0] / deltas[1]) + random.nu)
    fresh -= np.where(inside, fresh, np.inf).min(-2, keepdims=True, initial=2**9)
    fresh = np.clip(fresh, 0, 2 ** new[0] - 1).astype(int)
    return fresh, nu_scale((codes, fresh), scale, row, inside, deltas, random)


def nu_scale(codes, scale, row, inside, deltas, random: Noise) -> np.ndarray:
    """The scale with which the second codes have the energy of the first."""
    energies = [
        (4.0 ** -(row * ROW_STEP) * root_nu(x, delta) ** 2 * inside).sum(-2, keepdims=True)
        for x, delta in zip(codes, deltas, strict=True)
    ]
    with np.errstate(all="ignore"):  # groups of padding alone
        octaves = 0.5 * np.log2(energies[0] / energies[1])
        moved = np.clip(
            np.floor(scale + octaves / BASE_STEP + random.nu_coin), 1, BASE_NOT_FINITE - 1
        )
    return np.where((scale == 0) | (scale == BASE_NOT_FINITE), scale, moved)


def grow_nu(codes, old, new) -> np.ndarray:
    return codes << (new - old)


def grow_mu(codes, old: int, new: int) -> np.ndarray:
    """The codes of the same levels."""
    return np.searchsorted(mu_levels(new), mu_levels(old)[codes])


# --- one step of a leaf ---


class Codes(NamedTuple):
    mu: np.ndarray  # [tiles, 32, 128]
    nu: np.ndarray
    mu_scale: np.ndarray  # [tiles, 1, 128]
    nu_scale: np.ndarray
    nu_row: np.ndarray  # [tiles, 32, 1]


class Slot(NamedTuple):
    """What a leaf's codes mean: widths, window in octaves, part of the way that the update's roots
    go to their prediction; and what its noise is seeded by."""

    mu: int
    nu: int
    window: int
    shrinkage: float
    seed: int
    leaf: int
    left: float = 0.0  # of the first step's weight in nu


class Adam(NamedTuple):
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    nesterov: bool = False


def average(decay: float, old, new):
    """One step later. What is left of a decay is that of the one that is meant, as in Optax: of
    0.999 itself float32 keeps less."""
    return float(np.float32(decay)) * old + float(np.float32(1 - decay)) * new


def moments(g, old: Codes, inside, adam: Adam, slot: Slot) -> tuple[np.ndarray, ...]:
    """m and v one gradient later."""
    sigma = decode_nu(old.nu, old.nu_scale, old.nu_row, slot.nu, slot.window) * inside
    m = average(adam.b1, decode_mu(old.mu, old.mu_scale, sigma, slot.mu), g)
    return m, average(adam.b2, sigma**2, g**2)


def direction(g, m, v, adam: Adam, count) -> np.ndarray:
    b1, b2, eps = (float(np.float32(x)) for x in adam[:3])
    if adam.nesterov:
        m_hat = average(adam.b1, m / (1 - b1 ** (count + 1)), g / (1 - b1**count))
    else:
        m_hat = m / (1 - b1**count)
    return m_hat / (np.sqrt(v / (1 - b2**count) + adam.eps_root) + eps)


def step(g, old: Codes, where: Place, adam: Adam, slot: Slot, count) -> tuple[np.ndarray, Codes]:
    """The update and the codes after step ``count`` (1 for the first) on gradient tiles ``g``."""
    inside = where.element >= 0
    random = noise(slot.seed, slot.leaf, count, where.group)
    slot = slot._replace(left=adam.b2 ** (count - 1))
    with np.errstate(all="ignore"):  # absent groups divide by zero and are masked
        m, v = moments(g, old, inside, adam, slot)
        nu = encode_nu(v, old, inside, slot, count % GROUP, random)
        alive = (nu.scale != 0) & (nu.scale != BASE_NOT_FINITE)
        root = decode_nu(nu.codes, nu.scale, nu.row, slot.nu, slot.window)
        e = np.where(alive & inside, m / root, 0)
        mu, mu_scale = encode_mu(e, inside, alive, slot.mu, random)
        mu_scale = np.where(nu.scale == BASE_NOT_FINITE, MU_NOT_FINITE, mu_scale)
        update = direction(g, m, nu.used, adam, count)
    return np.where(inside, update, 0), Codes(mu, nu.codes, mu_scale, nu.scale, nu.row)


def encode_anew(m, v, where: Place, slot: Slot, count) -> Codes:
    """Codes of moments of which nothing is stored: as in a step out of zeros."""
    inside, zeros = where.element >= 0, np.zeros(v.shape, int)
    living = inside & (v.sum(-2, keepdims=True) >= TINY)
    random = noise(slot.seed, slot.leaf, count, where.group)
    with np.errstate(all="ignore"):
        nothing = Codes(zeros, zeros, zeros[:, :1], zeros[:, :1], zeros[..., :1])
        nu = encode_nu(v, nothing, inside, slot, 0, random, anew=True)
        root = decode_nu(nu.codes, nu.scale, nu.row, slot.nu, slot.window)
        e, alive = np.where(living, m / root, 0), living.any(-2, keepdims=True)
        mu, mu_scale = encode_mu(e, inside, alive, slot.mu, random)
    return Codes(mu, nu.codes, mu_scale, nu.scale, nu.row)


def statistics(
    g, old: Codes, new: Codes, where: Place, adam: Adam, slot: Slot, count
) -> dict[str, np.ndarray]:
    """Sums over the round-robin row of every tile, of groups that are neither zero nor not finite:
    what it did to the update that ``new`` is stored in place of the exact moments, float[tiles]."""
    inside, slot = where.element >= 0, slot._replace(left=adam.b2 ** (count - 1))
    with np.errstate(all="ignore"):
        m, v = moments(g, old, inside, adam, slot)
        predicted = predict_nu(v, new.nu_row, inside)
        used = shrink(v, predicted, slot)
        update = direction(g, m, used, adam, count)
        root = decode_nu(new.nu, new.nu_scale, new.nu_row, slot.nu, slot.window)
        off = decode_mu(new.mu, new.mu_scale, root, slot.mu) - m
        mu_error = direction(0, off, used, adam, count) ** 2
        octaves = np.log(root**2 / v), np.log(predicted / v)
        energy = update**2
        nu_error, spread = (np.where(energy > 0, energy * (x / 2) ** 2, 0) for x in octaves)
    living = inside & (new.nu_scale > 0) & (new.nu_scale < BASE_NOT_FINITE)
    last = 2**slot.nu - 1
    values = {
        "elements": np.ones(g.shape),
        "energy": energy,
        "mu_error": mu_error,
        "nu_error": nu_error,
        "spread": spread,
        "zeros": mu_levels(slot.mu)[np.minimum(new.mu, len(mu_levels(slot.mu)) - 1)] == 0,
        "saturated": energy * (new.nu == last),
        "narrower": energy * (new.nu >= 0.6 * last),
        "gradient": np.abs(g),
        "gradient2": g**2,
        "nu": used,
    }
    round_row = count % GROUP
    return {
        name: np.sum(np.where(living, x, 0)[:, round_row].astype(float), axis=-1)
        for name, x in values.items()
    }
