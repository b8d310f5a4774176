"""SOLO once more, from its definitions (arXiv 2505.00347), in NumPy float64; see `tests/oracle.py`.

A block is 128 consecutive elements of the flattened leaf, the last one filled up with zeros.
"""

import math
from typing import NamedTuple

import numpy as np

from tests.oracle import average
from tests.oracle_storage import GROUP, LANES, hash32, read_slot, to_planes

TINY = 2.0**-126  # anything below is zero


def levels(bits: int) -> np.ndarray:
    """Dynamic exponent: a level is +-10^-(zeros) times the middle of a cell of [.1, 1].

    After the sign come ``zeros`` zeros that count the exponent, a one, and the fraction in all bits
    that are left.
    """
    out = {0.0, 1.0}
    for zeros in range(bits - 1):
        cells = 2 ** (bits - 2 - zeros)
        for k in range(cells):
            fraction = 0.1 + 0.9 * (k + 0.5) / cells
            out |= {10.0**-zeros * fraction, -(10.0**-zeros) * fraction}
    return np.array(sorted(out))


def to_blocks(x: np.ndarray) -> np.ndarray:
    return np.pad(x.reshape(-1), (0, -x.size % LANES)).reshape(-1, LANES)


def from_blocks(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)


class Mu(NamedTuple):
    codes: np.ndarray  # [blocks, 128]
    scale: np.ndarray  # [blocks]
    margin: np.ndarray  # [blocks, 128]: how far the next code is, as a share of the scale


def encode_mu(m: np.ndarray, bits: int) -> Mu:
    table, scale = levels(bits), block_scale(m)
    y = m / np.where(scale > 0, scale, 1)[:, None]
    y = np.where(scale[:, None] > 0, y, 0)
    distance = np.abs(y[..., None] - table)
    nearest = np.sort(distance, axis=-1)
    return Mu(distance.argmin(-1), scale, (nearest[..., 1] - nearest[..., 0]) / 2)


def decode_mu(codes: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    return levels(bits)[codes] * scale[:, None]


class Nu(NamedTuple):
    codes: np.ndarray
    scale: np.ndarray
    alpha: np.ndarray  # [blocks]
    margin: np.ndarray  # [blocks, 128]: how far the next code is, as a share of the whole range


def encode_nu(v: np.ndarray, bits: int, quantile: float, noise: np.ndarray) -> Nu:
    last, scale = 2**bits - 1, block_scale(v)
    codes, margin = np.zeros(v.shape, int), np.ones(v.shape)
    alpha = np.ones(len(v))
    for i, d in enumerate(scale):
        if not d > 0:
            continue
        y = v[i] / d
        alpha[i] = np.quantile(y[y >= TINY], quantile) ** (1 / last)
        if alpha[i] == 1:
            codes[i] = np.where(y == 1, 0, last)
            continue
        place = np.log(np.maximum(y, TINY)) / np.log(alpha[i]) + noise[i]
        codes[i] = np.clip(np.floor(place), 0, last)
        inside = (place > 0.5) & (place < last + 0.5)
        margin[i] = np.where(inside, np.abs(place - np.round(place)), 1) / last
    return Nu(codes, scale, alpha, margin)


def decode_nu(codes: np.ndarray, scale: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return scale[:, None] * alpha[:, None] ** codes


def block_scale(x: np.ndarray) -> np.ndarray:
    """The block's largest magnitude; 0 without any, NaN if it is not finite, or nearly so."""
    largest = np.abs(x).max(-1)
    return np.where(largest <= 1 / TINY, np.where(largest < TINY, 0, largest), np.nan)


# --- bits ---


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    rows = np.pad(codes, ((0, -len(codes) % GROUP), (0, 0)))
    return to_planes(rows.reshape(-1, GROUP, LANES))[:bits]


def unpack(planes: np.ndarray, blocks: int) -> np.ndarray:
    bits, tiles, _ = planes.shape
    codes = read_slot(planes.reshape(-1, LANES), 0, bits, tiles)
    return codes.reshape(-1, LANES)[:blocks]


def noise(seed: int, leaf: int, step: int, blocks: int) -> np.ndarray:
    """A hash of all four: uniform on [0, 1), fresh in every step."""
    key = int(hash32(step ^ int(hash32(seed ^ int(hash32(2 * leaf + 1))))))
    return (hash32(np.arange(blocks * LANES) ^ key) >> 8).reshape(-1, LANES) / 2**24


# --- one step of a leaf ---


class Codes(NamedTuple):
    """What the state holds of a leaf, its codes unpacked."""

    mu: np.ndarray
    mu_scale: np.ndarray
    nu: np.ndarray
    nu_scale: np.ndarray
    nu_alpha: np.ndarray


class Solo(NamedTuple):
    b1: float = 0.8
    b2: float = 0.999
    eps: float = 1e-8
    bits: tuple[int, int] = (4, 2)
    quantile: float = 0.1


def step(
    g: np.ndarray, old: Codes, solo: Solo, random: np.ndarray, count: int
) -> tuple[np.ndarray, Mu, Nu]:
    """The update of step ``count`` (1 for the first), and what is stored of the new moments."""
    b1, b2, eps = (float(np.float32(x)) for x in solo[:3])
    with np.errstate(all="ignore"):
        m = from_blocks(decode_mu(old.mu, old.mu_scale, solo.bits[0]), g.shape)
        v = from_blocks(decode_nu(old.nu, old.nu_scale, old.nu_alpha), g.shape)
        m, v = average(solo.b1, m, g), average(solo.b2, v, g**2)
        update = m / (1 - b1**count) / (np.sqrt(v / (1 - b2**count)) + eps)
        mu = encode_mu(to_blocks(m), solo.bits[0])
        nu = encode_nu(to_blocks(v), solo.bits[1], solo.quantile, random)
    return update, mu, nu
