"""`STQuant`: one decision per slot, by how its statistics stand against those of all slots."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax.precision.capacity import Capacity, is_number
from stquant_jax.precision.factors import OF_SUMS
from stquant_jax.precision.policy import (
    DEFAULT_WINDOW,
    Plan,
    PrecisionState,
    plan_with,
)
from stquant_jax.precision.slots import MU, NU, Slots, is_whole, room
from stquant_jax.precision.statistics import Sums, forget
from stquant_jax.storage.indexing import traced_only

# Bits of (mu, nu) per octave of each statistic. What examples/select_factors.py fits, octaves of
# error per octave, over the octaves that a bit is worth: 2 of mu, 1 of nu. It finds R^2 = 0.98 and
# 0.82 for its three best statistics of each moment; mu's third adds 0.004 and is left out.
SELECTED = {
    "update": (0.9, 1.2),
    "cv": (-0.15, 0.0),
    "second_moment": (0.0, -0.7),
    "rms": (0.0, 0.7),
}
# The paper's three, with weights fitted in the same way: R^2 = 0.69 and 0.71.
PUBLISHED = {"rms": (0.7, 1.6), "cv": (-0.2, 0.1), "second_moment": (-0.7, -1.6)}


_MOST_TILES = 2**29


class Trend(NamedTuple):
    """What `STQuant` remembers.

    Attributes:
      octaves: float32[factors, 1], moving averages of log2 of each statistic over all leaves.
      weight: float32[], of the decisions in them: 0 before the first, 1 in the end.
      streak: int32[slots], decisions in a row that asked for more bits (+) or fewer (-).
    """

    octaves: jax.Array
    weight: jax.Array
    streak: jax.Array


@dataclass(frozen=True)
class STQuant(Capacity):
    """The policy of the STQuant paper as far as it is published, inside a fixed budget.

    Every ``interval`` steps each slot alone is moved to an adjacent width or left where it is, in
    time and memory linear in the slots:

        score  = sum_k weight_k log2(statistic_k / moving average of statistic_k over all leaves)
        wanted = average width of the moment in the first plan + score
        up     if wanted - width >  up * step,  ``patience`` decisions in a row
        down   if width - wanted >  down * step, likewise, and only to make room

    with ``step`` the distance to the adjacent width. A slot that is moved comes nearer to what it
    wants: on constant statistics the plan comes to rest. If not all slots that are due to grow fit,
    those that ask for least wait; rows that are left over stay free until they suffice for one.

    Published are the three statistics (gradient RMS, a coefficient of variation, a statistic of the
    second moment), that each is compared with a global moving average, and one decision per layer
    and moment every K steps. Ours are: the score, its weights, K, thresholds, allowed widths, the
    moving average's decay (of logarithms, leaves weighted by size), patience, and the coefficient
    of variation as std / mean of the magnitudes of a leaf's gradients. The paper saves memory where
    bits are dropped; here the arena is fixed, so bits are dropped only where others take them.
    In the paper's own ablation the spatial part saves memory, not quality; docs/results/policy.md
    has what it does here, beside `Budget`, which measures what each bit would save.

    The default statistics are not the published ones but those that greedy selection keeps of the
    ones the fused step offers, because they tell more of the measured error: the update's RMS
    (squared, it scales the error) and the coefficient of variation for mu, update, gradient and
    second moment for nu. See ``SELECTED`` and ``PUBLISHED`` in ``stquant_jax.precision.stquant``
    and ``examples/select_factors.py``.

    Attributes:
      bits: all-in bits per state element, as for `Budget`.
      interval: steps between decisions; None keeps the first plan.
      factors: statistic -> bits of (mu, nu) per octave of it. Statistics are "rms", "cv",
        "second_moment" and "update".
      up: part of a step, at least 0.5, that a slot must miss to grow.
      down: the same to shrink.
      patience: decisions in a row that must agree before a slot moves.
      decay: of the moving averages, per decision.
      pins: given widths for some leaves: regular expression of the leaf's path -> width, (mu, nu)
        or "exact".

    Raises:
      ValueError: a field out of range; at ``init``, a budget below the floor or a pin that matches
        no leaf.

    References:
      `STQuant <https://arxiv.org/abs/2604.06836>`_, 2026.
    """

    bits: float = 5.0
    interval: int | None = 100
    factors: Mapping[str, tuple[float, float]] | tuple = tuple(SELECTED.items())
    up: float = 0.6
    down: float = 0.6
    patience: int = 2
    decay: float = 0.5  # longer, and all slots fall behind as updates shrink at the start
    pins: Mapping[str, Any] | tuple = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "factors", _checked_factors(self.factors))
        for name in ("up", "down"):
            value = getattr(self, name)
            if not is_number(value) or value < 0.5:
                raise ValueError(
                    f"STQuant({name}={value!r}): expected a number of at least 0.5; below, a slot "
                    "would move past what it wants"
                )
        if not is_whole(self.patience, 1):
            raise ValueError(
                f"STQuant(patience={self.patience!r}): expected a number of decisions of at least "
                "1, below 2**31"
            )
        if not is_number(self.decay) or not 0 <= self.decay < 1:
            raise ValueError(f"STQuant(decay={self.decay!r}): expected a number from 0 to below 1")

    def first_memory(self, slots: Slots) -> Trend:
        return Trend(
            jnp.zeros((len(self.factors), 1), jnp.float32),
            jnp.zeros((), jnp.float32),
            jnp.zeros((len(slots.tiles),), jnp.int32),
        )

    def decide(
        self, slots: Slots, rows: int, state: PrecisionState, decays: tuple, count: jax.Array
    ) -> PrecisionState:
        del decays, count
        plan, observed = state.plan, state.observed
        score, known, memory = self._score(slots, observed.sums, state.memory)
        ends = (np.asarray(x, np.float32) for x in (slots.narrowest, slots.widest))
        wanted = jnp.clip(self._average(slots, rows) + score, *ends)
        wish = jnp.where(known, wanted - plan.widths.astype(jnp.float32), 0.0)
        widths, streak = self._move(slots, rows, plan.widths, wish, memory.streak)
        new = _replan(slots, plan, widths)
        changed = widths != plan.widths
        observed = forget(observed, changed[MU::2] | changed[NU::2])
        return state._replace(plan=new, observed=observed, memory=memory._replace(streak=streak))

    def _score(self, slots: Slots, sums: Sums, memory: Trend) -> tuple[jax.Array, jax.Array, Trend]:
        """Bits that each slot asks for beyond the average, where that is known, the new trend."""
        octaves = jnp.stack([jnp.log2(OF_SUMS[name](sums)) for name, _ in self.factors])
        known = jnp.all(jnp.isfinite(octaves), axis=0) & (sums.gradient > 0)
        octaves = jnp.where(known, octaves, 0.0)
        size = jnp.where(known, jnp.asarray(slots.tiles[MU::2], jnp.float32), 0.0)
        mean = (octaves @ size / jnp.maximum(jnp.sum(size), 1.0))[:, None]
        new = jnp.where(jnp.any(known), 1 - self.decay, 0.0)
        weight = memory.weight + new * (1 - memory.weight)
        trend = memory.octaves + new * (mean - memory.octaves)
        relative = octaves - trend / jnp.maximum(weight, 1e-6)
        weights = jnp.asarray([pair for _, pair in self.factors], jnp.float32)
        score = jnp.where(known[:, None], relative.T @ weights, 0.0).reshape(-1)
        return score, jnp.repeat(known, 2), Trend(trend, weight, memory.streak)

    def _average(self, slots: Slots, rows: int) -> np.ndarray:
        """float[slots]: width of the slot's moment in the first plan, mean over all free rows."""
        widths = self.first_widths(slots, rows)
        size = slots.tiles * (slots.narrowest < slots.widest)
        average = np.zeros(len(widths), np.float32)
        for moment in (MU, NU):
            here = slots.moment == moment
            average[here] = np.sum((widths * size)[here]) / max(np.sum(size[here]), 1)
        return average

    def _move(
        self, slots: Slots, rows: int, widths: jax.Array, wish: jax.Array, streak: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """New widths, each at most one step off, that fit; the new streaks."""
        lower, higher = (
            jnp.take_along_axis(jnp.asarray(table), widths[:, None], axis=1)[:, 0]
            for table in _adjacent(slots.allowed)
        )
        tiles = jnp.asarray(slots.tiles, jnp.int32)
        more, less = higher - widths, widths - lower
        up = (more > 0) & (wish > self.up * more.astype(jnp.float32))
        down = (less > 0) & (-wish > self.down * less.astype(jnp.float32))
        verdict = up.astype(jnp.int32) - down.astype(jnp.int32)
        streak = jnp.where(jnp.sign(streak) == verdict, streak + verdict, verdict)
        streak = jnp.clip(streak, -self.patience, self.patience)
        due = jnp.abs(streak) == self.patience
        cost = jnp.where(due & up, tiles * more, 0)
        freed = jnp.where(due & down, tiles * less, 0)

        def grow(free, cost):
            fits = (cost > 0) & (cost <= free)
            return free - jnp.where(fits, cost, 0), fits

        # Those that ask for most come first; as many others yield as that takes.
        order = jnp.argsort(wish)
        place = jnp.argsort(order)
        free = self._counted(room(rows, slots.tiles, widths), slots)
        _, fits = lax.scan(grow, free + jnp.sum(freed), cost[order], reverse=True)
        grows = fits[place]
        missing = jnp.sum(jnp.where(grows, cost, 0)) - free
        before = jnp.cumsum(freed[order]) - freed[order]
        shrinks = (freed > 0) & (before[place] < missing)
        widths = jnp.where(grows, higher, jnp.where(shrinks, lower, widths))
        return widths, jnp.where(grows | shrinks, 0, streak)

    def _counted(self, free: jax.Array, slots: Slots) -> jax.Array:
        """``free``, unless sums of what slots ask for are beyond int32: a step is two bits at most,
        and there may be as much free as all ask for."""
        tiles = int(np.sum(slots.tiles, dtype=np.int64))
        if tiles <= _MOST_TILES:
            return free
        return traced_only(
            free,
            f"{type(self).__name__}(interval={self.interval}) with {tiles:,} tiles of 4096 "
            f"elements in both moments: expected at most {_MOST_TILES:,}, or interval=None, or "
            "another policy",
        )


def _replan(slots: Slots, plan: Plan, widths: jax.Array) -> Plan:
    """Windows and shrinkage that go with new widths. Growing is lossless in the same window."""
    keeps = (widths == plan.widths) | ((plan.widths > 0) & (widths > plan.widths))
    windows = jnp.where(keeps, plan.windows, jnp.asarray(DEFAULT_WINDOW, jnp.int32)[widths])
    return plan_with(slots.moment, widths, windows, jnp)


def _adjacent(allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32[slots, 9] twice: the next narrower and the next wider allowed width; the width itself
    where there is none."""
    here = np.arange(allowed.shape[1])
    off = here - here[:, None]  # [from, to]
    nearest = [
        np.where(allowed[:, None] & (sign * off > 0), np.abs(off), len(here)).min(axis=2)
        for sign in (-1, 1)
    ]
    steps = [np.where(step < len(here), step, 0) for step in nearest]
    return (here - steps[0]).astype(np.int32), (here + steps[1]).astype(np.int32)


def _checked_factors(factors: Any) -> tuple:
    try:
        items = tuple((name, tuple(pair)) for name, pair in dict(factors).items())
    except (TypeError, ValueError):
        items = ()
    sound = (
        name in OF_SUMS and len(pair) == 2 and all(map(is_number, pair)) for name, pair in items
    )
    if not items or not all(sound):
        raise ValueError(
            f"STQuant(factors={factors!r}): expected a mapping from statistics, of "
            f"{', '.join(OF_SUMS)}, to bits of (mu, nu) per octave"
        )
    return items
