"""Where the elements of a tile lie in their leaf: what noise is seeded by, and what is padding."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax.storage.indexing import wrapped
from stquant_jax.storage.layout import Cut, Layout, Leaf
from stquant_jax.storage.planes import GROUP, LANES, TILE

Number = Any  # an int, or an int32 array


class Place(NamedTuple):
    """A leaf's geometry as numbers, so that a traced leaf index can pick one out of a table.

    What a group's index is made of is kept modulo 2**32: it only seeds noise, which may be the same
    in two groups 2**32 apart. What is padding has to be right in the largest leaf, so it is told by
    whole tiles, of which 2**40 elements have 2**28.
    """

    bands: Number
    lanes: Number  # of the whole leaf, where this is a part of it
    full: Number  # bands without padding; lane tiles, where bands are folded or flat
    rest: Number  # elements of the group axis beyond them; of the leaf, where folded or flat
    flat: Number
    # Of a part: runs of bands and of lanes, and what lies between them; see `Cut`.
    band_run: Number
    band_gap: Number
    tile_run: Number
    lane_gap: Number
    start: Number  # its first group in the whole leaf

    @classmethod
    def of(cls, leaf: Leaf, start: Number = 0) -> "Place":
        """Of a leaf, or of a part of one that starts at this group."""
        flat = leaf.kind != "tiled"
        full, rest = divmod(leaf.size, TILE) if flat else divmod(leaf.groups_along, GROUP)
        cut = leaf.cut
        lanes, runs = leaf.lanes_along, (1, 0, 1, 0)
        if cut is not None and cut.lanes:  # else groups are consecutive
            lanes, runs = cut.lanes, (cut.band_run, cut.band_gap, cut.tile_run, cut.lane_gap)
        numbers = leaf.bands, lanes, full, rest, int(flat), *runs, start
        return cls(*(wrapped(x) if isinstance(x, int) else x for x in numbers))

    def of_tiles(self, tile: jax.Array, size: int, ragged: bool) -> tuple[jax.Array, jax.Array]:
        """`of_each` of consecutive tiles."""
        return self.of_each(tile + jnp.arange(size, dtype=jnp.int32)[:, None, None], ragged)

    def of_each(self, tiles: jax.Array, ragged: bool) -> tuple[jax.Array, jax.Array]:
        """Of tiles int32[size, 1, 1]: group index uint32[size, 1, 128] in the leaf, and 1 for
        elements, 0 for padding, float32[size, 32, 128].

        Where no leaf is ragged the latter is a constant: groups are either full or, at the end of
        the lanes, all padding, which reads as a group of zeros.
        """
        group, left = self.of_lanes(tiles, jnp.arange(LANES, dtype=jnp.int32)[None, None])
        if not ragged:
            return group, jnp.ones((1, GROUP, 1), jnp.float32)
        return group, (jnp.arange(GROUP, dtype=jnp.int32)[None, :, None] < left).astype(jnp.float32)

    def of_lanes(self, tile: jax.Array, lane: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Group index uint32, modulo 2**32, of lanes 0..127 of tiles int32, any shapes that
        broadcast, and how many elements it has, int32: 32 or more if it is full, 0 or less if it is
        empty."""
        lane_tile = _divide(tile, self.bands)
        band = tile - lane_tile * self.bands
        # Flat, a group is 32 consecutive elements, so it is the last lane that may be cut short,
        # not the last band.
        flat = self.flat == 1
        ahead = self.full - jnp.where(flat, lane_tile, band)
        left = jnp.clip(ahead, -1, 1) * TILE + self.rest - GROUP * jnp.where(flat, lane, 0)
        lane = lane_tile * LANES + lane
        if not _is_zero(self.band_gap):
            band += _divide(band, self.band_run) * self.band_gap
        if not _is_zero(self.lane_gap):
            lane += _divide(lane_tile, self.tile_run) * self.lane_gap
        return (self.start + band * self.lanes + lane).astype(jnp.uint32), left


def places_of(leaves: Sequence[Leaf]) -> Place:
    """A table: int32[leaves] in every field. In `jax.shard_map` where leaves are parts."""
    columns = zip(*(Place.of(leaf) for leaf in leaves), strict=True)
    table = Place(*(np.array(column, np.int32) for column in columns))
    # Gaps are static where there are none: nothing is divided then.
    static = {name: 0 for name in ("band_gap", "lane_gap") if not getattr(table, name).any()}
    table = jax.tree.map(jnp.asarray, table)
    return table._replace(start=starts_of(leaves), **static)


def starts_of(leaves: Sequence[Leaf]) -> jax.Array:
    """int32[leaves]: the first group of each leaf's part, on the device that asks."""
    return jnp.stack([jnp.asarray(start_of(leaf.cut), jnp.int32) for leaf in leaves])


def start_of(cut: Cut | None) -> Number:
    """What the index of the part adds to each group's, modulo 2**32."""
    if cut is None or not cut.steps:
        return 0
    return sum(
        lax.axis_index(names) * wrapped(step)
        for names, step in zip(cut.axes, cut.steps, strict=True)
        if names
    )


def counted_leaves(layout: Layout) -> jax.Array | None:
    """bool[leaves]: of the devices that have the same part of a leaf, one is to count it. None if
    all parts differ."""
    replicated = [
        [name for name in layout.axes if not any(name in names for names in leaf.axes)]
        for leaf in layout.quantized
    ]
    if not any(replicated):
        return None
    first = {name: lax.axis_index(name) == 0 for name in layout.axes}
    counts = [
        functools.reduce(jnp.logical_and, [first[name] for name in names], jnp.array(True))
        for names in replicated
    ]
    return jnp.stack(counts)


def exact_elements(leaves: Sequence[Leaf]) -> jax.Array:
    """uint32[size]: the index of each element of the exact leaves, one leaf after the other, among
    those of all devices, modulo 2**32: it only seeds noise."""
    parts, first = [jnp.zeros((0,), jnp.uint32)], 0
    for leaf in leaves:
        whole = leaf.whole.shape
        index = jnp.uint32(first % 2**32)
        for axis, size in enumerate(leaf.shape):
            here = lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            if leaf.axes[axis]:
                here += jnp.uint32(lax.axis_index(leaf.axes[axis])) * jnp.uint32(size % 2**32)
            index += here * jnp.uint32(math.prod(whole[axis + 1 :]) % 2**32)
        parts.append(jnp.broadcast_to(index, leaf.shape).reshape(-1))
        first += math.prod(whole)
    return jnp.concatenate(parts)


def _divide(a: jax.Array, b: Number) -> jax.Array:
    """Both are positive."""
    return lax.div(a, jnp.broadcast_to(jnp.asarray(b, jnp.int32), a.shape))


def _is_zero(x: Number) -> bool:
    return isinstance(x, int) and x == 0
