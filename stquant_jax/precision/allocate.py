"""Allocation of a budget: minimise a separable sum of costs under a capacity.

    minimise  sum_s cost[s, w_s]    subject to  sum_s tiles[s] w_s <= rows

Each slot alone minimises cost + price * rows; bisection finds the price at which all of them
together just fit (Everett, 1963). That is the exact optimum for the rows it uses, convex costs or
not. What is left over goes first to slots that would be wider at the next lower price, all of them
with the same gain per row, then to the steps that gain most per row. With convex costs and slots of
one size the result is the exact optimum of all.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax.precision.slots import room

_BISECTIONS = 40  # of the exponent of the price: to float32's resolution
_PRICE_RANGE = (-60.0, 60.0)  # log2


class _Choice(NamedTuple):
    log_price: jax.Array
    widths: jax.Array


def allocate(cost: jax.Array, tiles: np.ndarray, rows: int) -> jax.Array:
    """Widths int32[slots] of least total cost that fit.

    Args:
      cost: float32[slots, widths], inf where a width is not allowed. Each slot must have a finite
        cost at some width, and the narrowest of those must fit together.
      tiles: int[slots], rows that one bit takes.
      rows: capacity.
    """
    bits = jnp.arange(cost.shape[1], dtype=jnp.float32)[None]
    size = jnp.asarray(tiles, jnp.float32)[:, None] * bits

    def choose(log_price):
        return jnp.argmin(cost + jnp.exp2(log_price) * size, axis=1).astype(jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        log_price = 0.5 * (low.log_price + high.log_price)
        here = _Choice(log_price, choose(log_price))
        fit = room(rows, tiles, here.widths) >= 0
        return (
            jax.tree.map(partial(jnp.where, fit), low, here),
            jax.tree.map(partial(jnp.where, fit), here, high),
        )

    # Prices are relative to the largest cost: the range then serves any unit of cost.
    cost = cost / jnp.maximum(jnp.max(jnp.where(jnp.isfinite(cost), cost, 0.0)), 1e-30)
    low, high = map(jnp.float32, _PRICE_RANGE)
    cheapest = jnp.argmax(jnp.isfinite(cost), axis=1).astype(jnp.int32)
    bounds = _Choice(low, choose(low)), _Choice(high, cheapest)
    # Widths are carried, not chosen again at the price that was found: compiled elsewhere, the same
    # sum may round otherwise, and at the border a plan that fits becomes one that does not.
    low, high = lax.fori_loop(0, _BISECTIONS, halve, bounds)

    def spend(again, widths):
        most = jnp.where(again > 0, cost.shape[1], low.widths)
        return _fill(widths, most, cost, tiles, rows)

    return lax.fori_loop(0, 2, spend, high.widths)


def _fill(
    widths: jax.Array, most: jax.Array, cost: jax.Array, tiles: np.ndarray, rows: int
) -> jax.Array:
    """Spend what is left on widths up to ``most``: slots in the order of gain per row, each on its
    best width that fits."""
    size = jnp.asarray(tiles, jnp.int32)
    wider = jnp.arange(cost.shape[1], dtype=jnp.int32)[None]
    steps = wider - widths[:, None]
    now = jnp.take_along_axis(cost, widths[:, None], axis=1)
    gain = jnp.where((steps > 0) & (wider <= most[:, None]), now - cost, -jnp.inf)
    taken = size.astype(jnp.float32)[:, None] * jnp.maximum(steps, 1).astype(jnp.float32)
    order = jnp.argsort(-jnp.max(gain / taken, axis=1))

    def widen(i, carry):
        widths, free = carry
        slot = order[i]
        fits = steps[slot] <= free // size[slot]  # the product of both may be beyond int32
        fitting = jnp.where(fits, gain[slot], -jnp.inf)
        best = jnp.argmax(fitting)
        step = jnp.where(fitting[best] > 0, steps[slot, best], 0).astype(jnp.int32)
        return widths.at[slot].add(step), free - step * size[slot]

    widths, _ = lax.fori_loop(0, len(tiles), widen, (widths, room(rows, tiles, widths)))
    return widths
