"""Second moment from nothing: the rows of a tile are estimated at once, where `encode_second` moves
one a turn.

A group j of mean v_j and a row of the tile are told apart by

    log2 sigma_ij = log2 sigma_j - row_i / 32 + what is left to the codes,    row_i = -16 log2
    mean_j(v_ij / v_j)

with every living group of the tile counting alike. A mean of v, not of its logarithm: that is the
share of v that the update predicts of a row, and one zero does not pull a row down for all groups.
With the rows known the rest is the encoding of a tile that was zero.
"""

import jax
import jax.numpy as jnp

from stquant_jax.codecs.blocks import Ops, group_sum
from stquant_jax.codecs.second import (
    ROW_PER_OCTAVE,
    Lattice,
    Second,
    SecondCode,
    encode_second,
    grown,
)
from stquant_jax.numerics import TINY, log2
from stquant_jax.planes import GROUP


def encode_second_anew(
    v: jax.Array,
    valid: jax.Array,
    lat: Lattice,
    dither: jax.Array,
    coin: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
) -> SecondCode:
    """Codes, scales and rows of a second moment float32[..., 32, n] of which nothing is stored.

    Arguments as for `encode_second`; n is all of a tile's lanes. Groups keep their energy to the
    scale's rounding, elements their root on average, but for those beyond the window.
    """
    zero = jnp.zeros_like(v)
    dead = jnp.ones((*v.shape[:-2], 1, v.shape[-1]), bool)
    nothing = Second(v=zero, sigma=zero, log_root=zero, root=zero + 1.0, codes=zero, dead=dead)
    row = ops.hold(rows_of(v, valid, ops))
    nobody = jnp.int32(GROUP)  # has its turn: all rows are where they belong
    return encode_second(v, nothing, row, nobody, valid, lat, dither, coin, ops)


def rows_of(v: jax.Array, valid: jax.Array, ops: Ops = Ops()) -> jax.Array:  # noqa: B008
    """Rows of tiles float32[..., 32, 1], whole, on no scale yet; 0 where nothing is alive."""
    energy, count = group_sum(v, ops), group_sum(valid, ops)
    alive = grown(energy, count, count, energy < TINY, ops).presence == 1.0
    weight = jnp.where(alive, valid, 0.0) + jnp.zeros_like(v)
    living = jnp.sum(weight, axis=-1, keepdims=True)
    parts = jnp.where(weight > 0, v / energy * count, 0.0)
    share = jnp.sum(parts, axis=-1, keepdims=True) / jnp.maximum(living, 1.0)
    octaves = 0.5 * log2(jnp.maximum(share, TINY))
    return jnp.where(living > 0, jnp.floor(0.5 - octaves * ROW_PER_OCTAVE), 0.0)
