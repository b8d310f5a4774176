"""The reference backend: one table-driven loop over all chunks of all leaves, the arena updated in
place.

Gradients are laid out tile by tile in a buffer, bucket by bucket, which the loop overwrites with
the updates. Per chunk: read planes, compute, write planes. Nothing reads the arena after a write of
the same chunk, or XLA would copy the arena.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stquant_jax.backends.block import Codes, no_sums, slot_numbers, update_block
from stquant_jax.backends.buckets import Buckets
from stquant_jax.backends.loops import Table, holder, over_tiles, put
from stquant_jax.codecs import Ops, lane_sum
from stquant_jax.precision import Plan, Sums
from stquant_jax.rules.adam import Adam, AdamScalars
from stquant_jax.rules.apply import Apply, apply_leaf
from stquant_jax.storage import arena as rows
from stquant_jax.storage import planes
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.noise import Dither, keys_of
from stquant_jax.storage.planes import GROUP, LANES
from stquant_jax.storage.settings import Storage


class Buffers(NamedTuple):
    """What the loop carries: every array is updated in place."""

    data: jax.Array  # [tiles of a bucket, 32, 128] gradients in, updates out
    packed: rows.Packed
    sums: jax.Array  # [tiles, statistics]


def step(
    layout: Layout,
    storage: Storage,
    rule: Adam,
    scalars: AdamScalars,
    count: jax.Array,
    grads: list[jax.Array],
    packed: rows.Packed,
    plan: Plan,
    apply: Apply | None = None,
) -> tuple[list[jax.Array], rows.Packed, Sums]:
    """One fused update of all quantized leaves: updates, what is stored of them, and statistics
    float32[tiles] of what storing did, 0 for tiles that only align. With ``apply``, new parameters
    in place of updates.
    """
    leaves = layout.quantized
    if not leaves:
        return [], packed, no_sums()
    widths = plan.widths
    table = Table.of(layout)
    offsets = rows.offsets(widths, layout)
    numbers = slot_numbers(plan, scalars, count)
    hold = holder(count > 0)
    ragged = any(leaf.ragged for leaf in leaves)
    buckets = Buckets(layout)
    in_buffer = jnp.array(buckets.first_tile, jnp.int32)

    def update_chunk(
        leaf: jax.Array, coded: bool, size: int, tile: jax.Array, b: Buffers
    ) -> Buffers:
        slots = (2 * leaf, 2 * leaf + 1) if coded else (2 * leaf,)
        spans = [rows.Span(offsets[slot] + tile, widths[slot], table.tiles[leaf]) for slot in slots]
        at, here = table.first[leaf] + tile, in_buffer[leaf] + tile

        # All that is read of the buffers is read here, before anything is written.
        old_packed = b.packed
        g, words, mu_scale, nu_scale, nu_row = hold(
            (
                lax.dynamic_slice_in_dim(b.data, here, size),
                [rows.read_planes(old_packed.arena, span, size) for span in spans],
                lax.dynamic_slice_in_dim(old_packed.mu_scale, at, size),
                lax.dynamic_slice_in_dim(old_packed.nu_scale, at, size),
                lax.dynamic_slice_in_dim(old_packed.nu_row, at * GROUP, size * GROUP),
            )
        )
        old = Codes(
            planes.unpack(words[0]),
            planes.unpack(words[1]) if coded else None,
            mu_scale[:, None].astype(jnp.uint32),
            nu_scale[:, None].astype(jnp.uint32),
            nu_row.reshape(size, GROUP, 1).astype(jnp.uint32),
        )
        group, valid = table.place(leaf).of_tiles(tile, size, ragged)
        keys = keys_of(storage.seed, leaf, count)
        noise = Dither(keys, group, jnp.arange(GROUP, dtype=jnp.uint32)[None, :, None])
        lev, lat = jax.tree.map(lambda x: x[leaf], numbers)
        g = g.astype(jnp.float32)
        update, new, terms = update_block(
            rule, scalars, g, old, valid, lev, lat, noise, count % GROUP, Ops(hold)
        )

        sums = lane_sum(hold(jnp.stack(terms))).T
        moments = (new.mu, new.nu) if coded else (new.mu,)
        new_planes = [hold(planes.pack(codes)) for codes in moments]
        return Buffers(
            put(b.data, update, here),
            rows.Packed(
                rows.write_planes(old_packed.arena, spans, new_planes),
                put(old_packed.mu_scale, new.mu_scale[:, 0], at),
                put(old_packed.nu_scale, new.nu_scale[:, 0], at),
                put(old_packed.nu_row, new.nu_row.reshape(-1), at * GROUP),
            ),
            put(b.sums, sums, at),
        )

    def update_leaf(leaf: jax.Array, b: Buffers) -> Buffers:
        # A loop for slots of nu with codes, one for those without: one of them has no turn.
        with_codes = widths[2 * leaf + 1] > 0
        for coded in (True, False):
            tiles = jnp.where(with_codes == coded, table.tiles[leaf], 0)
            b = over_tiles(tiles, layout, partial(update_chunk, leaf, coded), b)
        return b

    # Updates that are applied here stay in float32 until then, whatever the gradients' dtype.
    # Of several dtypes too: those of 8 bits are promoted to none.
    dtypes = {g.dtype for g in grads} if apply is None else set()
    dtype = dtypes.pop() if len(dtypes) == 1 else jnp.float32
    # Born when the gradients are: a buffer that depends on nothing XLA may make at the start of the
    # training step, where it lies beside all that the backward pass keeps.
    come = reduce(jnp.logical_or, (g[(0,) * g.ndim] != 0 for g in grads), count > 0)
    data = holder(come)(lax.empty((buckets.tiles, GROUP, LANES), dtype))
    sums = hold(lax.empty((layout.tiles, len(Sums._fields)), jnp.float32))

    def finish(index: int, update: jax.Array, old: jax.Array, now: jax.Array) -> jax.Array:
        if apply is None:
            return update.astype(old.dtype)
        # Or XLA draws the noise of all buckets before the first of them.
        step = jnp.where(now, count, 0)
        return apply_leaf(layout, storage, step, index, old, update, apply)

    def update_bucket(bucket: jax.Array, carry: tuple) -> tuple:
        out, b = carry
        data = buckets.load(bucket, b.data, out if apply is None else grads)
        b = lax.fori_loop(*buckets.ends(bucket), update_leaf, b._replace(data=data))
        return buckets.unload(bucket, out, b.data, finish), b

    out, b = list(grads if apply is None else apply.params), Buffers(data, packed, sums)
    out, b = lax.fori_loop(0, len(buckets.leaves), update_bucket, (out, b))
    return out, b.packed, Sums(*b.sums.T)
