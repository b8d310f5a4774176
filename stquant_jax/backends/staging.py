"""Leaves that are not read where they lie: laid out in tiles, some at a time, and back.

The leaves of a bucket share a buffer.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
from jax import lax

from stquant_jax.backends.loops import chunk_of, holder, in_place_if
from stquant_jax.backends.windows import has_windows
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.planes import GROUP, LANES
from stquant_jax.storage.tiling import from_tiles, to_tiles

# Smaller leaves are not worth the code that reads and writes their windows.
LEAST = 64
# Tiles of a bucket: 4 MB, or as many as the largest leaf in it has.
ROOM = 256

Small = dict[int, jax.Array]  # leaves by their index


@dataclass(frozen=True)
class Staging:
    """A layout's quantized leaves, divided."""

    layout: Layout

    @cached_property
    def direct(self) -> list[int]:
        """Those that are read where they lie, by index."""
        leaves = self.layout.quantized
        return [i for i, x in enumerate(leaves) if has_windows(x) and x.tiles >= LEAST]

    @cached_property
    def buckets(self) -> list[list[int]]:
        """The others, by bucket: those of one shape side by side, to be laid out together."""
        leaves, direct = self.layout.quantized, set(self.direct)
        small = [i for i in range(len(leaves)) if i not in direct]
        found, room = [], 0
        for i in sorted(small, key=lambda i: (leaves[i].shape, str(leaves[i].dtype))):
            if leaves[i].tiles > room:
                found.append([])
                room = max(ROOM, leaves[i].tiles)
            found[-1].append(i)
            room -= leaves[i].tiles
        return found

    @cached_property
    def first_tile(self) -> dict[int, int]:
        """Of each leaf in a bucket, in the buffer."""
        first = {}
        for bucket in self.buckets:
            at = 0
            for i in bucket:
                first[i] = at
                at += self.layout.quantized[i].tiles
        return first

    @property
    def tiles(self) -> int:
        """Of the buffer: those of a bucket, and no fewer than a chunk has."""
        tiles = self.layout.tiles_of_leaves
        return max([chunk_of(self.layout), *(sum(tiles[i] for i in b) for b in self.buckets)])

    def buffer(self) -> jax.Array:
        return lax.empty((self.tiles, GROUP, LANES), jnp.float32)

    def load(self, bucket: jax.Array, data: jax.Array, leaves: Small) -> jax.Array:
        """The buffer with a bucket's leaves; unchanged where there is no such bucket."""

        def lay(which, now, data):
            hold = holder(now)
            for like in self._alike(which):
                # Held, or XLA converts and lays out the leaves of all buckets before the first.
                x = jnp.stack(hold([leaves[i] for i in like])).astype(data.dtype)
                tiles = jax.vmap(partial(to_tiles, leaf=self.layout.quantized[like[0]]))(x)
                tiles = tiles.reshape(-1, *data.shape[1:])
                data = lax.dynamic_update_slice_in_dim(data, tiles, self.first_tile[like[0]], 0)
            return data

        for n, which in enumerate(self.buckets):
            data = in_place_if(bucket == n, partial(lay, which), data)
        return data

    def unload(self, bucket: jax.Array, leaves: Small, data: jax.Array) -> Small:
        """The leaves with those of a bucket taken out of the buffer."""

        def take(which, now, old):
            hold, new = holder(now), {}
            for like in self._alike(which):
                leaf, first = self.layout.quantized[like[0]], self.first_tile[like[0]]
                tiles = data[first : first + len(like) * leaf.tiles]
                tiles = tiles.reshape(len(like), leaf.tiles, *tiles.shape[1:])
                x = jax.vmap(partial(from_tiles, leaf=leaf))(tiles)
                # Or XLA has leaves in the order of tiles in memory, and copies them there before.
                x = hold(x.astype(old[like[0]].dtype))
                new |= {i: x[n] for n, i in enumerate(like)}
            return new

        for n, which in enumerate(self.buckets):
            leaves |= in_place_if(bucket == n, partial(take, which), {i: leaves[i] for i in which})
        return leaves

    def _alike(self, which: list[int]) -> list[list[int]]:
        """Leaves of a bucket, by shape and dtype."""
        leaves = self.layout.quantized
        groups = itertools.groupby(which, lambda i: (leaves[i].shape, leaves[i].dtype))
        return [list(group) for _, group in groups]
