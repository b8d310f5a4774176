"""The reference backend: one table-driven loop over all chunks of all leaves, the arena updated in place.

Gradients are laid out tile by tile in one buffer, which the loop overwrites with the updates. Per chunk: read planes, compute,
write planes. Nothing reads the arena after a write of the same chunk, or XLA would copy the arena.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax import arena as rows
from stquant_jax import planes
from stquant_jax.backends.fused import Codes, update_block
from stquant_jax.codecs import lattice, levels
from stquant_jax.layout import Layout, Storage, from_tiles, to_tiles
from stquant_jax.noise import dither
from stquant_jax.places import Place
from stquant_jax.planes import GROUP, LANES
from stquant_jax.rules import Adam, AdamScalars

CHUNK = 8  # tiles that are computed together: enough to amortise a loop iteration, few enough for the cache


class Buffers(NamedTuple):
    """What the loop carries: every array is updated in place."""

    data: jax.Array  # [tiles, 32, 128] gradients in, updates out
    arena: jax.Array
    mu_scale: jax.Array  # uint8[tiles, 128]
    nu_scale: jax.Array  # uint16[tiles, 128]
    nu_row: jax.Array  # uint8[tiles * 32]


def step(
    layout: Layout,
    storage: Storage,
    rule: Adam,
    scalars: AdamScalars,
    count: jax.Array,
    grads: list[jax.Array],
    arena: jax.Array,
    mu_scale: jax.Array,
    nu_scale: jax.Array,
    nu_row: jax.Array,
    widths: jax.Array,
    windows: jax.Array,
) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array, jax.Array]:
    """One fused update of all quantized leaves: updates, arena, scales, rows."""
    leaves = layout.quantized
    places = jax.tree.map(lambda *column: jnp.asarray(np.array(column, np.int32)), *map(Place.of, leaves))
    tiles, first = (jnp.asarray(np.array(x, np.int32)) for x in ([leaf.tiles for leaf in leaves], layout.first_tile))
    offsets = rows.offsets(widths, layout)

    def update_chunk(size: int, leaf: jax.Array, tile: jax.Array, b: Buffers) -> Buffers:
        slots = (2 * leaf, 2 * leaf + 1)
        at, stride = first[leaf] + tile, tiles[leaf]

        once = jnp.minimum(widths[slots[0]], 1)

        def fetch(buffer, at, size):
            """Rows [at, at + size) through a loop of one traced turn: a boundary that fusion cannot cross, so that the slice is
            read once, before the buffer is written, and XLA has no reason to copy the buffer."""
            take = lambda i, _: lax.dynamic_slice_in_dim(buffer, at + i, size)
            return lax.fori_loop(0, once, take, jnp.zeros((size, *buffer.shape[1:]), buffer.dtype))

        def read(slot):
            return planes.unpack(rows.read_planes(b.arena, offsets[slot] + tile, widths[slot], stride, size))

        old = Codes(
            *map(read, slots),
            *(fetch(s, at, size)[:, None].astype(jnp.uint32) for s in (b.mu_scale, b.nu_scale)),
            fetch(b.nu_row, at * GROUP, size * GROUP).reshape(size, GROUP, 1).astype(jnp.uint32),
        )
        group, valid = jax.tree.map(lambda column: column[leaf], places).of_tiles(tile, size)
        noise = dither(storage.seed, leaf, count, group, jnp.arange(GROUP, dtype=jnp.uint32)[:, None])
        g = fetch(b.data, at, size)
        update, new = update_block(
            rule,
            scalars,
            g.astype(jnp.float32),
            old,
            valid,
            levels(widths[slots[0]]),
            lattice(widths[slots[1]], windows[slots[1]]),
            noise,
            count % GROUP,
        )
        arena = b.arena
        for slot, codes in zip(slots, (new.mu, new.nu), strict=True):
            arena = rows.write_planes(arena, planes.pack(codes), offsets[slot] + tile, widths[slot], stride)

        def put(buffer, x, at):
            return lax.dynamic_update_slice_in_dim(buffer, x.astype(buffer.dtype), at, 0)

        return Buffers(
            put(b.data, update, at),
            arena,
            put(b.mu_scale, new.mu_scale[:, 0], at),
            put(b.nu_scale, new.nu_scale[:, 0], at),
            put(b.nu_row, new.nu_row.reshape(-1), at * GROUP),
        )

    def update_leaf(leaf: jax.Array, b: Buffers) -> Buffers:
        whole = tiles[leaf] // CHUNK
        b = lax.fori_loop(0, whole, lambda i, b: update_chunk(CHUNK, leaf, i * CHUNK, b), b)
        return lax.fori_loop(whole * CHUNK, tiles[leaf], lambda i, b: update_chunk(1, leaf, i, b), b)

    dtype = jnp.result_type(*grads)
    data = jnp.concatenate([to_tiles(g.astype(dtype), leaf) for g, leaf in zip(grads, leaves, strict=True)])
    b = lax.fori_loop(0, len(leaves), update_leaf, Buffers(data, arena, mu_scale, nu_scale, nu_row))
    updates = [
        from_tiles(b.data[first : first + leaf.tiles], leaf).astype(g.dtype)
        for g, leaf, first in zip(grads, leaves, layout.first_tile, strict=True)
    ]
    return updates, *b[1:]
