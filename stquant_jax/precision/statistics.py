"""What is measured of every slot, and the closed-loop error that is estimated from it.

The fused step reports sums over a sample of each tile's elements (`Sums`), which
`stquant_jax.precision.tally` adds up. Their moving averages tell how much error a step injects into
the update; how much of it is there at a time follows from the decay of the moment. An error in a
moment of decay b is carried from step t - 1 to step t by the factor

    b n(t-1) / n(t),    n(t) = (1 - b**t) / (1 - b)

(n steps weigh as much as the whole average), so the squared errors of independent steps pile up to

    D(t) = injected(t) + (b n(t-1) / n(t))**2 D(t-1)

which is t/3 injections while the moment is young and 1/(1 - b**2) in the end.

Averages and errors are renewed every K steps (`observe`), as if each of these had been like their
mean: K steps weigh in the averages as K equal ones, and all of them inject what the averages say in
the end. Plans move as rarely.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Steps that the averages reach back: twice the 32 in which every element is sampled once.
_MEMORY = 64
INTERVAL = 100  # steps between two renewals where no policy asks for others

# Injections of nu are far from independent: the dither rotates by the golden ratio, so that an
# element that was rounded up is rounded down when it is due. Piled up they come to this part of
# what independent ones would (benchmarks/results/allocation.png has the outcome).
NU_INDEPENDENCE = 0.25
# Part of nu's noise that shows in the measured spread of v inside groups.
_NOISE_IN_SPREAD = 0.5
_LEAST_SPREAD = 1e-4
# Growth of a spread that nothing measures, per memory of nu: a slot is tried again before long.
_CURIOSITY = 0.1

# Squared error of the update that a moment costs in the closed loop at each width, over the
# update's energy: what benchmarks/codec/closed_loop.py measured on its GPT and ViT streams, their
# geometric mean (tests/test_precision.py holds them to its table). Policies take from them how
# errors fall from width to width, and start with them.
MU_ERROR = (jnp.inf, jnp.inf, 0.328, 0.116, 0.031, 0.0085, 0.0023, 0.0009, 0.0005)
# Of codes alone: what is left of it is `shrunk` toward the prediction.
NU_NOISE = (jnp.inf, jnp.inf, 0.167, 0.0484, 0.0198, 0.0085, 0.0045, 0.0018, 0.0009)
NU_SPREAD = 0.0451  # of v inside groups; where nu has no codes it is the error


class Sums(NamedTuple):
    """Sums over the elements in one row of each tile: float32[tiles], or of leaves float32[leaves].

    The row is the round-robin row, so in 32 steps every element is counted once; a statistic
    of all elements at every step would tell little more and cost much more.
    """

    elements: jax.Array
    energy: jax.Array  # of the update
    mu_error: jax.Array  # energy that the rounding of mu puts into the update
    nu_error: jax.Array  # the same for nu
    spread: jax.Array  # energy that the update would be off if v were what group and row predict
    zeros: jax.Array  # codes of mu that stand for zero
    saturated: jax.Array  # energy where codes of nu are at the end of the window
    narrower: jax.Array  # energy where they would be in the next narrower window
    gradient: jax.Array  # magnitudes
    gradient2: jax.Array  # squares
    nu: jax.Array  # second moments


class Observed(NamedTuple):
    """Averages and estimates, float32[leaves]."""

    averages: jax.Array  # float32[statistics, leaves]: moving averages of `Sums`
    weight: jax.Array  # of the steps in them: from 0, when they were last reset, to 1
    mu_noise: jax.Array  # D of mu and of nu, over the update's energy
    nu_noise: jax.Array
    spread: jax.Array  # of v inside groups, over the update's energy, without the lattice's noise
    presumed: jax.Array  # what was thought of it when the slot got its codes
    maturity: jax.Array  # of those codes: the part of their memory that they were there for

    @property
    def sums(self) -> Sums:
        return Sums(*self.averages / jnp.maximum(self.weight, 1e-6)[None])


def nothing_observed(leaves: int) -> Observed:
    def full(value, *shape):
        return jnp.full((*shape, leaves), value, jnp.float32)

    return Observed(
        averages=full(0, len(Sums._fields)),
        weight=full(0),
        mu_noise=full(0),
        nu_noise=full(0),
        spread=full(NU_SPREAD),
        presumed=full(NU_SPREAD),
        maturity=full(1),
    )


def ageing(decays: tuple, count: jax.Array) -> jax.Array:
    """float32[statistics]: factors of the sums of step ``count`` as they are averaged. nu's
    injections fall as 1/n(t) while it is young, so they are taken as what they are to be in the
    end."""
    factors = Sums(*[jnp.float32(1)] * len(Sums._fields))
    return jnp.stack(factors._replace(nu_error=_filled(decays[1], count)))


def observe(
    old: Observed,
    sums: Sums,
    steps: jax.Array,
    nu_widths: jax.Array,
    decays: tuple,
    count: jax.Array,
) -> Observed:
    """Take steps into the averages that have not been.

    Args:
      old: as it was ``steps`` steps ago.
      sums: float32[leaves], of one step: the mean of each, times its factor of `ageing`.
      steps: int32[], how many; of none there is nothing new.
      nu_widths: int32[leaves].
      decays: of mu and nu, at the last step.
      count: int32[], updates done.
    """
    keep = (1 - 1 / _MEMORY) ** steps.astype(jnp.float32)
    averages = keep * old.averages + (1 - keep) * jnp.stack(sums)
    weight = keep * old.weight + (1 - keep)
    new = Sums(*averages)
    mu, nu = (_ratio(x, new.energy) for x in (new.mu_error, new.nu_error))
    left, piled = _piled_up(steps, decays, count)
    mu_noise = decays[0] ** 2 * mu * piled[0] + left[0] ** 2 * old.mu_noise
    nu_noise = NU_INDEPENDENCE * nu * piled[1] + left[1] ** 2 * old.nu_noise

    # Codes that start from the prediction show the spread as it grows into them.
    coded = nu_widths > 0
    maturity = jnp.where(coded, 1 - left[1] * (1 - old.maturity), 0.0)
    _, lattice = noise(averages, decays)
    shown = jnp.maximum(_ratio(new.spread, new.energy) - _NOISE_IN_SPREAD * lattice, 0.0)
    # The window cuts the tail of the spread off.
    shown /= jnp.square(1 - jnp.minimum(_ratio(new.saturated, new.energy), 0.5))
    spread = jnp.maximum(shown + (1 - maturity**2) * old.presumed, _LEAST_SPREAD)
    curious = old.spread * (1 + _CURIOSITY * (1 - decays[1])) ** steps.astype(jnp.float32)
    spread = jnp.where(coded, jnp.where(new.energy > 0, spread, old.spread), curious)
    presumed = jnp.where(coded, old.presumed, spread)
    # Without codes all of the spread is error, and it is the first codes' to work off.
    nu_noise = jnp.where(coded, nu_noise, spread)
    observed = Observed(averages, weight, mu_noise, nu_noise, spread, presumed, maturity)
    return jax.tree.map(lambda x, y: jnp.where(steps > 0, x, y), observed, old)


def _piled_up(
    steps: jax.Array, decays: tuple, count: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Of mu and of nu: the part of an error that is left after the last steps, and what D is after
    them of one injection a step; of nu, of one that falls to 1 as nu grows old."""

    def step(i, carry):
        left, piled = carry
        t = count - steps + 1 + i
        injected = 1.0, 1 / _filled(decays[1], t)
        carried = [_carried(decay, t) for decay in decays]
        left = [c * x for c, x in zip(carried, left, strict=True)]
        piled = [now + c**2 * x for now, c, x in zip(injected, carried, piled, strict=True)]
        return left, piled

    one, zero = jnp.float32(1), jnp.float32(0)
    return jax.lax.fori_loop(0, steps, step, ([one, one], [zero, zero]))


def forget(observed: Observed, changed: jax.Array) -> Observed:
    """Averages start anew for leaves whose codes mean something else from now on, bool[leaves]."""
    kept = jnp.where(changed, 0.0, 1.0)
    averages = observed.averages * kept[None]
    return observed._replace(averages=averages, weight=observed.weight * kept)


def noise(averages: jax.Array, decays: tuple) -> tuple[jax.Array, jax.Array]:
    """Error of mu and of nu's codes, over the update's energy, that the present widths lead to once
    the moments are old: injected / (1 - decay**2)."""
    sums = Sums(*averages)
    mu, nu = (_ratio(x, sums.energy) for x in (sums.mu_error, sums.nu_error))
    mu *= decays[0] ** 2 / (1 - decays[0] ** 2)
    return mu, NU_INDEPENDENCE * nu / (1 - decays[1] ** 2)


def distortion(observed: Observed, nu_widths: jax.Array) -> jax.Array:
    """float32[slots]: the estimated closed-loop error of each slot, over its leaf's energy."""
    nu = jnp.where(nu_widths == 0, observed.spread, shrunk(observed.nu_noise, observed.spread))
    return jnp.stack([observed.mu_noise, nu], axis=1).reshape(-1)


def shrunk(noise: jax.Array, spread: jax.Array) -> jax.Array:
    """Error that is left of a noise by shrinking optimally toward a mean with this spread around
    it (James and Stein): noise * spread / (noise + spread)."""
    return 1 / (1 / jnp.maximum(noise, 1e-12) + 1 / jnp.maximum(spread, 1e-12))


def _filled(decay: jax.Array, count: jax.Array) -> jax.Array:
    """(1 - decay) n(t): the part of a moment's memory that t steps fill."""
    return 1 - decay ** count.astype(jnp.float32)


def _carried(decay: jax.Array, count: jax.Array) -> jax.Array:
    return decay * _filled(decay, count - 1) / _filled(decay, count)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
