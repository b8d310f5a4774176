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

from pallas_kernels.leaves import SUMS, Tables
from pallas_kernels.tpu.chunks import CHUNK, ROWS, Chunks
from pallas_kernels.tpu.passes import Codes, update_chunk
from pallas_kernels.tpu.planes import (
    BUFFER,
    SEMAPHORES,
    Copies,
    pack_chunk,
    unpack_chunk,
)
from pallas_kernels.tpu.vmem import Scratch
from stquant_jax.codecs import by_halves
from stquant_jax.rules.adam import Adam
from stquant_jax.storage.arena import Packed
from stquant_jax.storage.planes import LANES

# A byte of mu's scales is stored in tiles of 32 rows, four chunks': they come and go together.
_BYTES = 32


@partial(jax.jit, static_argnames=("rule", "terms", "chunks", "stochastic", "interpret"))
def update_leaf(
    rule: Adam,
    terms: Callable,
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
      terms: as for `pallas_kernels.tpu.passes.update_chunk`.
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

    update, *stored_, sums = pl.pallas_call(
        partial(_kernel, rule, terms, chunks, stochastic, params is not None),
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
                *(BUFFER, SEMAPHORES, BUFFER, SEMAPHORES),
                pltpu.VMEM((_BYTES, LANES), jnp.int32),  # scales of mu
                *Scratch.types(),
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


def _kernel(rule, terms, chunks, stochastic, applied, whole, keys, real, g_in, *refs):
    s = Tables(whole, keys, real).row(0)
    params_in, refs = (refs[0], refs[1:]) if applied else (None, refs)
    _, mu_scale_in, nu_scale_in, nu_row_in, *refs = refs
    out, arena, mu_scale_out, nu_scale_out, nu_row_out, sums, *refs = refs
    read, read_sem, write, write_sem, mu_scale, *refs = refs
    scratch = Scratch(*refs)

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

    scratch.data[...] = _oriented(g_in, chunks, lane_tile, i)
    if applied:
        scratch.params[...] = _oriented(params_in, chunks, lane_tile, i)
    reads.wait(chunk)
    unpack_chunk(read, chunk, widths, scratch.words)

    at_mu = pl.ds(pl.multiple_of(quarter * CHUNK, CHUNK), CHUNK)
    old = Codes(*map(_unsigned, (mu_scale[at_mu], nu_scale_in[...], nu_row_in[0])))

    new = update_chunk(rule, terms, chunks, s, chunk, old, scratch, applied, stochastic)
    mu_scale[at_mu] = _signed(new.mu_scale)
    nu_scale_out[...] = new.nu_scale.astype(nu_scale_out.dtype)
    nu_row_out[0] = _signed(new.nu_row)

    @pl.when(chunk >= 2)
    def _():
        writes.wait(chunk - 2)

    pack_chunk(scratch.words, chunk, write)
    writes.start(chunk)
    mu_scale_out[...] = mu_scale[...].astype(mu_scale_out.dtype)
    sums[0] = by_halves(jnp.add, scratch.terms[...].T)
    data = scratch.data[...]
    out[...] = (data.T if chunks.transposed else data).astype(out.dtype)

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


def _unsigned(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.int32), jnp.uint32)


def _signed(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)
