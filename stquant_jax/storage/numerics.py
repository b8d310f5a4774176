"""Float and integer primitives of the codecs, the same on every backend.

``exp2`` and ``log2`` are short polynomials on the bits of a float32. They cost less than the
library functions, vectorise everywhere, and are made of additions, multiplications and shifts
alone, so that devices differ at most in how they fuse a multiplication with an addition.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TINY = 2.0**-126  # smallest normal float32; anything below is flushed to zero by most accelerators

# Minimax polynomials, highest power first; tests/test_numerics.py holds them to their bounds.
_EXP2 = (
    0.0018775765,
    0.0089893406,
    0.0558263175,
    0.2401536107,
    0.6931530833,
    0.9999999404,
)  # 2**f on [0, 1)
_LOG2 = (
    -0.1497331858,
    0.2357096076,
    -0.2483228296,
    0.2868688703,
    -0.3602634668,
    0.4809311628,
    -0.7213524580,
    1.4426949024,
)  # log2(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1]
# The same, shorter: the slope at 1 is that of the logarithm, and it is off by a part in 2,000.
_LOG2_OF_RATIO = (-0.3335832, 0.5071921, -0.7232593, 1.4426950)
# 2**(m - 1) of m on [1, 2], exact at both ends, to a part in 10,000.
_EXP2_OF_FIXED = (0.0782679701, -0.0084962282, 0.4776128935, 0.4526153646)
_SQRT_HALF_BITS = 0x3F3504F3
_ONE_BITS = 0x3F800000
_MANTISSA = 0x007FFFFF
EXP2_FIXED_ONE = 2**23  # the octave of `exp2_of_fixed`
_NAN_BITS = 0x7FC00000


class Arithmetic(NamedTuple):
    """Division and square root, which some devices also have as instructions that are off in the
    last places."""

    divide: Callable[[jax.Array, jax.Array], jax.Array] = jnp.divide
    sqrt: Callable[[jax.Array], jax.Array] = jnp.sqrt


def _horner(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    p = jnp.float32(coefficients[0])
    for c in coefficients[1:]:
        p = p * x + jnp.float32(c)
    return p


def exp2(x: jax.Array) -> jax.Array:
    """2**x in float32 for -126 <= x < 128, to 2e-7 relative; the caller keeps x in that range."""
    whole = jnp.floor(x)
    p = _horner(_EXP2, x - whole)
    bits = lax.bitcast_convert_type(p, jnp.int32) + (whole.astype(jnp.int32) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32)


def log2(x: jax.Array) -> jax.Array:
    """log2(x) in float32 for normal x > 0, to 4e-7 relative, near x = 1 too: log2(1) is exactly 0.

    A moment moves by a thousandth of an octave a step, so it is the relative error near 1 that
    counts.
    """
    return _log2(_LOG2, x)


def log2_of_ratio(x: jax.Array) -> jax.Array:
    """log2(x) in float32 for x >= 0, to 5e-4 relative, near x = 1 too. Of 0: -127, of what is below
    2**-126 any number near it."""
    return _log2(_LOG2_OF_RATIO, x)


def _log2(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, jnp.int32)
    whole = (bits - _SQRT_HALF_BITS) >> 23
    f = lax.bitcast_convert_type(bits - (whole << 23), jnp.float32) - 1.0
    return whole.astype(jnp.float32) + f * _horner(coefficients, f)


def exp2_of_fixed(x: jax.Array) -> jax.Array:
    """About 2**-y, y = x / 2**23 octaves, for int32 0 <= x < 126 * 2**23: 1 at 0, half as much an
    octave on, in between by a cubic that is off by up to a part in 10,000.

    The bits of 1 less x are already those of a number between the right powers of two.
    """
    bits = jnp.int32(_ONE_BITS) - x
    m = lax.bitcast_convert_type(bits & jnp.int32(_MANTISSA) | jnp.int32(_ONE_BITS), jnp.float32)
    power = lax.bitcast_convert_type(bits & jnp.int32(~_MANTISSA), jnp.float32)
    return _horner(_EXP2_OF_FIXED, m) * power


def hash32(x: jax.Array) -> jax.Array:
    """A bijective hash of uint32 ('lowbias32', C. Wellons, public domain): counters to noise."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def to_float(code: jax.Array) -> jax.Array:
    """Unsigned integers below 2**24 as float32, through int32, which all vector units convert."""
    return lax.bitcast_convert_type(code, jnp.int32).astype(jnp.float32)


def to_code(x: jax.Array, lowest: jax.Array | float = 0.0) -> jax.Array:
    """Whole float32 less ``lowest``, in [0, 2**22), as uint32: plus 2**23 it is in the low bits.
    NaN: any code."""
    return lax.bitcast_convert_type(x + (2.0**23 - lowest), jnp.uint32) & jnp.uint32(0x3FFFFF)


def or_nan(x: jax.Array, sound: jax.Array) -> jax.Array:
    """Float32 x where it is sound, NaN elsewhere: made of bits, for `jax_debug_nans` stops at a NaN
    that is written down, chosen or not."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type(jnp.where(sound, bits, jnp.int32(_NAN_BITS)), jnp.float32)


def in_32_bits(f: Callable) -> Callable:
    """``f``, traced as without `jax_enable_x64`, under which whole Python numbers become int64.

    What is stored and what is computed is then the same, bit for bit. ``f`` takes no float64.
    """

    @wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(False):
            return f(*args, **kwargs)

    return call


def narrowed(tree: Any) -> Any:
    """Arrays of float64 as float32; all others as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == np.float64 else x, tree)


def widened(tree: Any, like: Any) -> Any:
    """The inverse of `narrowed`, in dtypes alone."""

    def of(x, y):
        return x.astype(y.dtype) if y.dtype == np.float64 and jax.enable_x64.value else x

    return jax.tree.map(of, tree, like)


def isolated(always: jax.Array, f: Callable, *args: Any) -> Any:
    """``f(*args)``, compiled as a computation of its own, in a branch that is always taken.

    Compilers fuse a product with a sum here and not there, depending on what stands around them.
    What has to come out the same in the programs of all shardings must not depend on that.
    """
    like = jax.eval_shape(f, *args)
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), like)
    return lax.cond(always, f, lambda *_: zeros(), *args)
