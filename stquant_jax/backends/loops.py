"""What the loops of the XLA backend share."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax.codecs import Hold
from stquant_jax.storage.layout import Layout, Leaf
from stquant_jax.storage.places import Place, places_of

# Tiles computed together: enough to amortise an iteration of the loop, few enough for the cache.
CHUNK = 8
# The same for a whole update, where XLA divides its operations among cores if they are large
# enough.
FEWEST, BEST, MOST = 16, 24, 32


class Table(NamedTuple):
    """Quantized leaves by a traced index: their geometry, int32[leaves] tiles and first tiles."""

    places: Place
    tiles: jax.Array
    first: jax.Array

    @classmethod
    def of(cls, layout: Layout) -> "Table":
        columns = layout.tiles_of_leaves, layout.first_tile
        tiles, first = (jnp.asarray(np.array(x, np.int32)) for x in columns)
        return cls(places_of(layout.quantized), tiles, first)

    def place(self, leaf: jax.Array) -> Place:
        return jax.tree.map(lambda x: x if isinstance(x, int) else x[leaf], self.places)


def put(buffer: jax.Array, x: jax.Array, at: jax.Array) -> jax.Array:
    """Write ``x`` into a buffer of any dtype, from row ``at`` on."""
    return lax.dynamic_update_slice_in_dim(buffer, x.astype(buffer.dtype), at, 0)


def holder(always: jax.Array) -> Hold:
    """A function that keeps a value in memory: a branch that is always taken, though only at run
    time it is known to be.

    XLA's fusion computes cheap values again for every use, here whole chains of them, and reads a
    slice of a buffer after the buffer was written, for which it has to copy the buffer. It does
    neither across a conditional. The other branch returns the value too, which costs no code; the
    barrier keeps XLA from finding both alike.
    """
    return lambda x: lax.cond(always, lambda x: x, lax.optimization_barrier, x)


def in_place_if(now: jax.Array, f: Callable[[jax.Array, Any], Any], x: Any) -> Any:
    """``f(now, x)`` where ``now`` holds, which it is told, or else ``x``: in the same memory.

    It is a loop of one trip or none, since XLA copies what a branch of a conditional hands through.
    """

    def once(carry):
        now, x = carry
        return jnp.array(False), f(now, x)

    return lax.while_loop(lambda carry: carry[0], once, (now, x))[1]


def in_place_at(
    index: jax.Array, f: Callable[[int, jax.Array], jax.Array], xs: list[jax.Array]
) -> list[jax.Array]:
    """``xs`` with ``f(index, x)`` in place of the x at this index, or of none; all in their memory.

    A loop that does not turn costs a microsecond, so they are asked in two steps.
    """
    room = math.isqrt(len(xs)) + 1

    def ask(first, now, part):
        return [
            in_place_if(now & (index == i), lambda _, x, i=i: f(i, x), x)
            for i, x in enumerate(part, first)
        ]

    out = []
    for first in range(0, len(xs), room):
        now = (index >= first) & (index < first + room)
        out += in_place_if(now, partial(ask, first), xs[first : first + room])
    return out


def over_tiles(
    tiles: jax.Array, layout: Layout, body: Callable[[int, jax.Array, Any], Any], carry: Any
) -> Any:
    """``body(size, first tile, carry)`` over ``tiles`` tiles (traced), those of one of the layout's
    leaves or none, in chunks, then one by one.

    Where chunks leave no rest of any leaf, there is one body to compile.
    """
    lengths = layout.tiles_of_leaves
    chunk = chunk_of(layout)
    whole = tiles // chunk
    carry = lax.fori_loop(0, whole, lambda i, c: body(chunk, i * chunk, c), carry)
    if all(length % chunk == 0 for length in lengths):
        return carry
    return lax.fori_loop(whole * chunk, tiles, lambda i, c: body(1, i, c), carry)


def chunk_of(layout: Layout) -> int:
    """Tiles of a chunk: as many as leave the least rest of leaves, and of their columns of tiles.
    Where all leaves are shorter, as many as divide them all."""
    leaves = layout.quantized
    if max(layout.tiles_of_leaves) < FEWEST:
        return math.gcd(*layout.tiles_of_leaves)

    def cost(size):
        rest = sum(leaf.tiles % size for leaf in leaves)
        cut = sum(leaf.tiles for leaf in leaves if leaf.bands % size and size % leaf.bands)
        return rest + cut, abs(size - BEST)

    return min(range(FEWEST, MOST + 1), key=cost)


def over_leaf(
    leaf: Leaf, body: Callable[[int, jax.Array, Any], Any], carry: Any, *, again: bool = True
) -> Any:
    """``body(size, first tile, carry)`` over all tiles of a leaf, in chunks of one size, so that
    there is one body to compile.

    With ``again`` the last chunk may begin among those of the one before: the body does to them the
    same again. Without, chunks are as many tiles as divide the leaf's.
    """
    size = min(CHUNK, leaf.tiles)
    if not again:
        size = max(n for n in range(1, size + 1) if leaf.tiles % n == 0)
    chunks, last = -(-leaf.tiles // size), leaf.tiles - size
    return lax.fori_loop(0, chunks, lambda i, c: body(size, jnp.minimum(i * size, last), c), carry)
