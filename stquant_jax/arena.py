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
SCALE_DTYPES = {"mu": jnp.uint8, "nu": jnp.uint16}
TILE_SCALE_BYTES = LANES * (1 + 2) + GROUP  # a scale of mu and of nu per group, and nu's rows


def slot_tiles(layout: Layout) -> np.ndarray:
    """int32[slots]: tiles of each slot, which are also the rows of one bit of width."""
    return np.repeat(np.array([leaf.tiles for leaf in layout.quantized], np.int32), len(MOMENTS))


def slot_names(layout: Layout) -> tuple[str, ...]:
    return tuple(f"{leaf.path}/{moment}" for leaf in layout.quantized for moment in MOMENTS)


def offsets(widths: jax.Array, layout: Layout) -> jax.Array:
    """int32[slots]: first row of each slot."""
    rows = widths * slot_tiles(layout)
    return jnp.cumsum(rows) - rows


def schedule_bytes(layout: Layout) -> int:
    """Bytes of the step count and of each slot's width and window."""
    return 4 + 2 * 4 * len(slot_tiles(layout))


def fixed_bytes(layout: Layout) -> int:
    """Bytes of the state beside the arena: scales, exact leaves, schedule."""
    return (
        layout.tiles * TILE_SCALE_BYTES
        + layout.exact_size * 4 * len(MOMENTS)
        + schedule_bytes(layout)
    )


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
