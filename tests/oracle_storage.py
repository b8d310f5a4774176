"""Bits, geometry and noise once more, from their definitions; see `tests/oracle.py`."""

import math
from typing import NamedTuple

import numpy as np

GROUP, LANES = 32, 128

# --- bit-planes: bit j of word w in plane p is bit p of the code of element (j, w) ---


def to_planes(codes: np.ndarray) -> np.ndarray:
    """Codes [..., 32, 128] below 256 -> uint32[8, ..., 128]."""
    planes = np.zeros((8, *codes.shape[:-2], LANES), np.uint32)
    for p in range(8):
        for j in range(GROUP):
            planes[p] |= ((codes[..., j, :].astype(np.uint32) >> p) & 1) << j
    return planes


def read_slot(arena: np.ndarray, first: int, width: int, tiles: int) -> np.ndarray:
    """Codes [tiles, 32, 128] of the slot whose planes begin at row ``first``."""
    rows = np.ascontiguousarray(arena[first : first + width * tiles], "<u4").view(np.uint8)
    bits = np.unpackbits(rows, axis=-1, bitorder="little").reshape(width, tiles, LANES, GROUP)
    codes = np.zeros((tiles, LANES, GROUP), np.int64)
    for p in range(width):
        codes |= bits[p].astype(np.int64) << p
    return codes.swapaxes(-1, -2)


def write_slot(arena: np.ndarray, first: int, width: int, codes: np.ndarray) -> None:
    rows = to_planes(codes)[:width].reshape(-1, LANES)
    arena[first : first + len(rows)] = rows


# --- geometry ---


class Place(NamedTuple):
    """Where the elements of a leaf lie."""

    kind: str
    element: np.ndarray  # [tiles, 32, 128]: flat index in the leaf, -1 where padded
    group: np.ndarray  # [tiles, 1, 128]: index of the group in the leaf


def place(shape: tuple[int, ...]) -> Place:
    """The tiles of [rows, columns], groups along the shorter side (ties: along the rows).

    Leading axes make the rows, the others the columns, so that the longer side is shortest (ties:
    more axes in the rows).

    Where padding takes more than 1/8, bands of 32 lie side by side; where 32 does not divide the
    group axis, a group is 32 consecutive elements.
    """
    flat = np.arange(math.prod(shape))
    ways = [flat.reshape(math.prod(shape[:k]), -1) for k in range(1, len(shape))]
    matrix = min(reversed(ways), key=lambda way: max(way.shape), default=flat[None])
    if matrix.shape[1] < matrix.shape[0]:
        matrix = matrix.T
    kind, (groups, lanes) = "tiled", matrix.shape
    padded = math.ceil(groups / GROUP) * GROUP * math.ceil(lanes / LANES) * LANES
    if groups < GROUP or 1 - flat.size / padded > 1 / 8:
        if groups % GROUP == 0:
            kind = "folded"
            matrix = np.concatenate(
                [matrix[i : i + GROUP] for i in range(0, groups, GROUP)], axis=1
            )
        else:
            kind = "flat"
            matrix = np.pad(flat, (0, -flat.size % GROUP), constant_values=-1).reshape(-1, GROUP).T
    groups, lanes = matrix.shape
    elements, indices = [], []
    for first in range(0, lanes, LANES):
        for band in range(math.ceil(groups / GROUP)):
            tile = np.full((GROUP, LANES), -1)
            part = matrix[band * GROUP : (band + 1) * GROUP, first : first + LANES]
            tile[: part.shape[0], : part.shape[1]] = part
            elements.append(tile)
            indices.append(band * lanes + first + np.arange(LANES)[None])
    return Place(kind, np.stack(elements), np.stack(indices))


def to_tiles(x: np.ndarray, where: Place) -> np.ndarray:
    return np.where(where.element < 0, 0, x.reshape(-1)[where.element])


def from_tiles(tiles: np.ndarray, where: Place, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(math.prod(shape), tiles.dtype)
    inside = where.element >= 0
    out[where.element[inside]] = tiles[inside]
    return out.reshape(shape)


# --- noise: Kronecker sequences along the elements, rotated from step to step; coins: a hash ---

GOLDEN, PLASTIC = 0x9E3779B9, 0xC13FA9A9


def hash32(x: np.ndarray | int) -> np.ndarray:
    x = np.asarray(x, np.uint64) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


class Noise(NamedTuple):
    """Uniform on [0, 1), of the first moment's elements on [-1/2, 1/2): per element and per group,
    for the second moment and for the first."""

    nu: np.ndarray
    mu: np.ndarray
    nu_coin: np.ndarray
    mu_coin: np.ndarray


def noise(seed: int, leaf: int, step: int, group: np.ndarray) -> Noise:
    key = int(hash32(seed ^ int(hash32(2 * leaf + 1))))
    rotation = step * GOLDEN
    index = np.asarray(group, object) * GROUP + np.arange(GROUP)[:, None]

    def sequence(start: int) -> np.ndarray:
        """To 24 bits."""
        return ((index * PLASTIC + start) % 2**32 // 2**8).astype(float) / 2**24

    mu = sequence(int(hash32(step ^ key)))
    coins = hash32(group ^ int(hash32(key ^ 0xFFFFFFFF)))
    first, second = (coins + rotation) & 0xFFFFFFFF, ((coins << 16) + rotation) & 0xFFFFFFFF
    return Noise(
        sequence(key + rotation),
        np.where(mu < 0.5, mu, mu - 1),
        (first >> 8) / 2**24,
        (second >> 8) / 2**24,
    )
