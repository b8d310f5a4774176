"""Blocks of groups: reductions, and what a backend may do in its own way."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stquant_jax.storage.numerics import or_nan

Combine = Callable[[jax.Array, jax.Array], jax.Array]
Hold = Callable[[Any], Any]  # a pytree to the same pytree


def by_halves(combine: Combine, x: jax.Array) -> jax.Array:
    """Reduce the group axis by halves: in a fixed order, the same bits everywhere."""
    while (n := x.shape[-2]) > 1:
        x = combine(x[..., : n // 2, :], x[..., n // 2 :, :])
    return x


def lane_sum(x: jax.Array) -> jax.Array:
    """[..., 1, lanes] -> [...]: by halves, too."""
    return by_halves(jnp.add, x.swapaxes(-1, -2))[..., 0, 0]


def take_row(x: jax.Array, round_row: jax.Array) -> jax.Array:
    """Row ``round_row`` of a block [..., 32, n]: [..., 1, n]."""
    return jax.lax.dynamic_slice_in_dim(x, round_row, 1, axis=-2)


class Ops(NamedTuple):
    """What a backend may do in its own way, with the same outcome to the bit.

    Attributes:
      hold: keeps values in memory, where a compiler would rather compute them again for every use,
        those of a group for every element.
      fold: reduces the group axis, in the order of `by_halves`.
    """

    hold: Hold = lambda x: x
    fold: Callable[[Combine, jax.Array], jax.Array] = by_halves


def group_sum(x: jax.Array, ops: Ops = Ops()) -> jax.Array:  # noqa: B008
    return ops.fold(jnp.add, x)


def group_max(x: jax.Array, ops: Ops = Ops()) -> jax.Array:  # noqa: B008
    return ops.fold(jnp.maximum, x)


def group_min(x: jax.Array, ops: Ops = Ops()) -> jax.Array:  # noqa: B008
    return ops.fold(jnp.minimum, x)


def presence(scale: jax.Array, not_finite: int) -> jax.Array:
    """0 for a group of zeros, NaN for one that is not finite, else 1: a factor of its values."""
    alive = jnp.where(scale == 0, jnp.float32(0), jnp.float32(1))
    return or_nan(alive, scale != not_finite)
