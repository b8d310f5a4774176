"""First moment, relative to the quantized root of the second, e = m / sigma_q: uniform levels up to
the largest |e|, at four bits and more with an exact zero, at two and three bits on either side of
zero, which is kept on average. Its one-byte scale makes the decoded group as long as the true one:
the length never grows on average, so the loop is stable for every b1 < 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from stquant_jax.codecs.ops import Ops, group_max, group_sum, presence
from stquant_jax.storage.numerics import TINY, exp2, log2, to_code, to_float

# log2 of the scale, one byte. Fine where training lives (the largest |e| of a group is near 1/2,
# and up to 1 / sqrt(1 - b2**t) more while nu is young), coarse where mu fades away under an old nu
# or outruns it.
MU_CENTER = 0.0
MU_FINE_PER_OCTAVE = 24
MU_COARSE_PER_OCTAVE = 5
MU_FINE_REACH = 3.5  # octaves either side of the center
MU_ZERO_CODE = 128  # the code of the center
MU_NOT_FINITE = 2**8 - 1

# Below the largest ratio of any group that is not zero; the reciprocal is a float32.
_LEAST_RATIO = 2.0**-70
# Outermost level over the largest |e|, by width: clipping the largest a little serves the others.
_REACH = (1.0, 1.0, 0.85, 1.0, 0.95, 1.0, 1.0, 1.0, 1.0)


class Levels(NamedTuple):
    """Numbers of a first moment's slot: level of code c is ``(c + low + between) * unit``.

    Every width's levels are among the next one's, so that a slot can grow without losing anything.
    """

    low: jax.Array  # smallest code, signed
    high: jax.Array  # largest code, signed
    between: jax.Array  # 1/2 where levels straddle zero, else 0
    unit: jax.Array  # distance of levels, in scales
    gain: jax.Array  # codes from zero to what the largest |e| is mapped to


def levels(width: jax.Array) -> Levels:
    """The levels of a slot from its width (2..8), a traced integer."""
    half = to_float(jnp.uint32(1) << (width.astype(jnp.uint32) - 1))
    straddle = width < 4
    return Levels(
        low=jnp.where(straddle, -half, 1.0 - half),
        high=half - 1.0,
        between=jnp.where(straddle, 0.5, 0.0),
        unit=jnp.where(straddle, 0.25, 1.0 / half),
        # cells, not levels, fill the range where levels straddle zero
        gain=jnp.where(straddle, half, half - 1.0) / jnp.asarray(_REACH, jnp.float32)[width],
    )


def decode_first(
    codes: jax.Array,
    scale: jax.Array,
    root: jax.Array,
    base: jax.Array,
    lev: Levels,
    ops: Ops = Ops(),  # noqa: B008
) -> jax.Array:
    """First moment from codes uint32[..., 32, n], scales uint32[..., 1, n] and the other's root,
    which is ``root`` times the group's ``base``. Elementwise."""
    return decoded_first(codes, root, ops.hold(step_of(scale, base, lev)), lev)


def step_of(scale: jax.Array, base: jax.Array, lev: Levels) -> jax.Array:
    """Distance of a group's levels, over its elements' roots."""
    return decoded_scale(scale) * lev.unit * base


def decoded_first(codes: jax.Array, root: jax.Array, step: jax.Array, lev: Levels) -> jax.Array:
    """First moment from codes, its elements' roots and its group's step."""
    return (to_float(codes) + (lev.low + lev.between)) * (root * step)


def scale_of(scale: jax.Array) -> jax.Array:
    """What a scale code of the first moment stands for, were it neither zero nor not finite."""
    n = to_float(scale) - MU_ZERO_CODE
    fine = MU_FINE_REACH * MU_FINE_PER_OCTAVE
    octaves = jnp.minimum(jnp.abs(n), fine) / MU_FINE_PER_OCTAVE
    octaves += jnp.maximum(jnp.abs(n) - fine, 0.0) / MU_COARSE_PER_OCTAVE
    return exp2(MU_CENTER + jnp.where(n < 0, -octaves, octaves))


class FirstCode(NamedTuple):
    """An encoded first moment, relative to the root of the second."""

    codes: jax.Array  # uint32[..., 32, n]
    scale: jax.Array  # uint32[..., 1, n]


def encode_first(
    e: jax.Array,
    valid: jax.Array,
    present: jax.Array,
    lev: Levels,
    dither: jax.Array,
    coin: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
) -> FirstCode:
    """Codes and scales of a first moment relative to the quantized root of the second.

    ``present`` is 0 for a group of zeros, NaN for one that is not finite, else 1. ``dither`` is
    uniform on [-1/2, 1/2) per element, ``coin`` on [0, 1) per group.
    """
    gain = ops.hold(gain_of(group_max(jnp.abs(e), ops), lev))
    q = ops.hold(quantized(e, gain, lev, dither))
    level = q + lev.between
    decoded = group_sum(level * level * valid, ops) * (lev.unit * lev.unit)
    code = length_of(group_sum(e * e, ops), decoded, present, coin)
    return FirstCode(to_code(q, lev.low), code)


def error_of(e: jax.Array, codes: jax.Array, scale: jax.Array, lev: Levels) -> jax.Array:
    """What is decoded less e, where the group is present; codes are float32."""
    return level_of(codes + lev.low, lev) * decoded_scale(scale) - e


# --- the formulas of encode_first, in their order ---


def gain_of(largest: jax.Array, lev: Levels) -> jax.Array:
    """Codes per unit of e, from a group's largest |e|."""
    return lev.gain / jnp.maximum(largest, _LEAST_RATIO)


def gain_over_roots(gain: jax.Array, inverse_base: jax.Array) -> jax.Array:
    """The same per unit of mu over roots that are not yet over their group's base. Finite, or zeros
    of a group whose base is next to nothing would not stay zeros."""
    return jnp.minimum(gain * inverse_base, 2.0**127)


def quantized(e: jax.Array, gain: jax.Array, lev: Levels, dither: jax.Array) -> jax.Array:
    """Signed codes, low to high, of e; dither is about zero."""
    # Between the two levels next to zero the choice is random, so that zero stays zero on average:
    # a parameter without gradient in a living group must not drift.
    z = e * gain
    rounding = jnp.where(jnp.abs(z) < lev.between, dither, 0.5 - lev.between)
    return jnp.clip(jnp.floor(z + rounding), lev.low, lev.high)


def level_of(q: jax.Array, lev: Levels) -> jax.Array:
    """Signed codes as parts of the scale."""
    return (q + lev.between) * lev.unit


def length_of(
    length: jax.Array, decoded: jax.Array, present: jax.Array, coin: jax.Array
) -> jax.Array:
    """The scale that makes a decoded group as long as the true one, uint32; lengths squared."""
    log_scale = 0.5 * log2(jnp.maximum(length, TINY) / jnp.maximum(decoded, TINY))
    scale = jnp.where(length < TINY, 0.0, _round_scale(log_scale, coin))
    code = jnp.where(present == 1.0, to_code(scale), jnp.where(present == 0.0, 0, MU_NOT_FINITE))
    return code.astype(jnp.uint32)


def decoded_scale(code: jax.Array) -> jax.Array:
    """What a scale code stands for, 0 and NaN included."""
    return scale_of(code) * presence(code, MU_NOT_FINITE)


def _round_scale(log_scale: jax.Array, coin: jax.Array) -> jax.Array:
    """Stochastic rounding of a first moment's scale, unbiased in its square: the length is kept."""
    away = jnp.abs(log_scale - MU_CENTER)
    fine = MU_FINE_REACH * MU_FINE_PER_OCTAVE
    n = jnp.minimum(away * MU_FINE_PER_OCTAVE, fine + (away - MU_FINE_REACH) * MU_COARSE_PER_OCTAVE)
    n = jnp.where(log_scale < MU_CENTER, -n, n)
    below = jnp.floor(n)
    # From the step below (4**0) to the step above (4**h), 4**(h f) is reached with this
    # probability.
    edge = jnp.where(below < 0, below + 1.0, below)  # the step's end nearer to the center
    is_fine = jnp.abs(edge) < fine
    twice = jnp.where(is_fine, 2 / MU_FINE_PER_OCTAVE, 2 / MU_COARSE_PER_OCTAVE)
    whole = jnp.where(
        is_fine, *(2 ** (2 / n) - 1 for n in (MU_FINE_PER_OCTAVE, MU_COARSE_PER_OCTAVE))
    )
    chance = (exp2(twice * (n - below)) - 1.0) / whole
    code = below + MU_ZERO_CODE + jnp.where(coin < chance, 1.0, 0.0)
    return jnp.clip(code, 0, MU_NOT_FINITE - 1)


def recode_first(
    codes: jax.Array,
    scale: jax.Array,
    valid: jax.Array,
    old: Levels,
    new: Levels,
    dither: jax.Array,
    coin: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales at another width, the group's length kept. Both uint32, like those given."""
    step = ops.hold(scale_of(scale) * old.unit)
    e = ops.hold((to_float(codes) + (old.low + old.between)) * step * valid)
    code = encode_first(e, valid, presence(scale, MU_NOT_FINITE), new, dither, coin, ops)
    return code.codes, code.scale
