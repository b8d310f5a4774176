"""From one plan to the next, in place: slots that shrink are coded anew where they stand, all slots
move to their new offsets, slots that grow are coded anew in their new planes.

No branches around the arena, only loops with traced trip counts, which are zero for slots that stay
as they are: a branch would make XLA copy the arena. Growing changes no decoded value, since each
width's levels are among those of the next; what shrinking drops does not come back.

Plans change rarely, so what counts here is how little there is to compile: one body for chunks of
tiles of any slot, whose rows are listed, and those of tiles that are not there dropped.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stquant_jax.backends.loops import CHUNK, Table, holder
from stquant_jax.codecs import Ops, lattice, levels, recode_first, recode_second
from stquant_jax.precision import Plan
from stquant_jax.storage import arena as rows
from stquant_jax.storage import planes
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.noise import Dither, keys_of
from stquant_jax.storage.numerics import to_code, to_float
from stquant_jax.storage.planes import GROUP, PLANES
from stquant_jax.storage.settings import Storage

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


class Tiles(NamedTuple):
    """A chunk of a slot's tiles; traced scalars, but for the last."""

    slot: jax.Array
    first: jax.Array  # of them, in the slot
    stride: jax.Array  # tiles of the slot
    there: jax.Array  # int32[CHUNK]: their indices, beyond the slot's for those that are not there

    def rows(self, offset, width):
        plane, there = jnp.arange(PLANES, dtype=jnp.int32)[:, None], self.there[None]
        stored = (plane < width) & (there < self.stride)
        return jnp.where(stored, offset + plane * self.stride + there, rows.NOWHERE)


def _over_slots(layout: Layout, changed: jax.Array, body: Callable[[Tiles, Any], Any], carry: Any):
    """``body`` over all tiles of the slots that are ``changed``, bool[slots], by chunks."""
    tiles = jnp.asarray(rows.slot_tiles(layout))
    chunks = jnp.where(changed, (tiles + CHUNK - 1) // CHUNK, 0)
    ends = jnp.cumsum(chunks)

    def of(i, carry):
        slot = jnp.sum(ends <= i)
        first = CHUNK * (i - (ends[slot] - chunks[slot]))
        here = first + jnp.arange(CHUNK, dtype=jnp.int32)
        return body(Tiles(slot, first, tiles[slot], here), carry)

    return lax.fori_loop(0, ends[-1], of, carry)


def _shrink(layout, storage, count, packed, old, narrow, windows, hold):
    table = Table.of(layout)
    offsets = rows.offsets(old.widths, layout)
    changed = narrow < old.widths
    # The lattice of a slot without codes has no window.
    changed |= (windows != old.windows) & (narrow > 0)
    ragged = any(leaf.ragged for leaf in layout.quantized)

    def body(tiles, packed):
        slot = tiles.slot
        leaf = slot // 2
        at = jnp.where(tiles.there < tiles.stride, table.first[leaf] + tiles.there, rows.NOWHERE)
        where = tiles.rows(offsets[slot], old.widths[slot])
        read, mu_scale, nu_scale, nu_row = hold(
            (
                rows.gather_rows(packed.arena, where),
                rows.gather_rows(packed.mu_scale, at),
                rows.gather_rows(packed.nu_scale, at),
                rows.gather_rows(packed.nu_row.reshape(-1, GROUP), at),
            )
        )
        codes = planes.unpack(read)

        def parts():
            group, valid = table.place(leaf).of_tiles(tiles.first, CHUNK, ragged)
            element = jnp.arange(GROUP, dtype=jnp.uint32)[None, :, None]
            return valid, Dither(keys_of(storage.seed ^ _SALT, leaf, count), group, element)

        def first(codes, scale, _, __):
            valid, noise = parts()
            few, many = levels(narrow[slot]), levels(old.widths[slot])
            return recode_first(codes, scale, valid, many, few, noise.mu, noise.mu_coin, Ops(hold))

        def second(codes, _, scale, row):
            valid, noise = parts()
            few = lattice(narrow[slot], windows[slot], jnp.float32(0))
            many = lattice(old.widths[slot], old.windows[slot], jnp.float32(0))
            return recode_second(
                codes, scale, to_float(row), valid, many, few, noise.nu, noise.nu_coin, Ops(hold)
            )

        is_mu = slot % 2 == 0
        mu_scale, nu_scale = (x[:, None].astype(jnp.uint32) for x in (mu_scale, nu_scale))
        codes, scale = lax.cond(
            is_mu, first, second, codes, mu_scale, nu_scale, nu_row[..., None].astype(jnp.uint32)
        )
        scale = scale[:, 0]
        return packed._replace(
            arena=rows.scatter_rows(packed.arena, where, hold(planes.pack(codes))),
            mu_scale=rows.scatter_rows(packed.mu_scale, jnp.where(is_mu, at, rows.NOWHERE), scale),
            nu_scale=rows.scatter_rows(packed.nu_scale, jnp.where(is_mu, rows.NOWHERE, at), scale),
        )

    return _over_slots(layout, changed, body, packed)


def _move(
    arena: jax.Array, layout: Layout, old: jax.Array, narrow: jax.Array, new: jax.Array
) -> jax.Array:
    """Slots to their new offsets: first all that move down, from the front; then all that move up,
    from the back. No slot is in another's way: their order stays."""
    slots = 2 * len(layout.quantized)
    tiles = jnp.asarray(rows.slot_tiles(layout))
    source, target = rows.offsets(old, layout), rows.offsets(new, layout)
    count = narrow * tiles

    def move(i, arena):
        down = i < slots
        slot = jnp.where(down, i, 2 * slots - 1 - i)
        here = jnp.where((target[slot] < source[slot]) == down, count[slot], 0)
        return rows.move_rows(arena, source[slot], target[slot], here)

    return lax.fori_loop(0, 2 * slots, move, arena)


def _grow(arena, layout, narrow, new, hold):
    """The same values at more bits: codes of both moments are an affine function of the old."""
    offsets = rows.offsets(new, layout)
    is_mu = jnp.arange(len(offsets)) % 2 == 0
    # At widths of mu only: levels of a width of 0 are never used.
    few, many = (levels(jnp.maximum(widths, 2)) for widths in (narrow, new))
    ratio = few.unit / many.unit
    offset = jnp.where(is_mu, (few.low + few.between) * ratio - many.low - many.between, 0.0)
    ratio = jnp.where(is_mu, ratio, to_float(jnp.uint32(1) << (new - narrow).astype(jnp.uint32)))

    def body(tiles, arena):
        slot = tiles.slot
        where = [tiles.rows(offsets[slot], width[slot]) for width in (narrow, new)]
        codes = planes.unpack(hold(rows.gather_rows(arena, where[0])))
        codes = to_code(to_float(codes) * ratio[slot] + offset[slot])
        return rows.scatter_rows(arena, where[1], hold(planes.pack(codes)))

    return _over_slots(layout, new > narrow, body, arena)
