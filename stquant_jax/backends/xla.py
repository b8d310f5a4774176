"""The reference backend: one table-driven loop over all chunks of all leaves, the arena, the scales
and the leaves updated in place.

Per chunk: read gradients and planes, compute, write planes and updates. Nothing reads the arena
after a write of the same chunk, or XLA would copy the arena.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stquant_jax.backends.block import Codes, slot_numbers, update_block
from stquant_jax.backends.chunks import Arrays, Chunks
from stquant_jax.backends.loops import Table, holder, in_place_if, over_tiles, put
from stquant_jax.codecs import Lattice, Levels, Ops, lane_sum
from stquant_jax.precision import Plan
from stquant_jax.precision.tally import joined, no_sums
from stquant_jax.rules.adam import Adam, AdamScalars
from stquant_jax.rules.apply import Apply
from stquant_jax.storage import arena as rows
from stquant_jax.storage import planes
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.noise import Dither, keys_of, rounding_bits
from stquant_jax.storage.planes import GROUP
from stquant_jax.storage.settings import Storage


class Buffers(NamedTuple):
    """What the loop carries: every array is updated in place."""

    arrays: Arrays
    packed: rows.Packed
    sums: jax.Array  # digits of a leaf's statistics, uint32[8, statistics]


class Chunk(NamedTuple):
    """Consecutive tiles of a leaf; traced scalars, but for the size."""

    leaf: jax.Array
    tile: jax.Array  # the first
    size: int
    at: jax.Array  # the same among the tiles of all leaves
    spans: list[rows.Span]  # of mu's and nu's planes
    lev: Levels
    lat: Lattice


class Stored(NamedTuple):
    """What is to be stored of a chunk."""

    mu: jax.Array  # planes
    nu: jax.Array  # whatever, where there are none
    mu_scale: jax.Array
    nu_scale: jax.Array
    nu_row: jax.Array


def step(
    layout: Layout,
    storage: Storage,
    rule: Adam,
    scalars: AdamScalars,
    count: jax.Array,
    grads: list[jax.Array],
    packed: rows.Packed,
    plan: Plan,
    weights: jax.Array,
    apply: Apply | None = None,
) -> tuple[list[jax.Array], rows.Packed, jax.Array]:
    """One fused update of all quantized leaves: updates, what is stored of them, and statistics of
    what storing did, times ``weights``, float32[statistics]: digits of each leaf's sums, uint32[8,
    statistics, leaves]. With ``apply``, new parameters in place of updates.
    """
    if not layout.quantized:
        return [], packed, no_sums(0)
    widths = plan.widths
    table = Table.of(layout)
    offsets = rows.offsets(widths, layout)
    numbers = slot_numbers(plan, scalars, count)
    hold = holder(count > 0)
    ragged = any(leaf.ragged for leaf in layout.quantized)
    chunks = Chunks(layout, grads, apply, hold)

    def compute(chunk: Chunk, packed: rows.Packed, inputs: list[jax.Array], coded: bool):
        """What a chunk's gradient, and parameter, become, what is stored, and sums. Nothing is
        written here."""
        at, size = chunk.at, chunk.size
        words, mu_scale, nu_scale, nu_row = hold(
            (
                [rows.read_planes(packed.arena, span, size) for span in chunk.spans[: 1 + coded]],
                lax.dynamic_slice_in_dim(packed.mu_scale, at, size),
                lax.dynamic_slice_in_dim(packed.nu_scale, at, size),
                lax.dynamic_slice_in_dim(packed.nu_row, at * GROUP, size * GROUP),
            )
        )
        old = Codes(
            planes.unpack(words[0]),
            planes.unpack(words[1]) if coded else None,
            mu_scale[:, None].astype(jnp.uint32),
            nu_scale[:, None].astype(jnp.uint32),
            nu_row.reshape(size, GROUP, 1).astype(jnp.uint32),
        )
        group, valid = table.place(chunk.leaf).of_tiles(chunk.tile, size, ragged)
        element = jnp.arange(GROUP, dtype=jnp.uint32)[None, :, None]
        keys = keys_of(storage.seed, chunk.leaf, count)
        noise, ops = Dither(keys, group, element), Ops(hold)
        result, new, terms = update_block(
            rule, scalars, inputs[0], old, valid, chunk.lev, chunk.lat, noise, count % GROUP, ops
        )
        if apply is not None:
            bits = rounding_bits(keys, group, element) if chunks.rounded else None
            result = chunks.applied(chunk.leaf, inputs[1], result, bits)
        mu = planes.pack(new.mu)
        stored = Stored(
            mu,
            planes.pack(new.nu) if coded else lax.empty(mu.shape, mu.dtype),
            new.mu_scale[:, 0].astype(packed.mu_scale.dtype),
            new.nu_scale[:, 0].astype(packed.nu_scale.dtype),
            new.nu_row.reshape(-1).astype(packed.nu_row.dtype),
        )
        return result, stored, lane_sum(hold(jnp.stack(terms)))

    def update_chunk(chunk: Chunk, b: Buffers) -> Buffers:
        leaf, at, spans, old = chunk.leaf, chunk.at, chunk.spans, b.packed
        spot = chunks.spot(leaf, chunk.tile)
        # All that is read of the buffers is read here, before anything is written.
        inputs = chunks.read(leaf, spot, chunk.size, b.arrays)
        # Where nu has no codes it is another, shorter program.
        coded = spans[1].width > 0
        make = partial(compute, chunk, old, inputs)
        result, new, sums = lax.cond(coded, lambda: make(True), lambda: make(False))
        arena = rows.write_planes(old.arena, spans[:1], [new.mu])

        def write_nu(_, arena):
            return rows.write_planes(arena, spans[1:], [new.nu])

        packed = rows.Packed(
            in_place_if(coded, write_nu, arena),
            put(old.mu_scale, new.mu_scale, at),
            put(old.nu_scale, new.nu_scale, at),
            put(old.nu_row, new.nu_row, at * GROUP),
        )
        arrays = chunks.write(leaf, spot, result, b.arrays)
        return Buffers(arrays, packed, joined(b.sums, sums * weights[:, None]))

    def update_leaf(i: jax.Array, carry: tuple) -> tuple:
        b, sums = carry
        leaf = chunks.order[i]
        # Scalars are picked here: in the midst of what is computed it would be slow.
        lev, lat = jax.tree.map(lambda x: x[leaf], numbers)
        tiles, first = table.tiles[leaf], table.first[leaf]
        slots = [(offsets[2 * leaf + i], widths[2 * leaf + i]) for i in (0, 1)]

        def body(size, tile, b):
            spans = [rows.Span(offset + tile, width, tiles) for offset, width in slots]
            return update_chunk(Chunk(leaf, tile, size, first + tile, spans, lev, lat), b)

        b = over_tiles(tiles, layout, body, b._replace(sums=jnp.zeros_like(b.sums)))
        return b, lax.dynamic_update_slice_in_dim(sums, b.sums[..., None], leaf, -1)

    def update_bucket(bucket: jax.Array, carry: tuple) -> tuple:
        small, b, sums = carry
        b = b._replace(arrays=chunks.load(bucket, small, b.arrays))
        ends = chunks.starts[bucket], chunks.starts[bucket + 1]
        b, sums = lax.fori_loop(*ends, update_leaf, (b, sums))
        return chunks.unload(bucket, small, b.arrays), b, sums

    arrays, small = chunks.divided()
    # Born when the gradients are: a buffer that depends on nothing XLA may make at the start of the
    # training step, where it lies beside all that the backward pass keeps.
    come = reduce(jnp.logical_or, (g[(0,) * g.ndim] != 0 for g in grads), count > 0)
    arrays = arrays._replace(staged=[holder(come)(x) for x in arrays.staged])
    sums = no_sums(len(layout.quantized))
    carry = small, Buffers(arrays, packed, sums[..., 0]), sums
    small, b, sums = lax.fori_loop(0, chunks.buckets, update_bucket, carry)
    return chunks.together(b.arrays, small), b.packed, sums
