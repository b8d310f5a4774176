"""`Budget`: bits go where they save most error of the update, inside a budget that counts all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stquant_jax.precision.allocate import allocate
from stquant_jax.precision.capacity import Capacity, is_number
from stquant_jax.precision.policy import DEFAULT_WINDOW, WINDOWS, Plan, PrecisionState
from stquant_jax.precision.slots import MU, NU, WIDEST, Slots, is_whole
from stquant_jax.precision.statistics import (
    MU_ERROR,
    NU_NOISE,
    NU_SPREAD,
    Observed,
    forget,
    noise,
    shrunk,
)

# Share of the update's energy at the end of nu's window beyond which the window widens, and share
# beyond 0.6 of it below which it narrows; by width. Clipping costs more the finer the lattice is.
# From the windows that served best on the streams of benchmarks/codec/closed_loop.py. While nu is
# young more is allowed, up to `_WIDEN_YOUNG`.
_WIDEN_YOUNG = (1.0, 1.0, 0.35, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
_WIDEN = (1.0, 1.0, 0.33, 0.06, 0.03, 0.009, 0.006, 0.004, 0.002)
_NARROW = (0.0, 0.0, 0.5, 0.1, 0.05, 0.025, 0.012, 0.005, 0.0025)

_BROKEN_PROMISE = 1e3  # weight of an error above max_distortion
_LEAST_SHARE = 1e-6  # of the largest leaf's energy: leaves without gradients cost next to nothing
_LEAST = 1e-30


class Told(NamedTuple):
    """What `Budget` tells of its last decision."""

    unmet: jax.Array  # bool[slots]: above max_distortion, and the budget holds no more


@dataclass(frozen=True)
class Budget(Capacity):
    """Fill a budget that counts everything: planes, scales, exact leaves, schedule, padding.

    Every ``interval`` steps, widths move to where they lower the error of the update most per row,
    at most one step per slot. What a slot's error would be at each width is estimated from the
    error that its rounding was measured to inject (``stquant_jax.precision.statistics``):

        mu:  N(w)                      nu:  N(w) S / (N(w) + S),  S alone at width 0

    with N the noise of the codes piled up over the moment's memory, S the spread of v inside
    groups. The windows of nu follow the share of its codes at their end, its shrinkage is N/(N+S).
    A slot without codes of nu cannot tell S, which is taken to grow slowly until it is tried again.

    Attributes:
      bits: all-in bits per state element; the state takes at most bits/32 of the bytes of Optax's
        float32 Adam state.
      interval: steps between decisions; None keeps the first plan.
      warmup: steps before the first decision.
      hysteresis: a slot keeps its width unless another saves this part of its error.
      max_distortion: promise for every slot, as squared error over the energy of its leaf's update.
        Slots above it come first; where the budget cannot hold it, `stquant.metrics` says so
        (``unmet``), and `stquant.resize` moves to another budget.
      pins: given widths for some leaves: regular expression of the leaf's path -> width, (mu, nu)
        or "exact".

    Raises:
      ValueError: a field out of range; at ``init``, a budget below the floor or a pin that matches
        no leaf.
    """

    bits: float = 5.0
    interval: int | None = 100
    warmup: int = 100
    hysteresis: float = 0.1
    max_distortion: float | None = None
    pins: Mapping[str, Any] | tuple = ()

    def __post_init__(self):
        super().__post_init__()
        if not is_whole(self.warmup, 0):
            raise ValueError(
                f"Budget(warmup={self.warmup!r}): expected a number of steps, 0 or more, below "
                "2**31"
            )
        if not is_number(self.hysteresis) or not 0 <= self.hysteresis < 1:
            raise ValueError(
                f"Budget(hysteresis={self.hysteresis!r}): expected a number from 0 to below 1"
            )
        promise = self.max_distortion
        if promise is not None and not (is_number(promise) and promise > 0):
            raise ValueError(
                f"Budget(max_distortion={promise!r}): expected None or a number above 0"
            )

    def first_memory(self, slots: Slots) -> Told:
        return Told(jnp.zeros((len(slots.tiles),), bool))

    def decide(
        self, slots: Slots, rows: int, state: PrecisionState, decays: tuple, count: jax.Array
    ) -> PrecisionState:
        plan, observed = state.plan, state.observed
        trust = [1 - decay ** count.astype(jnp.float32) for decay in decays]
        error, nu_noise, spread = errors(observed, plan, decays, trust)

        energy = observed.sums.energy / jnp.maximum(jnp.max(observed.sums.energy), _LEAST)
        cost = jnp.repeat(jnp.maximum(energy, _LEAST_SHARE), 2)[:, None] * error
        promise = jnp.inf if self.max_distortion is None else self.max_distortion
        # What is promised comes before all else.
        cost *= jnp.where(error > promise, _BROKEN_PROMISE, 1.0)
        now = jnp.take_along_axis(cost, plan.widths[:, None], axis=1)
        moves = jnp.arange(WIDEST + 1)[None] != plan.widths[:, None]
        cost += jnp.where(moves, self.hysteresis * now, 0.0)
        cost = jnp.where(next_to(plan.widths, slots), cost, jnp.inf)

        widths = allocate(cost, slots.tiles, rows)
        windows = follow_saturation(plan, widths, observed, trust[1])
        shrinkage = shrinkages(widths, nu_noise, spread)
        left = jnp.take_along_axis(error, widths[:, None], axis=1)[:, 0]
        changed = (widths != plan.widths) | (windows != plan.windows)
        observed = forget(observed, changed[MU::2] | changed[NU::2])
        new = state._replace(
            plan=Plan(widths, windows, shrinkage), observed=observed, memory=Told(left > promise)
        )
        early = count < self.warmup
        return jax.tree.map(lambda old, new: jnp.where(early, old, new), state, new)


def errors(
    observed: Observed, plan: Plan, decays: tuple, trust: list[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The error of each slot at each width over its leaf's energy, float32[slots, 9]; the noise of
    nu's codes alone, float32[leaves, 9]; the spread of v, float32[leaves].

    What is measured of a moment counts as far as its memory is filled: it enters with the exponent
    ``trust`` = 1 - decay**t, the prior with the rest. A young second moment is not yet like what it
    will be.
    """
    mu, nu = noise(observed.averages, decays)
    default, mu_error, nu_error = (
        jnp.asarray(x, jnp.float32)[None] for x in (DEFAULT_WINDOW, MU_ERROR, NU_NOISE)
    )
    windows = plan.windows[NU::2, None].astype(jnp.float32) / default
    mu_prior = mu_error * jnp.ones_like(windows)
    nu_prior = nu_error * windows
    mu = _over_widths(mu, mu_prior, plan.widths[MU::2], trust[0])
    nu = _over_widths(nu, nu_prior, plan.widths[NU::2], trust[1])
    spread = NU_SPREAD * (observed.spread / NU_SPREAD) ** trust[1]
    error = jnp.stack([mu, shrunk(nu, spread[:, None])], axis=1).reshape(-1, WIDEST + 1)
    return error, nu, spread


def _over_widths(
    measured: jax.Array, prior: jax.Array, widths: jax.Array, trust: jax.Array
) -> jax.Array:
    """Noise at all widths: the prior's, times what the measured one is off it at the present width,
    where there are codes."""
    here = jnp.take_along_axis(prior, widths[:, None], axis=1)[:, 0]
    known = jnp.isfinite(here) & (measured > 0)
    factor = jnp.where(known, measured / jnp.where(known, here, 1.0), 1.0) ** trust
    return factor[:, None] * prior


def next_to(widths: jax.Array, slots: Slots) -> jax.Array:
    """bool[slots, 9]: allowed widths that are at most one step away."""
    rank = jnp.asarray(np.cumsum(slots.allowed, axis=1))
    here = jnp.take_along_axis(rank, widths[:, None], axis=1)
    return jnp.asarray(slots.allowed) & (jnp.abs(rank - here) <= 1)


def follow_saturation(
    plan: Plan, widths: jax.Array, observed: Observed, trust: jax.Array
) -> jax.Array:
    """int32[slots]: windows, one step wider where too much energy stands at the end, one narrower
    where little would. A slot whose width moves keeps its window."""
    sums = observed.sums
    energy = jnp.maximum(sums.energy, _LEAST)
    now, window = plan.widths[NU::2], plan.windows[NU::2]
    # What is clipped while nu is young is soon outweighed.
    most, at_most = (jnp.asarray(x, jnp.float32)[now] for x in (_WIDEN, _WIDEN_YOUNG))
    widen = sums.saturated > energy * jnp.minimum(most / trust, at_most)
    narrow = sums.narrower < energy * jnp.asarray(_NARROW, jnp.float32)[now]
    ladder = jnp.asarray(WINDOWS)
    rank = jnp.searchsorted(ladder, window, method="compare_all")
    rank += jnp.where(widen, 1, jnp.where(narrow, -1, 0))
    stays = (now != widths[NU::2]) | (sums.energy == 0)
    window = jnp.where(stays, window, ladder[jnp.clip(rank, 0, len(WINDOWS) - 1)])
    # the first codes of a slot start with the default
    window = jnp.where(now == 0, jnp.asarray(DEFAULT_WINDOW)[widths[NU::2]], window)
    return jnp.stack([jnp.zeros_like(window), window], axis=1).reshape(-1)


def shrinkages(widths: jax.Array, nu_noise: jax.Array, spread: jax.Array) -> jax.Array:
    """float32[slots]: of nu, noise / (noise + spread); all of it without codes; 0 for mu."""
    here = jnp.take_along_axis(nu_noise, widths[NU::2, None], axis=1)[:, 0]
    coded = jnp.isfinite(here)
    finite = jnp.where(coded, here, 0.0)
    share = jnp.where(coded, finite / (finite + spread), 1.0)
    return jnp.stack([jnp.zeros_like(share), share], axis=1).reshape(-1)
