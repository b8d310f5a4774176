"""A moment that stands alone, of either sign, with no second moment to measure it by: momentum, a
slow average, a copy of the parameters.

    x_i = scale * (q_i + between) * unit,    a two-byte scale for each group

with the levels of the first moment's codec, and as there the scale makes the decoded group as long
as the true one. What is stored may be an average over ten thousand steps, which moves by a fraction
of a level at a time: an element that moved by less than half a level since it was stored is rounded
at random, or it would never move. Others are rounded to the nearest, which is the smaller error.
"""

import jax
import jax.numpy as jnp

from stquant_jax.codecs.first import Levels, level_of
from stquant_jax.codecs.ops import Ops, group_max, group_sum, presence
from stquant_jax.storage.numerics import TINY, exp2, log2, to_code, to_float

# log2 of the scale over all octaves of normal float32 numbers, two bytes.
SCALE_PER_OCTAVE = 256
SCALE_LOWEST = -126.0
SCALE_HIGHEST = 127.0  # what is larger counts as not finite
SCALE_NOT_FINITE = 2**16 - 1


def decode_signed(
    codes: jax.Array,
    scale: jax.Array,
    valid: jax.Array,
    lev: Levels,
    ops: Ops = Ops(),  # noqa: B008
) -> jax.Array:
    """Values from codes uint32[..., 32, n] and scales uint32[..., 1, n]. Elementwise."""
    octaves = SCALE_LOWEST + (to_float(scale) - 1.0) * (1 / SCALE_PER_OCTAVE)
    step = ops.hold(exp2(jnp.minimum(octaves, SCALE_HIGHEST)) * presence(scale, SCALE_NOT_FINITE))
    return level_of(to_float(codes) + lev.low, lev) * step * valid


def encode_signed(
    x: jax.Array,
    old: jax.Array,
    valid: jax.Array,
    lev: Levels,
    dither: jax.Array,
    coin: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales, both uint32, of what follows a decoded moment.

    Args:
      x, old: float32[..., 32, n], zero where ``valid`` is.
      dither: uniform on [0, 1) per element. coin: the same per group.
    """
    hold = ops.hold
    largest = hold(group_max(jnp.abs(x), ops))
    finite, dead = largest < jnp.inf, largest < TINY
    present = jnp.where(finite & ~dead, largest, 1.0)
    near_one = jnp.where(present > 1.0, 2.0**-64, 2.0**64)  # or its reciprocal could be flushed
    present_near_one = present * near_one
    part = hold(jnp.where(finite, x * near_one / present_near_one, 0.0))
    z = part * lev.gain
    near_zero = (lev.between > 0) & (jnp.abs(z) < 0.5)  # zero stays zero on average
    before = old * near_one / present_near_one * lev.gain
    creeps = jnp.abs(z - before) < 0.5
    q = jnp.floor(z - lev.between + jnp.where(creeps | near_zero, dither, 0.5))
    q = hold(jnp.clip(q, lev.low, lev.high))

    decoded = group_sum(jnp.square(level_of(q, lev)) * valid, ops)
    longer = log2(jnp.maximum(group_sum(part * part, ops), TINY) / jnp.maximum(decoded, TINY))
    octaves = log2(present) + 0.5 * longer - SCALE_LOWEST
    finite &= octaves < SCALE_HIGHEST - SCALE_LOWEST
    code = jnp.floor(octaves * SCALE_PER_OCTAVE + 1.0 + coin)
    code = to_code(jnp.clip(code, 1, SCALE_NOT_FINITE - 1))
    code = jnp.where(finite, jnp.where(dead, 0, code), SCALE_NOT_FINITE)
    return to_code(q - lev.low), code.astype(jnp.uint32)
