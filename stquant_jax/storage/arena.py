"""The arena: planes of all slots in one uint32[rows, 128], and the plan that says where each slot
lies.

A slot is (leaf, moment); slots are ordered leaf by leaf, mu before nu. A slot of T tiles and width
b owns b * T consecutive rows, plane-major: plane p of tile t is row ``offset + p * T + t``. Offsets
are the cumulative sum of width x tiles and are stored nowhere. XLA wants static shapes, so the
number of rows is fixed by the budget and widths move inside it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax.storage.indexing import indexed
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.planes import GROUP, LANES, PLANES

MOMENTS = ("mu", "nu")
ROW_BYTES = 4 * LANES
EXACT_BYTES = 4 * len(MOMENTS)  # of an element that is not quantized
_MOVED_ROWS = 64  # at once: 32 KiB
SCALE_DTYPES = {"mu": jnp.uint8, "nu": jnp.uint16}
TILE_SCALE_BYTES = LANES * (1 + 2) + GROUP  # a scale of mu and of nu per group, and nu's rows


def slot_tiles(layout: Layout) -> np.ndarray:
    """int32[slots]: tiles of each slot, which are also the rows of one bit of width."""
    return np.repeat(np.array(layout.tiles_of_leaves, np.int32), len(MOMENTS))


def offsets(widths: jax.Array, layout: Layout) -> jax.Array:
    """int32[slots]: first row of each slot, on one device."""
    rows = indexed(widths, layout.tiles) * slot_tiles(layout)
    return jnp.cumsum(rows) - rows


def move_rows(arena: jax.Array, first: jax.Array, to: jax.Array, count: jax.Array) -> jax.Array:
    """Move rows [first, first + count) to ``to`` in place; the ranges may overlap.

    Traced trip counts and a signed step, no branch: XLA would copy the arena for one. Moving down,
    blocks go from the front, then the rest; moving up, the rest first, then blocks from the back.
    """
    block = min(_MOVED_ROWS, arena.shape[0])
    down = to < first
    count = jnp.where(to == first, 0, count)
    blocks = count // block
    rest = count - blocks * block

    def copy(arena, row, size):
        rows = lax.dynamic_slice_in_dim(arena, first + row, size)
        return lax.dynamic_update_slice_in_dim(arena, rows, to + row, 0)

    def ahead(i, arena):
        return copy(arena, i * block, block)

    def back(i, arena):
        return copy(arena, (blocks - 1 - i) * block, block)

    def single(i, arena):
        return copy(arena, blocks * block + jnp.where(down, i, rest - 1 - i), 1)

    arena = lax.fori_loop(0, jnp.where(down, blocks, 0), ahead, arena)
    arena = lax.fori_loop(0, rest, single, arena)
    return lax.fori_loop(0, jnp.where(down, 0, blocks), back, arena)


def fixed_bytes(layout: Layout) -> int:
    """Bytes of what is stored beside the arena, whatever the widths: scales and exact leaves."""
    return layout.tiles * TILE_SCALE_BYTES + layout.exact_size * EXACT_BYTES


def reference_bytes(layout: Layout) -> int:
    """Bytes of `optax.scale_by_adam`'s float32 state for the same parameters."""
    return 4 + layout.size * EXACT_BYTES


class Packed(NamedTuple):
    """All that is stored of the quantized leaves."""

    arena: jax.Array  # uint32[rows, 128]
    mu_scale: jax.Array  # uint8[tiles, 128]
    nu_scale: jax.Array  # uint16[tiles, 128]
    nu_row: jax.Array  # uint8[tiles * 32]


NOWHERE = 2**30  # no array has such a row, nor one above


def gather_rows(x: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of these indices, int32 of any shape; zero where there is none."""
    return x.at[at].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def scatter_rows(
    x: jax.Array, at: jax.Array, rows: jax.Array, *, unique: bool = False
) -> jax.Array:
    """``x`` with rows of these indices; dropped where there is none. With ``unique`` all indices
    differ, those of no row too."""
    rows, to = rows.astype(x.dtype), x.at[at]
    return to.set(rows, mode="drop", unique_indices=unique, wrap_negative_indices=False)


class Span(NamedTuple):
    """Consecutive tiles of a slot in the arena; traced scalars."""

    first: jax.Array  # row of plane 0 of the first tile
    width: jax.Array  # planes
    stride: jax.Array  # rows from plane to plane


def read_planes(arena: jax.Array, span: Span, tiles: int) -> jax.Array:
    """uint32[8, tiles, 128]: the planes of consecutive tiles, zero above the width."""

    # As vectors, for every scalar that XLA moves out of a loop is a kernel to compile.
    index = jnp.arange(PLANES, dtype=jnp.int32)
    stored = index < span.width
    # What is not stored is not fetched: the first plane is read again.
    row = span.first + jnp.where(stored, index, 0) * span.stride
    read = [lax.dynamic_slice(arena, (row[p], 0), (tiles, LANES)) for p in range(PLANES)]
    return jnp.where(stored[:, None, None], jnp.stack(read), 0)


def write_planes(arena: jax.Array, spans: Sequence[Span], planes: Sequence[jax.Array]) -> jax.Array:
    """Write each span's planes uint32[8, tiles, 128] up to its width, where `read_planes` reads
    them.

    Widths are traced but the writes are not counted by them: one that has nothing to store repeats
    the very first, which is why the first span must have a width of at least 1. That is faster than
    a loop and stays in place.
    """
    home, home_words = spans[0].first, planes[0][0]
    index = jnp.arange(PLANES, dtype=jnp.int32)
    for span, words in zip(spans, planes, strict=True):
        stored = index < span.width
        row = jnp.where(stored, span.first + index * span.stride, home)
        words = jnp.where(stored[:, None, None], words, home_words)
        for p in range(PLANES):
            arena = lax.dynamic_update_slice(arena, words[p], (row[p], 0))
    return arena
