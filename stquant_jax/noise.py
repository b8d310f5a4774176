"""Random numbers without a key in the state: a hash of (seed, leaf, global element index), rotated
by the step.

The bits depend on nothing else, so they are the same on every backend, on every sharding and after
a restart. From one step to the next every element's number moves on by the golden ratio: over time
it visits [0, 1) far more evenly than fresh draws would, and the rare steps of a slow moment come
closer to when they are due.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from stquant_jax.numerics import hash32, to_float

_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio, odd: steps visit all of uint32


class Dither(NamedTuple):
    """Uniform numbers on [0, 1): two per element, two per group."""

    nu: jax.Array
    mu: jax.Array
    nu_coin: jax.Array
    mu_coin: jax.Array


def dither(
    seed: int, leaf: jax.Array, step: jax.Array, group: jax.Array, element: jax.Array
) -> Dither:
    """Dither of a block.

    Args:
      leaf: index of the leaf, scalar. step: count of updates, scalar.
      group: uint32[..., 1, n], index of the group in its leaf, on all devices together.
      element: uint32[..., 32, 1], index of the element in its group.
    """
    key = hash32(jnp.uint32(seed) ^ hash32(leaf.astype(jnp.uint32) * 2 + 1))
    rotation = step.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    coins = hash32(group ^ hash32(key ^ jnp.uint32(0xFFFFFFFF)))
    fixed = hash32((group * 32 + element) ^ key)
    bits = fixed + rotation
    # mu's levels next to zero have a memory of a few steps, which rotation would turn into a bias:
    # fresh numbers, by an odd factor of the step's own.
    fresh = (fixed | 1) * (hash32(step.astype(jnp.uint32) ^ key) | 1)
    return Dither(
        nu=to_float(bits >> 8) * 2.0**-24,
        mu=(to_float(fresh >> 24) + 0.5) * 2.0**-8,
        nu_coin=to_float((coins + rotation) >> 8) * 2.0**-24,
        mu_coin=to_float(((coins << 16) + rotation) >> 8) * 2.0**-24,
    )


def rounding_bits(
    seed: int, leaf: jax.Array, step: jax.Array, group: jax.Array, element: jax.Array
) -> jax.Array:
    """Uniform bits uint32[..., 32, n] for the rounding of parameters, fresh at every step.

    Their keys are hashes of other numbers than the dither's, which they are independent of.
    Arguments as for `dither`.
    """
    key = hash32(jnp.uint32(seed) ^ hash32(leaf.astype(jnp.uint32) * 2 + 2))
    return hash32((group * 32 + element) ^ hash32(step.astype(jnp.uint32) ^ key))
