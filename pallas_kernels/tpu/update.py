"""The kernel: a chunk's planes, scales and gradients in, its updates, planes and scales out.

Everything is read once and written once. Gradients, updates and scales come and go through the
grid's own pipeline; planes are copied by hand, for their number is only known at run time. All
stored arrays are updated in place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.leaves import SUMS, Scalars, Tables
from pallas_kernels.tpu.chunks import CHUNK, ROWS, Chunks
from pallas_kernels.tpu.planes import (
    BUFFER,
    SEMAPHORES,
    WORDS,
    Copies,
    pack_chunk,
    unpack_chunk,
    words_of_tile,
)
from stquant_jax.codecs import by_halves
from stquant_jax.rules.apply import apply_block
from stquant_jax.storage.arena import Packed
from stquant_jax.storage.noise import Dither, rounding_bits
from stquant_jax.storage.planes import GROUP, LANES, codes_of, words_of

# A byte of mu's scales is stored in tiles of 32 rows, four chunks': they come and go together.
_BYTES = 32
_PICKS = 16  # places for blocks of which a row at a traced index is wanted


@partial(jax.jit, static_argnames=("body", "chunks", "stochastic", "interpret"))
def update_leaf(
    body: Callable,
    chunks: Chunks,
    numbers: Tables,
    g: jax.Array,
    stored: Packed,
    params: jax.Array | None = None,
    stochastic: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, Packed, jax.Array]:
    """One leaf's update, as `Chunks.matrix` lays it out.

    Args:
      body: ``body(scalars, g, codes, valid, noise, row) -> (update, codes, terms)``, where codes
        are (mu, nu, mu_scale, nu_scale, nu_row), uint32, nu None where it has none, and
        ``row(block, round_row)`` picks a row.
      numbers: the leaf's row of each table.
      stored: of all leaves, but rows of nu as int32[chunks, 1, 256].
      params: with them the result holds new parameters in place of the update. ``stochastic``:
        their rounding to bfloat16.

    Returns:
      The update, what is stored, and the terms of each tile summed over its lanes, by halves:
      float32[chunks, terms, tiles].
    """
    steps = chunks.grid[1]

    def chunk_of(lane_tile, i, *tables):
        return lax.div(Tables(*tables).row(0).first_tile, CHUNK) + lane_tile * steps + i

    def by_chunk(*block):
        return pl.BlockSpec(block, lambda *at: (chunk_of(*at), *[0] * (len(block) - 1)))

    mu_scale = pl.BlockSpec(
        (_BYTES, LANES), lambda *at: (lax.div(chunk_of(*at), _BYTES // CHUNK), 0)
    )
    spaces = [
        pl.BlockSpec(memory_space=pl.ANY),
        mu_scale,
        by_chunk(CHUNK, LANES),
        by_chunk(1, 1, ROWS),
    ]
    of_tiles = pl.BlockSpec((1, 1, LANES), lambda lane_tile, i, *_: (lane_tile * steps + i, 0, 0))
    matrices = [g] if params is None else [g, params]
    varying = jax.typeof(g).manual_axis_type  # inside of shard_map

    def like(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)

    block = pltpu.VMEM((ROWS, LANES), jnp.float32)
    update, *stored_, sums = pl.pallas_call(
        partial(_kernel, body, chunks, stochastic, params is not None),
        out_shape=[
            like(matrices[-1]),
            *map(like, stored),
            like(jax.ShapeDtypeStruct((chunks.tiles // CHUNK, 1, LANES), jnp.float32)),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(numbers),
            grid=chunks.grid,
            in_specs=[*[chunks.block] * len(matrices), *spaces],
            out_specs=[chunks.block, *spaces, of_tiles],
            scratch_shapes=[
                *(BUFFER, SEMAPHORES, BUFFER, SEMAPHORES, WORDS),
                block,  # gradients in, updates out
                block,  # parameters
                pltpu.VMEM((ROWS, LANES), jnp.int32),  # rows of nu
                pltpu.VMEM((_BYTES, LANES), jnp.int32),  # scales of mu
                pltpu.VMEM((CHUNK, LANES), jnp.int32),  # and of nu
                pltpu.VMEM((SUMS * CHUNK, LANES), jnp.float32),  # terms, by kind and tile
                pltpu.VMEM((_PICKS, GROUP, LANES), jnp.float32),
            ],
        ),
        # The result takes the place of what it replaces: gradients are rarely used again.
        input_output_aliases={
            len(numbers) + len(matrices) - 1: 0,
            **{len(numbers) + len(matrices) + i: 1 + i for i in range(len(stored))},
        },
        interpret=interpret,
        name="stquant_update",
    )(*numbers, *matrices, *stored)
    return update, Packed(*stored_), sums.reshape(-1, SUMS, CHUNK)


def _kernel(body, chunks, stochastic, applied, whole, keys, real, g_in, *refs):
    s = Tables(whole, keys, real).row(0)
    params_in, refs = (refs[0], refs[1:]) if applied else (None, refs)
    _, mu_scale_in, nu_scale_in, nu_row_in, *refs = refs
    out, arena, mu_scale_out, nu_scale_out, nu_row_out, sums, *refs = refs
    read, read_sem, write, write_sem, words, data, params, rows, *refs = refs
    mu_scale, nu_scale, kept, picks = refs

    lane_tile, i = pl.program_id(0), pl.program_id(1)
    chunk = lane_tile * chunks.grid[1] + i  # of the leaf
    last = chunks.tiles // CHUNK - 1
    first, widths = (s.mu_first, s.nu_first), (s.mu_width, s.nu_width)
    reads = Copies(arena, read, read_sem, first, widths, chunks.tiles, inward=True)
    writes = Copies(arena, write, write_sem, first, widths, chunks.tiles, inward=False)

    @pl.when(chunk == 0)
    def _():
        reads.start(chunk)

    @pl.when(chunk < last)
    def _():
        reads.start(chunk + 1)

    quarter = lax.rem(lax.div(s.first_tile, CHUNK) + chunk, _BYTES // CHUNK)

    @pl.when((chunk == 0) | (quarter == 0))
    def _():
        mu_scale[...] = mu_scale_in[...].astype(jnp.int32)

    nu_scale[...] = nu_scale_in[...].astype(jnp.int32)
    rows[...] = jnp.broadcast_to(nu_row_in[0], (LANES, ROWS)).T
    data[...] = _oriented(g_in, chunks, lane_tile, i)
    if applied:
        params[...] = _oriented(params_in, chunks, lane_tile, i)
    reads.wait(chunk)
    unpack_chunk(read, chunk, widths, words)

    @pl.loop(0, CHUNK)
    def _(k):
        here = pl.ds(pl.multiple_of(k * GROUP, GROUP), GROUP)
        at_mu, at_nu = pl.ds(quarter * CHUNK + k, 1), pl.ds(k, 1)
        scales = [_unsigned(x) for x in (mu_scale[at_mu], nu_scale[at_nu], rows[here])]
        group, valid, element = _places(chunks, s.start, chunk * CHUNK + k)

        def run(coded):
            moments = range(1 + coded)
            mu, nu = (*(codes_of(words.at[i][words_of_tile(k)]) for i in moments), None)[:2]
            noise = Dither(s.keys, group, element)
            update, new, terms = body(
                s, data[here], (mu, nu, *scales), valid, noise, _picker(picks)
            )
            if applied:
                bits = rounding_bits(s.keys, group, element) if stochastic else None
                # The rounding to the parameters' dtype comes with the store.
                update = _apply(params[here], update, s, bits)
            data[here] = update
            for moment in moments:
                words.at[moment][words_of_tile(k)] = words_of(new[moment])
            mu_scale[at_mu], nu_scale[at_nu], rows[here] = (_signed(x) for x in new[2:])
            for i, term in enumerate(terms):
                kept[pl.ds(CHUNK * i + k, 1)] = term

        # Of each leaf one of two programs.
        for coded in (True, False):
            pl.when((s.nu_width > 0) == coded)(partial(run, coded))

    @pl.when(chunk >= 2)
    def _():
        writes.wait(chunk - 2)

    pack_chunk(words, chunk, write)
    writes.start(chunk)
    mu_scale_out[...] = mu_scale[...].astype(mu_scale_out.dtype)
    nu_scale_out[...] = nu_scale[...].astype(nu_scale_out.dtype)
    nu_row_out[0] = rows[...].T[:1]
    sums[0] = by_halves(jnp.add, kept[...].T)
    out[...] = (data[...].T if chunks.transposed else data[...]).astype(out.dtype)

    @pl.when(chunk == last)
    def _():
        @pl.when(chunk >= 1)
        def _():
            writes.wait(chunk - 1)

        writes.wait(chunk)


def _oriented(ref: Any, chunks: Chunks, lane_tile: jax.Array, i: jax.Array) -> jax.Array:
    """A block of gradients or parameters, float32[256, 128] and zero outside of the leaf."""
    x = ref[...].astype(jnp.float32)
    x = x.T if chunks.transposed else x
    if not chunks.padded:
        return x
    group = lax.broadcasted_iota(jnp.int32, x.shape, 0) + i * ROWS
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    full, rest = divmod(chunks.lanes, LANES)  # tiles are compared: lanes may be more than 2**31
    lanes = jnp.clip(full - lane_tile, -1, 1) * LANES + rest
    return jnp.where((group < chunks.groups) & (lane < lanes), x, 0.0)


def _places(
    chunks: Chunks, start: jax.Array, tile: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Index of the groups, 1 for elements and 0 for padding, index in the group."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    group, left = chunks.place._replace(start=start).of_lanes(tile, lane)
    element = lax.broadcasted_iota(jnp.int32, (GROUP, LANES), 0)
    if not chunks.ragged:
        return group, jnp.ones((GROUP, LANES), jnp.float32), _unsigned(element)
    return group, jnp.where(element < left, 1.0, 0.0), _unsigned(element)


def _picker(picks: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A row at a traced index: a vector has none, memory does. Each block has a place of its own,
    so that none waits for another."""
    places = iter(range(_PICKS))

    def row(x: jax.Array, round_row: jax.Array) -> jax.Array:
        place = next(places)
        picks[place] = x.astype(jnp.float32)
        return picks[place, pl.ds(round_row, 1)].astype(x.dtype)

    return row


def _apply(p: jax.Array, update: jax.Array, s: Scalars, bits: jax.Array | None) -> jax.Array:
    p = p if bits is None else p.astype(jnp.bfloat16)
    new = apply_block(p, update, s.rate, s.decay, bits)
    return new.astype(jnp.float32)


def _unsigned(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _signed(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)
