"""The arena: planes of all slots in one uint32[rows, 128], and the plan that says where each slot lies.

A slot is (leaf, moment); slots are ordered leaf by leaf, mu before nu. A slot of T tiles and width b owns b * T consecutive rows,
plane-major: plane p of tile t is row ``offset + p * T + t``. Offsets are the cumulative sum of width x tiles and are stored
nowhere. XLA wants static shapes, so the number of rows is fixed by the budget and widths move inside it.
"""

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
    return layout.tiles * TILE_SCALE_BYTES + layout.exact_size * 4 * len(MOMENTS) + schedule_bytes(layout)


def reference_bytes(layout: Layout) -> int:
    """Bytes of `optax.scale_by_adam`'s float32 state for the same parameters."""
    return 4 + layout.size * 4 * len(MOMENTS)


def read_planes(arena: jax.Array, first: jax.Array, width: jax.Array, stride: jax.Array, tiles: int) -> jax.Array:
    """uint32[8, tiles, 128]: the planes of consecutive tiles, zero above the width.

    ``first`` is the row of plane 0 of the first tile, ``stride`` the rows from plane to plane. The trip count is traced:
    what is not stored is not read.
    """

    def read(p, planes):
        rows = lax.dynamic_slice(arena, (first + p * stride, 0), (tiles, LANES))
        return lax.dynamic_update_slice(planes, rows[None], (p, 0, 0))

    return lax.fori_loop(0, width, read, jnp.zeros((PLANES, tiles, LANES), jnp.uint32))


def write_planes(
    arena: jax.Array, planes: jax.Array, first: jax.Array, width: jax.Array, stride: jax.Array
) -> jax.Array:
    """Write the lowest ``width`` of uint32[8, tiles, 128] planes where `read_planes` reads them."""
    _, tiles, lanes = planes.shape

    def write(p, arena):
        rows = lax.dynamic_slice(planes, (p, 0, 0), (1, tiles, lanes))[0]
        return lax.dynamic_update_slice(arena, rows, (first + p * stride, 0))

    return lax.fori_loop(0, width, write, arena)
