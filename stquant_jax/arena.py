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

from stquant_jax.layout import Layout
from stquant_jax.planes import GROUP, LANES, PLANES

MOMENTS = ("mu", "nu")
ROW_BYTES = 4 * LANES
_MOVED_ROWS = 64  # at once: 32 KiB
SCALE_DTYPES = {"mu": jnp.uint8, "nu": jnp.uint16}
TILE_SCALE_BYTES = LANES * (1 + 2) + GROUP  # a scale of mu and of nu per group, and nu's rows


def slot_tiles(layout: Layout) -> np.ndarray:
    """int32[slots]: tiles of each slot, which are also the rows of one bit of width."""
    return np.repeat(np.array([leaf.tiles for leaf in layout.quantized], np.int32), len(MOMENTS))


def offsets(widths: jax.Array, layout: Layout) -> jax.Array:
    """int32[slots]: first row of each slot."""
    rows = widths * slot_tiles(layout)
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
    return layout.tiles * TILE_SCALE_BYTES + layout.exact_size * 4 * len(MOMENTS)


def reference_bytes(layout: Layout) -> int:
    """Bytes of `optax.scale_by_adam`'s float32 state for the same parameters."""
    return 4 + layout.size * 4 * len(MOMENTS)


class Packed(NamedTuple):
    """All that is stored of the quantized leaves."""

    arena: jax.Array  # uint32[rows, 128]
    mu_scale: jax.Array  # uint8[tiles, 128]
    nu_scale: jax.Array  # uint16[tiles, 128]
    nu_row: jax.Array  # uint8[tiles * 32]


class Span(NamedTuple):
    """Consecutive tiles of a slot in the arena; traced scalars."""

    first: jax.Array  # row of plane 0 of the first tile
    width: jax.Array  # planes
    stride: jax.Array  # rows from plane to plane


def read_planes(arena: jax.Array, span: Span, tiles: int) -> jax.Array:
    """uint32[8, tiles, 128]: the planes of consecutive tiles, zero above the width."""

    def plane(p):
        # What is not stored is not fetched: the first plane is read again.
        row = span.first + jnp.where(p < span.width, p, 0) * span.stride
        return jnp.where(p < span.width, lax.dynamic_slice(arena, (row, 0), (tiles, LANES)), 0)

    return jnp.stack([plane(p) for p in range(PLANES)])


def write_planes(arena: jax.Array, spans: Sequence[Span], planes: Sequence[jax.Array]) -> jax.Array:
    """Write each span's planes uint32[8, tiles, 128] up to its width, where `read_planes` reads
    them.

    Widths are traced but the writes are not counted by them: one that has nothing to store repeats
    the very first, which is why the first span must have a width of at least 1. That is faster than
    a loop and stays in place.
    """
    home, home_words = spans[0].first, planes[0][0]
    for span, words in zip(spans, planes, strict=True):
        for p in range(PLANES):
            stored = p < span.width
            row = jnp.where(stored, span.first + p * span.stride, home)
            arena = lax.dynamic_update_slice(
                arena, jnp.where(stored, words[p], home_words), (row, 0)
            )
    return arena
