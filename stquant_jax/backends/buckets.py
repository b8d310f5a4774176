"""Gradients in tiles, those of some leaves at a time, and updates back to where gradients were.

The leaves of a bucket share a buffer, an eighth of all gradients or as large as the largest leaf.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stquant_jax.backends.loops import holder
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.tiling import from_tiles, to_tiles

# So many buckets at most, or twice, and none of less than so many tiles, 4 MB: each is compiled.
MOST, LEAST = 8, 256


@dataclass(frozen=True)
class Buckets:
    """A layout's quantized leaves, divided."""

    layout: Layout

    @cached_property
    def leaves(self) -> list[range]:
        """Of each bucket, by index."""
        tiles = [leaf.tiles for leaf in self.layout.quantized]
        room = max(LEAST, -(-sum(tiles) // MOST), *tiles)
        starts, held = [0], 0
        for i, count in enumerate(tiles):
            if held + count > room:
                starts.append(i)
                held = 0
            held += count
        return [range(*ends) for ends in itertools.pairwise([*starts, len(tiles)])]

    @cached_property
    def first_tile(self) -> list[int]:
        """Of each leaf, in the buffer."""
        first = self.layout.first_tile
        return [first[i] - first[bucket.start] for bucket in self.leaves for i in bucket]

    @property
    def tiles(self) -> int:
        """Of the buffer."""
        quantized = self.layout.quantized
        return max(sum(quantized[i].tiles for i in bucket) for bucket in self.leaves)

    def ends(self, bucket: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A bucket's first leaf, and the one after its last."""
        starts, stops = zip(*((x.start, x.stop) for x in self.leaves), strict=True)
        return jnp.array(starts, jnp.int32)[bucket], jnp.array(stops, jnp.int32)[bucket]

    def load(self, bucket: jax.Array, data: jax.Array, grads: list[jax.Array]) -> jax.Array:
        """The buffer, [tiles, 32, 128], with a bucket's gradients."""

        def lay(leaves, now, data):
            for i in leaves:
                # Or XLA converts and lays out the gradients of all buckets before the first.
                g = holder(now)(grads[i]).astype(data.dtype)
                tiles = to_tiles(g, self.layout.quantized[i])
                data = lax.dynamic_update_slice_in_dim(data, tiles, self.first_tile[i], 0)
            return data

        for i, leaves in enumerate(self.leaves):
            data = _in_place_if(bucket == i, partial(lay, leaves), data)
        return data

    def unload(
        self,
        bucket: jax.Array,
        out: list[jax.Array],
        data: jax.Array,
        finish: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> list[jax.Array]:
        """``out``, an array per leaf, with ``finish(index, update, old, now)`` in place of those of
        a bucket, whose updates are in the buffer; ``now`` holds, and XLA does not know it."""

        def take(leaves, now, old):
            taken = []
            for i, x in zip(leaves, old, strict=True):
                leaf, first = self.layout.quantized[i], self.first_tile[i]
                new = finish(i, from_tiles(data[first : first + leaf.tiles], leaf), x, now)
                # Or XLA has the array in the order of tiles in memory, and copies it there before.
                taken.append(jnp.where(now, new, x))
            return taken

        out = list(out)
        for i, leaves in enumerate(self.leaves):
            here = slice(leaves.start, leaves.stop)
            out[here] = _in_place_if(bucket == i, partial(take, leaves), out[here])
        return out


def _in_place_if(now: jax.Array, f: Callable[[jax.Array, Any], Any], x: Any) -> Any:
    """``f(now, x)`` where ``now`` holds, which it is told, or else ``x``: in the same memory.

    It is a loop of one trip or none, since XLA copies what a branch of a conditional hands through.
    """
    return lax.fori_loop(0, jnp.asarray(now, jnp.int32), lambda trip, x: f(trip == 0, x), x)
