"""Both moments of one leaf, all of it at once: from float32 to what is stored, and back.

Functions of a leaf's geometry, of numbers that are traced, and of arrays: leaves of one geometry
share a program. A loop over chunks of tiles, as in a step, so that nothing but the tiles
themselves is as large as the leaf.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from stquant_jax.backends.loops import holder, over_leaf, put
from stquant_jax.codecs import (
    Lattice,
    Levels,
    Ops,
    decode_first,
    decode_second,
    encode_first,
    encode_second_anew,
    lattice,
    levels,
)
from stquant_jax.precision import Plan
from stquant_jax.storage import arena as rows
from stquant_jax.storage import planes
from stquant_jax.storage.layout import Layout, Leaf
from stquant_jax.storage.noise import Dither, keys_of
from stquant_jax.storage.numerics import or_nan, to_float
from stquant_jax.storage.places import Place, start_of
from stquant_jax.storage.planes import GROUP, LANES
from stquant_jax.storage.tiling import from_tiles, to_tiles


class LeafSlots(NamedTuple):
    """Where a leaf's codes lie and what they mean; mu before nu where there are two."""

    leaf: jax.Array  # int32[], its index, which seeds its noise
    tile: jax.Array  # int32[], its first tile
    rows: jax.Array  # int32[2], first rows of its planes in the arena
    plan: Plan  # [2]


def slots_of(layout: Layout, plan: Plan) -> list[tuple[Leaf, LeafSlots]]:
    """Each quantized leaf, without what no program depends on, and its slots."""
    offsets, found = rows.offsets(plan.widths, layout), []
    for i, (leaf, first) in enumerate(zip(layout.quantized, layout.first_tile, strict=True)):
        offset, part = jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], (offsets, plan))
        geometry = replace(leaf, path="", reason="", dtype=None)
        found.append((geometry, LeafSlots(jnp.int32(i), jnp.int32(first), offset, part)))
    return found


def leaf_by_leaf(
    visit: Callable[[Leaf, LeafSlots, rows.Packed, Any], tuple[rows.Packed, Any]],
    layout: Layout,
    plan: Plan,
    packed: rows.Packed,
    values: Sequence[Any] | None = None,
) -> tuple[rows.Packed, list[Any]]:
    """``visit(leaf, slots, packed, value)`` gives what is stored and a result, for each quantized
    leaf. One is waited for before the next begins, so that the memory of no more than one is taken.
    """
    slots, results = slots_of(layout, plan), []
    for (leaf, at), x in zip(slots, values or [None] * len(slots), strict=True):
        packed, result = visit(leaf, at, packed, x)
        if not any(isinstance(y, Tracer) for y in jax.tree.leaves((packed, result))):
            jax.block_until_ready((packed, result))
        results.append(result)
    return packed, results


def encode_leaf(
    leaf: Leaf,
    slots: LeafSlots,
    seed: jax.Array,
    count: jax.Array,
    packed: rows.Packed,
    mu: jax.Array,
    nu: jax.Array,
) -> rows.Packed:
    """What is stored, with this leaf's part of it written; donate ``packed``.

    Args:
      leaf: its geometry, static; all else is traced.
      slots: see there.
      seed: uint32[], of the rounding. count: int32[], updates done.
      mu, nu: its moments, [*shape] of any real floating dtype. An element that is not finite, of
        either, marks its group.
    """
    mu, nu = mu.astype(jnp.float32), nu.astype(jnp.float32)
    data = to_tiles(mu, leaf), to_tiles(or_nan(nu, jnp.isfinite(mu)), leaf)
    lev, lat = _numbers(slots)
    keys = keys_of(seed, slots.leaf, count)
    hold = holder(count >= 0)
    ops = Ops(hold)

    def encode(size: int, tile: jax.Array, packed: rows.Packed) -> rows.Packed:
        mu, v = hold(tuple(lax.dynamic_slice_in_dim(x, tile, size) for x in data))
        group, valid = Place.of(leaf, start_of(leaf.cut)).of_tiles(tile, size, leaf.ragged)
        noise = Dither(keys, group, jnp.arange(GROUP, dtype=jnp.uint32)[None, :, None])
        second = encode_second_anew(v, valid, lat, noise.nu, noise.nu_coin, ops)
        e = hold(mu * second.inverse_root)
        first = encode_first(e, valid, second.presence, lev, noise.mu, noise.mu_coin, ops)
        words = [hold(planes.pack(x)) for x in (first.codes, second.codes)]
        at = slots.tile + tile
        return rows.Packed(
            rows.write_planes(packed.arena, _spans(leaf, slots, tile), words),
            put(packed.mu_scale, first.scale[:, 0], at),
            put(packed.nu_scale, second.scale[:, 0], at),
            put(packed.nu_row, second.row.reshape(-1), at * GROUP),
        )

    return over_leaf(leaf, encode, packed)


def decode_leaf(leaf: Leaf, slots: LeafSlots, packed: rows.Packed) -> tuple[jax.Array, jax.Array]:
    """Its mu and nu, float32[*shape]. Arguments as for `encode_leaf`."""
    lev, lat = _numbers(slots)
    ops = Ops(holder(slots.plan.widths[0] >= 0))  # as a step: parts of a leaf fuse as the whole

    def decode(size: int, tile: jax.Array, data: tuple) -> tuple:
        at = slots.tile + tile
        mu_codes, nu_codes = (
            planes.unpack(rows.read_planes(packed.arena, span, size))
            for span in _spans(leaf, slots, tile)
        )
        mu_scale, nu_scale = (
            lax.dynamic_slice_in_dim(x, at, size)[:, None].astype(jnp.uint32)
            for x in (packed.mu_scale, packed.nu_scale)
        )
        row = lax.dynamic_slice_in_dim(packed.nu_row, at * GROUP, size * GROUP)
        row = to_float(row.reshape(size, GROUP, 1).astype(jnp.uint32))
        _, valid = Place.of(leaf).of_tiles(tile, size, leaf.ragged)
        second = decode_second(nu_codes, nu_scale, row, valid, lat, ops)
        mu = decode_first(mu_codes, mu_scale, second.root, second.base, lev, ops)
        return put(data[0], mu, tile), put(data[1], second.v, tile)

    blank = jnp.zeros((leaf.tiles, GROUP, LANES), jnp.float32)
    mu, nu = over_leaf(leaf, decode, (blank, blank))
    return from_tiles(mu, leaf), from_tiles(nu, leaf)


def _numbers(slots: LeafSlots) -> tuple[Levels, Lattice]:
    widths, windows, shrinkage = slots.plan
    return levels(widths[0]), lattice(widths[1], windows[1], shrinkage[1])


def _spans(leaf: Leaf, slots: LeafSlots, tile: jax.Array) -> list[rows.Span]:
    """Of mu and of nu, from this tile of the leaf on."""
    stride = jnp.int32(leaf.tiles)
    return [rows.Span(slots.rows[i] + tile, slots.plan.widths[i], stride) for i in range(2)]
