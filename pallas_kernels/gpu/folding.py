"""Reductions over the 32 elements of a group, each thread its own group, element by element.

A scale must not depend on the backend, so sums are made in the order of `codecs.group_sum`, by
halves: first x[i] + x[i + 16], then 8, 4, 2, 1 apart. With r the low three bits of i that is

    t[r] = (x[r] + x[r + 16]) + (x[r + 8] + x[r + 24]),
    ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7])),

three nested loops of two over the bits of r, the lowest outermost. The four elements of an r are
independent of one another, which is what fills the pipelines, and they are the four bytes of one
word of codes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

QUARTERS = (0, 1, 2, 3)  # elements r, r + 8, r + 16, r + 24
_WORDS = 8

Values = tuple[jax.Array, ...]
Combine = Callable[[Any, Any], Any]


def fold(
    of_word: Callable[[jax.Array], Sequence[Values]], combines: Sequence[Combine], start: Values
) -> Values:
    """Reduce what ``of_word(r)`` gives of elements r, r + 8, r + 16 and r + 24, for r in 0..7.

    Args:
      of_word: of a traced r, a tuple of vectors for each of the four elements. What it writes must
        not depend on the order of the words.
      combines: one binary function for each member of the tuple.
      start: its neutral elements.
    """

    def combine(a: Values, b: Values) -> Values:
        return tuple(f(x, y) for f, x, y in zip(combines, a, b, strict=True))

    def level(bit: int, r: jax.Array) -> Values:
        if bit == _WORDS:
            x = of_word(r)
            return combine(combine(x[0], x[2]), combine(x[1], x[3]))
        bits = jnp.int32(0), jnp.int32(2)
        return lax.fori_loop(*bits, lambda j, c: combine(c, level(2 * bit, r + bit * j)), start)

    return level(1, jnp.int32(0))
