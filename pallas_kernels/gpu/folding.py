"""Reductions: of a group, which is a thread's own, and of all rows of a tile, over its lanes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.gpu.lanes import meet, vector
from stquant_jax.storage.planes import GROUP, LANES

QUARTERS = (0, 1, 2, 3)  # elements r, r + 8, r + 16, r + 24
_WORDS = 8
# Of a block whose rows are summed: [32, 4, 33], where lane l is at [:, l // 32, l % 32]. The
# thread that owns lane l finds it there, and so does a thread that owns a quarter of a row: neither
# reads a bank of shared memory that another one of its warp reads.
BLOCK = GROUP, 4, LANES // 4 + 1
# Where partial sums are exchanged.
PARTS = LANES, 4

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

    def step(r: jax.Array, so_far: Values) -> Values:
        x = of_word(r)
        return combine(so_far, combine(combine(x[0], x[2]), combine(x[1], x[3])))

    return lax.fori_loop(0, _WORDS, step, start)


def read(block: Any, i: jax.Array | int) -> jax.Array:
    """Row i of a `BLOCK`, [128]."""
    return vector(block[i, :, pl.ds(0, LANES // 4)].reshape(LANES))


def write(block: Any, i: jax.Array | int, x: jax.Array) -> None:
    block[i, :, pl.ds(0, LANES // 4)] = x.reshape(4, LANES // 4)


def sums_of_rows(blocks: Sequence[Any], parts: Sequence[Any]) -> list[jax.Array]:
    """Sums over the lanes: of row i in lane i of a vector, whose other lanes hold anything.

    A sum of one row over all threads keeps each of them busy; here every thread adds a quarter of a
    row, and those that come of it are exchanged once.

    Args:
      blocks: references to float32 `BLOCK`s; all threads have met since they were written.
      parts: for each a reference to float32 `PARTS`.
    """

    def add(j, sums):
        return [s + vector(x[:, :, j].reshape(LANES)) for s, x in zip(sums, blocks, strict=True)]

    sums = lax.fori_loop(0, LANES // 4, add, [vector(0.0)] * len(blocks))
    for x, part in zip(sums, parts, strict=True):
        part[pl.ds(0, GROUP), :] = x.reshape(GROUP, 4)
    meet()
    told = [(p[:, 0] + p[:, 1]) + (p[:, 2] + p[:, 3]) for p in parts]
    meet()
    return told
