"""What the loops of the XLA backend share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stquant_jax.codecs import Hold

# Tiles computed together: enough to amortise an iteration of the loop, few enough for the cache.
CHUNK = 8


def holder(always: jax.Array) -> Hold:
    """A function that keeps a value in memory: a branch that is always taken, though only at run
    time it is known to be.

    XLA's fusion computes cheap values again for every use, here whole chains of them, and reads a
    slice of a buffer after the buffer was written, for which it has to copy the buffer. It does
    neither across a conditional.
    """
    return lambda x: lax.cond(always, lambda x: x, lambda x: jax.tree.map(jnp.zeros_like, x), x)


def over_tiles(
    tiles: jax.Array, most: int, body: Callable[[int, jax.Array, Any], Any], carry: Any
) -> Any:
    """``body(size, first tile, carry)`` over ``tiles`` tiles (traced) in chunks, then one by one.

    ``most`` is the number of tiles there are in all: a loop that never runs is traced all the same.
    """
    chunk = min(CHUNK, most)
    whole = tiles // chunk
    carry = lax.fori_loop(0, whole, lambda i, c: body(chunk, i * chunk, c), carry)
    return lax.fori_loop(whole * chunk, tiles, lambda i, c: body(1, i, c), carry)
