"""Chunks of consecutive tiles, read where they lie in a leaf and written there.

A chunk is cut into pieces, rectangles of the leaf's matrix of one shape: all of the chunk, or as
many tiles of a column of tiles as divide both. Where padding is part of one, XLA would begin
earlier: it does, and what is read is moved to its place.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stquant_jax.codecs import Hold
from stquant_jax.storage.layout import Leaf
from stquant_jax.storage.planes import GROUP, LANES


def has_windows(leaf: Leaf) -> bool:
    """Whether the tiles of a leaf are rectangles of a matrix."""
    return leaf.kind == "tiled" or (leaf.kind == "flat" and leaf.size % GROUP == 0)


class Spot(NamedTuple):
    """Where a tile is: int32 scalars, which all leaves' code shares."""

    tile: jax.Array  # of the leaf
    group: jax.Array  # along the group axis, its first element
    lane: jax.Array  # along the lanes

    @classmethod
    def of(cls, tile: jax.Array, bands: jax.Array) -> "Spot":
        """Of a tile of a leaf of so many bands."""
        lane_tile = lax.div(tile, bands)
        return cls(tile, (tile - lane_tile * bands) * GROUP, lane_tile * LANES)


def read(x: jax.Array, leaf: Leaf, spot: Spot, size: int, hold: Hold) -> jax.Array:
    """A chunk of a leaf [*shape] from a tile on that is a multiple of ``size``: [size, 32, 128],
    padding zero."""
    piece = Piece.of(leaf, size)
    if piece.tiles == size:
        return piece.read(x, spot, hold)

    def one(i, chunk):
        new = piece.read(x, piece.spot(spot, i), hold)
        return lax.dynamic_update_slice_in_dim(chunk, new, i * piece.tiles, 0)

    chunk = lax.empty((size, GROUP, LANES), x.dtype)
    return lax.fori_loop(0, size // piece.tiles, one, chunk)


def write(x: jax.Array, leaf: Leaf, spot: Spot, chunk: jax.Array, hold: Hold) -> jax.Array:
    """The leaf with a chunk in it that `read` has read, whatever its dtype."""
    piece, chunk = Piece.of(leaf, len(chunk)), chunk.astype(x.dtype)
    if piece.tiles == len(chunk):
        return piece.write(x, spot, chunk, hold)

    def one(i, x):
        new = lax.dynamic_slice_in_dim(chunk, i * piece.tiles, piece.tiles)
        return piece.write(x, piece.spot(spot, i), new, hold)

    return lax.fori_loop(0, len(chunk) // piece.tiles, one, x)


class Piece(NamedTuple):
    """A rectangle of tiles of a leaf."""

    leaf: Leaf
    bands: int
    lane_tiles: int

    @classmethod
    def of(cls, leaf: Leaf, size: int) -> "Piece":
        """The one that chunks of so many tiles are made of."""
        if size % leaf.bands == 0:
            return cls(leaf, leaf.bands, size // leaf.bands)
        return cls(leaf, math.gcd(size, leaf.bands), 1)

    @property
    def tiles(self) -> int:
        return self.bands * self.lane_tiles

    def spot(self, first: Spot, i: jax.Array) -> Spot:
        """Of the chunk's piece ``i``."""
        return Spot.of(first.tile + i * self.tiles, jnp.int32(self.leaf.bands))

    def read(self, x: jax.Array, spot: Spot, hold: Hold) -> jax.Array:
        x, first = self._seen(x), self._start(spot)
        inside, start = self._inside(x, first)
        window = lax.dynamic_slice(x, start, inside)
        for axis, n in enumerate(self._shape):
            if self._may_end(x, axis):
                window = _pad(window, axis, after=n)
                beyond = first[axis] - start[axis]
                window = lax.dynamic_slice_in_dim(window, beyond, n, axis)
        if self.leaf.transposed:  # held, for a transpose of what lies together costs half as much
            window = hold(window).T
        tiles = window.reshape(self.bands, GROUP, self.lane_tiles, LANES).transpose(2, 0, 1, 3)
        return tiles.reshape(self.tiles, GROUP, LANES)

    def write(self, x: jax.Array, spot: Spot, tiles: jax.Array, hold: Hold) -> jax.Array:
        tiles = tiles.reshape(self.lane_tiles, self.bands, GROUP, LANES).transpose(1, 2, 0, 3)
        window = tiles.reshape(self.bands * GROUP, self.lane_tiles * LANES)
        if self.leaf.transposed:
            window = hold(window.T)
        shape, x, first = x.shape, self._seen(x), self._start(spot)
        inside, start = self._inside(x, first)
        old, kept = lax.dynamic_slice(x, start, inside), jnp.array(False)
        for axis, n in enumerate(inside):
            if self._may_end(x, axis):
                beyond = jnp.minimum(first[axis] - start[axis], n)
                window = _pad(window, axis, before=n)
                window = lax.dynamic_slice_in_dim(window, n - beyond, n, axis)
                kept |= lax.broadcasted_iota(jnp.int32, inside, axis) < beyond
        window = jnp.where(kept, old, window) if kept.ndim else window
        return lax.dynamic_update_slice(x, window, start).reshape(shape)

    @property
    def _shape(self) -> tuple[int, int]:
        """Rows and columns."""
        groups, lanes = self.bands * GROUP, self.lane_tiles * LANES
        return (lanes, groups) if self.leaf.transposed else (groups, lanes)

    def _seen(self, x: jax.Array) -> jax.Array:
        return x.reshape((-1, GROUP) if self.leaf.kind == "flat" else self.leaf.matrix)

    def _start(self, spot: Spot) -> tuple[jax.Array, jax.Array]:
        """Row and column, which may be beyond the end."""
        group, lane = spot.group, spot.lane
        return (lane, group) if self.leaf.transposed else (group, lane)

    def _may_end(self, x: jax.Array, axis: int) -> bool:
        """Whether any piece reaches beyond the end of an axis, or lies there."""
        return bool(x.shape[axis] % self._shape[axis]) or self.leaf.tiles > self.leaf.filled

    def _inside(self, x: jax.Array, first: tuple[jax.Array, jax.Array]):
        """So much of a window as can lie inside, and where it begins then."""
        inside = tuple(min(pair) for pair in zip(self._shape, x.shape, strict=True))
        ends = zip(first, x.shape, inside, strict=True)
        return inside, [jnp.minimum(at, held - n) for at, held, n in ends]


def _pad(x: jax.Array, axis: int, before: int = 0, after: int = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths)
