"""Random numbers without a key in the state, from (seed, leaf, global element index) and the step.

The bits depend on nothing else, so they are the same on every backend, on every sharding and after
a restart. Dither is a Kronecker sequence in two directions. From element to element it moves on by
the reciprocal of the plastic number, from step to step by that of the golden ratio, and both visit
[0, 1) far more evenly than fresh draws would: what rounding does to a group nearly cancels, and the
rare steps of a slow moment come closer to when they are due. It costs an addition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stquant_jax.storage.numerics import hash32, to_float

# 2**32 over the golden ratio and over the plastic number, odd: steps and elements visit all of
# uint32.
_GOLDEN, _PLASTIC = 0x9E3779B9, 0xC13FA9A9


class Keys(NamedTuple):
    """Numbers of a leaf and a step, uint32 scalars: what a kernel is given."""

    element: jax.Array
    coin: jax.Array
    rotation: jax.Array
    fresh: jax.Array
    rounding: jax.Array


def keys_of(seed: int | jax.Array, leaf: jax.Array, step: jax.Array) -> Keys:
    """Keys of a leaf, by its index, and of a step, by the count of updates; both scalars."""
    leaf, step = jnp.asarray(leaf, jnp.uint32), jnp.asarray(step, jnp.uint32)
    key = hash32(jnp.uint32(seed) ^ hash32(leaf * 2 + 1))
    parameters = hash32(jnp.uint32(seed) ^ hash32(leaf * 2 + 2))
    return Keys(
        element=key,
        coin=hash32(key ^ jnp.uint32(0xFFFFFFFF)),
        rotation=step * jnp.uint32(_GOLDEN),
        fresh=hash32(step ^ key),
        rounding=hash32(step ^ parameters),
    )


class Dither(NamedTuple):
    """Uniform numbers on [0, 1) of a block, of mu on [-1/2, 1/2), each made when it is asked for:
    two per element, two per group."""

    keys: Keys
    group: jax.Array  # uint32[..., 1, n], index of the group in its leaf, on all devices together
    element: jax.Array  # uint32[..., 32, 1], index of the element in its group

    @property
    def nu(self) -> jax.Array:
        return _unit(self._of_elements(self.keys.element + self.keys.rotation, self.group))

    @property
    def nu_row(self) -> jax.Array:
        """Of the first element in each row: [..., 32, 1]."""
        first = self.group[..., :1]
        return _unit(self._of_elements(self.keys.element + self.keys.rotation, first))

    @property
    def mu(self) -> jax.Array:
        # mu's levels next to zero have a memory of a few steps, which rotation would turn into a
        # bias: a fresh start at every step.
        bits = lax.bitcast_convert_type(self._of_elements(self.keys.fresh, self.group), jnp.int32)
        return (bits >> 8).astype(jnp.float32) * 2.0**-24

    @property
    def nu_coin(self) -> jax.Array:
        return _unit(self._coins + self.keys.rotation)

    @property
    def mu_coin(self) -> jax.Array:
        return _unit((self._coins << 16) + self.keys.rotation)

    @property
    def _coins(self) -> jax.Array:
        return hash32(self.group ^ self.keys.coin)

    def _of_elements(self, start: jax.Array, group: jax.Array) -> jax.Array:
        along = self.element * jnp.uint32(_PLASTIC) + start
        return along + group * jnp.uint32(32 * _PLASTIC % 2**32)


def _unit(bits: jax.Array) -> jax.Array:
    """uint32 as a number in [0, 1)."""
    return to_float(bits >> 8) * 2.0**-24


def rounding_bits(keys: Keys, group: jax.Array, element: jax.Array) -> jax.Array:
    """Uniform bits uint32[..., 32, n] for the rounding of parameters, fresh at every step and
    independent of the dither. Arguments as for `dither`."""
    return hash32((group * 32 + element) ^ keys.rounding)
