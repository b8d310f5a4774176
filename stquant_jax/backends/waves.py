"""Gradients in tiles, those of some leaves at a time, and updates back to where gradients were.

The leaves of a wave share a buffer, an eighth of all gradients or as large as the largest leaf.
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
from stquant_jax.layout import Layout, from_tiles, to_tiles

# So many waves at most, or twice, and none of less than so many tiles, 4 MB: each is compiled.
WAVES, LEAST = 8, 256


@dataclass(frozen=True)
class Waves:
    """A layout's quantized leaves, divided."""

    layout: Layout

    @cached_property
    def leaves(self) -> list[range]:
        """Of each wave, by index."""
        tiles = [leaf.tiles for leaf in self.layout.quantized]
        room = max(LEAST, -(-sum(tiles) // WAVES), *tiles)
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
        return [first[i] - first[wave.start] for wave in self.leaves for i in wave]

    @property
    def tiles(self) -> int:
        """Of the buffer."""
        quantized = self.layout.quantized
        return max(sum(quantized[i].tiles for i in wave) for wave in self.leaves)

    def ends(self, wave: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A wave's first leaf, and the one after its last."""
        starts, stops = zip(*((x.start, x.stop) for x in self.leaves), strict=True)
        return jnp.array(starts, jnp.int32)[wave], jnp.array(stops, jnp.int32)[wave]

    def load(self, wave: jax.Array, data: jax.Array, grads: list[jax.Array]) -> jax.Array:
        """The buffer, [tiles, 32, 128], with a wave's gradients."""

        def lay(leaves, now, data):
            for i in leaves:
                # Or XLA converts and lays out the gradients of all waves before the first of them.
                g = holder(now)(grads[i]).astype(data.dtype)
                tiles = to_tiles(g, self.layout.quantized[i])
                data = lax.dynamic_update_slice_in_dim(data, tiles, self.first_tile[i], 0)
            return data

        for i, leaves in enumerate(self.leaves):
            data = _in_place_if(wave == i, partial(lay, leaves), data)
        return data

    def unload(
        self,
        wave: jax.Array,
        out: list[jax.Array],
        data: jax.Array,
        finish: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> list[jax.Array]:
        """``out``, an array per leaf, with ``finish(index, update, old, now)`` in place of those of
        a wave, whose updates are in the buffer; ``now`` holds, and XLA does not know it."""

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
            out[here] = _in_place_if(wave == i, partial(take, leaves), out[here])
        return out


def _in_place_if(now: jax.Array, f: Callable[[jax.Array, Any], Any], x: Any) -> Any:
    """``f(now, x)`` where ``now`` holds, which it is told, or else ``x``: in the same memory.

    It is a loop of one turn or none, since XLA copies what a branch of a conditional hands through.
    """
    return lax.fori_loop(0, now.astype(jnp.int32), lambda turn, x: f(turn == 0, x), x)
