"""From one plan to the next, in place: slots that shrink are coded anew where they stand, all slots
move to their new offsets, slots that grow are coded anew in their new planes.

No branches, only loops with traced trip counts, which are zero for slots that stay as they are: a
branch would make XLA copy the arena. Growing changes no decoded value, since each width's levels
are among those of the next; what shrinking drops does not come back.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from stquant_jax import arena as rows
from stquant_jax import planes
from stquant_jax.backends.loops import Table, holder, over_tiles, put
from stquant_jax.codecs import Hold, Ops, lattice, levels, recode_first, recode_second
from stquant_jax.layout import Layout, Storage
from stquant_jax.noise import dither, keys_of
from stquant_jax.numerics import to_code, to_float
from stquant_jax.planes import GROUP
from stquant_jax.precision import Plan

_SALT = 0x7C15  # of the seed: other numbers than those of the step


def repack(
    layout: Layout, storage: Storage, count: jax.Array, packed: rows.Packed, old: Plan, new: Plan
) -> rows.Packed:
    """What is stored under ``old``, stored under ``new``. Both fit into the arena."""
    if not layout.quantized:
        return packed
    hold = holder(count > 0)
    narrow = jnp.minimum(old.widths, new.widths)
    packed = _shrink(layout, storage, count, packed, old, narrow, new.windows, hold)
    arena = _move(packed.arena, layout, old.widths, narrow, new.widths)
    return packed._replace(arena=_grow(arena, layout, narrow, new.widths, hold))


def _shrink(
    layout: Layout,
    storage: Storage,
    count: jax.Array,
    packed: rows.Packed,
    old: Plan,
    narrow: jax.Array,
    windows: jax.Array,
    hold: Hold,
) -> rows.Packed:
    """Code anew what becomes narrower or gets another window; planes stay at the old stride."""
    table = Table.of(layout)
    offsets = rows.offsets(old.widths, layout)
    changed = narrow < old.widths
    # The lattice of a slot without codes has no window.
    changed |= (windows != old.windows) & (narrow > 0)
    ragged = any(leaf.ragged for leaf in layout.quantized)

    def parts(leaf, slot, size, tile, packed):
        """Codes, scales, rows, places and noise of consecutive tiles; where to write planes."""
        span = rows.Span(offsets[slot] + tile, old.widths[slot], table.tiles[leaf])
        at = table.first[leaf] + tile
        read, mu_scale, nu_scale, nu_row = hold(
            (
                rows.read_planes(packed.arena, span, size),
                lax.dynamic_slice_in_dim(packed.mu_scale, at, size),
                lax.dynamic_slice_in_dim(packed.nu_scale, at, size),
                lax.dynamic_slice_in_dim(packed.nu_row, at * GROUP, size * GROUP),
            )
        )
        scales = [x[:, None].astype(jnp.uint32) for x in (mu_scale, nu_scale)]
        row = to_float(nu_row.reshape(size, GROUP, 1).astype(jnp.uint32))
        group, valid = table.place(leaf).of_tiles(tile, size, ragged)
        element = jnp.arange(GROUP, dtype=jnp.uint32)[:, None]
        noise = dither(keys_of(storage.seed ^ _SALT, leaf, count), group, element)
        return planes.unpack(read), scales, row, valid, noise, span, at

    def first_moment(leaf, size, tile, packed):
        slot = 2 * leaf
        codes, scales, _, valid, noise, span, at = parts(leaf, slot, size, tile, packed)
        few, many = levels(narrow[slot]), levels(old.widths[slot])
        codes, scale = recode_first(
            codes, scales[0], valid, many, few, noise.mu, noise.mu_coin, Ops(hold)
        )
        return packed._replace(
            arena=rows.write_planes(packed.arena, [span], [hold(planes.pack(codes))]),
            mu_scale=put(packed.mu_scale, scale[:, 0], at),
        )

    def second_moment(leaf, size, tile, packed):
        slot = 2 * leaf + 1
        codes, scales, row, valid, noise, span, at = parts(leaf, slot, size, tile, packed)
        few = lattice(narrow[slot], windows[slot], jnp.float32(0))
        many = lattice(old.widths[slot], old.windows[slot], jnp.float32(0))
        codes, scale = recode_second(
            codes, scales[1], row, valid, many, few, noise.nu, noise.nu_coin, Ops(hold)
        )
        return packed._replace(
            arena=rows.write_planes(packed.arena, [span], [hold(planes.pack(codes))]),
            nu_scale=put(packed.nu_scale, scale[:, 0], at),
        )

    def shrink_leaf(leaf, packed):
        for slot, moment in ((2 * leaf, first_moment), (2 * leaf + 1, second_moment)):
            trips = jnp.where(changed[slot], table.tiles[leaf], 0)
            packed = over_tiles(trips, layout, partial(moment, leaf), packed)
        return packed

    return lax.fori_loop(0, len(layout.quantized), shrink_leaf, packed)


def _move(
    arena: jax.Array, layout: Layout, old: jax.Array, narrow: jax.Array, new: jax.Array
) -> jax.Array:
    """Slots to their new offsets: first all that move down, from the front; then all that move up,
    from the back. No slot is in another's way: their order stays."""
    slots = 2 * len(layout.quantized)
    tiles = jnp.asarray(rows.slot_tiles(layout))
    source, target = rows.offsets(old, layout), rows.offsets(new, layout)
    count = narrow * tiles

    def down(i, arena):
        here = jnp.where(target[i] < source[i], count[i], 0)
        return rows.move_rows(arena, source[i], target[i], here)

    def up(i, arena):
        i = slots - 1 - i
        here = jnp.where(target[i] > source[i], count[i], 0)
        return rows.move_rows(arena, source[i], target[i], here)

    return lax.fori_loop(0, slots, up, lax.fori_loop(0, slots, down, arena))


def _grow(
    arena: jax.Array, layout: Layout, narrow: jax.Array, new: jax.Array, hold: Hold
) -> jax.Array:
    """The same values at more bits: codes of both moments are an affine function of the old."""
    slots = 2 * len(layout.quantized)
    tiles = jnp.asarray(rows.slot_tiles(layout))
    offsets = rows.offsets(new, layout)
    is_mu = jnp.arange(slots) % 2 == 0
    # At widths of mu only: levels of a width of 0 are never used.
    few, many = (levels(jnp.maximum(widths, 2)) for widths in (narrow, new))
    ratio = few.unit / many.unit
    offset = jnp.where(is_mu, (few.low + few.between) * ratio - many.low - many.between, 0.0)
    ratio = jnp.where(is_mu, ratio, to_float(jnp.uint32(1) << (new - narrow).astype(jnp.uint32)))

    def body(slot):
        def grow(size, tile, arena):
            def span(width):
                return rows.Span(offsets[slot] + tile, width, tiles[slot])

            codes = planes.unpack(hold(rows.read_planes(arena, span(narrow[slot]), size)))
            codes = to_code(to_float(codes) * ratio[slot] + offset[slot])
            return rows.write_planes(arena, [span(new[slot])], [hold(planes.pack(codes))])

        return grow

    def grow_slot(slot, arena):
        trips = jnp.where(new[slot] > narrow[slot], tiles[slot], 0)
        return over_tiles(trips, layout, body(slot), arena)

    return lax.fori_loop(0, slots, grow_slot, arena)
