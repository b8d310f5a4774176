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


class Keys(NamedTuple):
    """Numbers of a leaf and a step, uint32 scalars: what a kernel is given."""

    element: jax.Array
    coin: jax.Array
    rotation: jax.Array
    fresh: jax.Array
    rounding: jax.Array


def keys_of(seed: int | jax.Array, leaf: jax.Array, step: jax.Array) -> Keys:
    """Keys of a leaf, by its index, and of a step, by the count of updates; both scalars."""
    leaf, step = leaf.astype(jnp.uint32), step.astype(jnp.uint32)
    key = hash32(jnp.uint32(seed) ^ hash32(leaf * 2 + 1))
    parameters = hash32(jnp.uint32(seed) ^ hash32(leaf * 2 + 2))
    return Keys(
        element=key,
        coin=hash32(key ^ jnp.uint32(0xFFFFFFFF)),
        rotation=step * jnp.uint32(_GOLDEN),
        fresh=hash32(step ^ key) | 1,
        rounding=hash32(step ^ parameters),
    )


def dither(keys: Keys, group: jax.Array, element: jax.Array) -> Dither:
    """Dither of a block.

    Args:
      group: uint32[..., 1, n], index of the group in its leaf, on all devices together.
      element: uint32[..., 32, 1], index of the element in its group.
    """
    coins = hash32(group ^ keys.coin)
    fixed = hash32((group * 32 + element) ^ keys.element)
    bits = fixed + keys.rotation
    # mu's levels next to zero have a memory of a few steps, which rotation would turn into a bias:
    # fresh numbers, by an odd factor of the step's own.
    fresh = (fixed | 1) * keys.fresh
    return Dither(
        nu=to_float(bits >> 8) * 2.0**-24,
        mu=(to_float(fresh >> 24) + 0.5) * 2.0**-8,
        nu_coin=to_float((coins + keys.rotation) >> 8) * 2.0**-24,
        mu_coin=to_float(((coins << 16) + keys.rotation) >> 8) * 2.0**-24,
    )


def rounding_bits(keys: Keys, group: jax.Array, element: jax.Array) -> jax.Array:
    """Uniform bits uint32[..., 32, n] for the rounding of parameters, fresh at every step and
    independent of the dither. Arguments as for `dither`."""
    return hash32((group * 32 + element) ^ keys.rounding)
