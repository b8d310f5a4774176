"""Stochastic rounding of float32 to bfloat16: elementwise, the same on every backend.

Rounding to nearest loses every update below half a step of its parameter; rounded up with a
probability of the part cut off, the parameter moves by the update on average.
"""

import jax
import jax.numpy as jnp
from jax import lax

_KEPT = 0xFFFF0000  # a bfloat16 is the upper half of a float32


def stochastic(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Float32 to one of its two neighbours in bfloat16, so that the mean over ``bits`` is x.

    The part of the magnitude that is cut off, in 2**-16 of a step, is the chance of the larger
    magnitude. Values that bfloat16 holds stay as they are, infinities and NaN included; those
    beyond the largest finite one, 3.39e38, may become infinite, as by rounding to nearest.

    Args:
      x: float32. bits: uint32 of its shape, uniform; the upper 16 count.
    """
    word = lax.bitcast_convert_type(x, jnp.uint32)
    # A carry runs from the mantissa into the exponent, to the next power of two, as it should.
    up = lax.bitcast_convert_type((word + (bits >> 16)) & jnp.uint32(_KEPT), jnp.float32)
    # The payload of a NaN may lie in the lower half alone, or run over into the sign.
    return jnp.where(jnp.isnan(x), x, up).astype(jnp.bfloat16)
