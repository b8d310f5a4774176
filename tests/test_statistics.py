"""What the step measures, against the oracle, and the averages that are made of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stquant_jax as stquant
from stquant_jax.backends import loops, xla
from stquant_jax.codecs import lane_sum
from stquant_jax.engine.planning import layout_for
from stquant_jax.precision import Fixed, Sums, statistics, tally
from stquant_jax.precision.statistics import INTERVAL
from stquant_jax.rules.adam import Adam
from stquant_jax.storage import arena as rows
from stquant_jax.storage.settings import Storage
from tests import common, oracle
from tests import oracle_storage as storage
from tests.test_oracle import PLACES, gradients, read

LAYOUT = layout_for(common.zeros(), Fixed(), Storage())
WINDOW = 3
WEIGHTS = jnp.ones(len(Sums._fields))


def fused(g, state, b1, b2):
    """One step of the backend: digits of each leaf's sums come last."""
    rule, count = Adam(), state.count + 1
    scalars = rule.prepare(b1, b2, 1e-8, 0.0, count)
    packed = rows.Packed(state.arena, state.mu_scale, state.nu_scale, state.nu_row)
    grads, _ = LAYOUT.split([jnp.asarray(x) for x in jax.tree.leaves(g)])
    plan = state.precision.plan
    return xla.step(LAYOUT, Storage(), rule, scalars, count, grads, packed, plan, WEIGHTS)


@jax.jit
def sums_of(g, state, decays):
    return totals(fused(g, state, *decays)[2])


def totals(digits):
    """float32[leaves] of each statistic."""
    nothing = tally.nothing_tallied(digits.shape[-1])
    return tally.total(tally.add(nothing, digits, (0.0, 0.0)))


def by_leaf(x):
    """[leaves] -> name of a leaf -> its sum."""
    return dict(zip(PLACES, np.asarray(x), strict=True))


def renewed(state):
    """What is observed, the last steps included."""
    return state.precision.renewed(state.count).observed


@pytest.mark.parametrize(("mu", "nu"), [(2, 0), (3, 2), (4, 1), (5, 4), (8, 8)])
def test_sums(mu, nu):
    """Of the round-robin row of each tile, from the codes that the step leaves."""
    adam = oracle.Adam(b1=0.9, b2=0.99)
    state = common.init(common.zeros(), mu, nu, WINDOW)
    for count in range(1, 34):
        g, before = gradients(count), state
        _, state = common.update(g, state, adam.b1, adam.b2)
        if count not in (1, 3, 31, 32, 33):
            continue
        got = {k: by_leaf(x) for k, x in sums_of(g, before, np.float32(adam[:2]))._asdict().items()}
        old, new = read(before), read(state)
        for i, (name, place) in enumerate(PLACES.items()):
            x = storage.to_tiles(np.asarray(g[name], float), place)
            shrinkage = float(before.precision.plan.shrinkage[2 * i + 1])
            slot = oracle.Slot(mu, nu, WINDOW, shrinkage, seed=0, leaf=i)
            want = oracle.statistics(x, old[name], new[name], place, adam, slot, count)
            assert want.keys() == set(Sums._fields)
            for field, value in want.items():
                here = got[field][name]
                message = f"{field} {count}"
                most = np.minimum(value, tally.MOST).sum()
                np.testing.assert_allclose(here, most, 2e-3, 1e-9, err_msg=message)


def test_every_element_has_its_turn():
    """In 32 steps each is counted once."""
    state = common.init(common.zeros())
    elements = np.zeros(len(PLACES))
    for count in range(1, 33):
        g = common.gaussian(seed=count)
        elements += sums_of(g, state, np.float32([0.9, 0.999])).elements
        _, state = common.update(g, state)
    for name, got in by_leaf(elements).items():
        inside = PLACES[name].element >= 0
        # of groups that an element is in, where the layout cannot tell
        padding = ~inside & inside.any(-2, keepdims=True)
        assert inside.sum() <= got <= inside.sum() + padding.sum()
    assert by_leaf(elements)["tile"] == 128 * 32


def test_tiles_that_only_align():
    """They count for nothing."""
    layout = layout_for(common.zeros(), Fixed(), Storage(row_alignment=8))
    tx = stquant.scale_by_adam_q(precision=Fixed(), storage=Storage(row_alignment=8))
    state, rule = tx.init(common.zeros()), Adam()
    packed = rows.Packed(state.arena, state.mu_scale, state.nu_scale, state.nu_row)
    grads, _ = layout.split(jax.tree.leaves(common.gaussian()))
    decays, count = jnp.float32([0.9, 0.999]), jnp.int32(1)
    scalars = rule.prepare(*decays, 1e-8, 0.0, count)
    args = scalars, count, [jnp.asarray(g) for g in grads], packed, state.precision.plan, WEIGHTS
    _, _, digits = jax.jit(partial(xla.step, layout, Storage(), rule))(*args)
    got, want = totals(digits), sums_of(common.gaussian(), common.init(common.zeros()), decays)
    assert layout.tiles > LAYOUT.tiles
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_the_chunk_does_not_matter(chunk, monkeypatch):
    """The sums are the same to the bit, whatever number of tiles is computed together, where the
    longest leaf has ten."""
    state, g = common.init(common.zeros()), common.gaussian()
    _, state = common.update(g, state)
    decays = np.float32([0.9, 0.999])
    want = sums_of(g, state, decays)
    monkeypatch.setattr(loops, "chunk_of", lambda layout: chunk)
    got = jax.jit(lambda g, state, decays: totals(fused(g, state, *decays)[2]))(g, state, decays)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_lanes_by_halves():
    """In this order and no other: x[i] + x[i + 64], then 32, 16, 8, 4, 2, 1 apart."""
    x = want = np.float32(np.exp2(9 * np.random.default_rng(0).standard_normal((3, 1, 128))))
    while want.shape[-1] > 1:
        half = want.shape[-1] // 2
        want = want[..., :half] + want[..., half:]
    np.testing.assert_array_equal(jax.jit(lane_sum)(x), want[:, 0, 0])


def test_averages_survive_gradients_that_are_not_finite():
    """In one group, in a leaf, in all of them: the averages stay finite, and go on afterwards."""
    state = common.init(common.zeros())
    bad = common.gaussian()
    bad["tile"][5, 5] = np.nan
    bad["embed"][:] = np.inf
    for step in range(4):
        _, state = common.update(common.gaussian(seed=step), state)
    before = renewed(state)
    _, state = common.update(bad, state)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(renewed(state)))
    nothing = {name: np.full_like(x, np.nan) for name, x in bad.items()}
    for g in (nothing, bad, common.gaussian(seed=9)):
        _, state = common.update(g, state)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(renewed(state)))
    assert np.all(renewed(state).weight > before.weight)


def test_renewed_in_time():
    """Without a policy that asks for it, every hundred steps: the tally is empty again."""
    state = common.init(common.zeros(common.TILE))
    for step in range(INTERVAL + 1):
        before = state
        _, state = common.update(common.gaussian(common.TILE, seed=step), state)
        assert int(state.precision.tally.steps) == (step + 1) % INTERVAL
        if step + 1 == INTERVAL:
            weight = np.asarray(state.precision.observed.weight)
            np.testing.assert_allclose(weight, 1 - (63 / 64) ** INTERVAL, rtol=1e-5)
        else:
            same = jax.tree.map(np.array_equal, state.precision[1], before.precision[1])
            assert all(jax.tree.leaves(same))
    assert np.all(renewed(state).weight > weight)


# --- averages and estimates ---

DECAYS = (0.9, 0.99)
observe_many = jax.jit(partial(statistics.observe, decays=tuple(map(jnp.float32, DECAYS))))


def observe(old, sums, nu_widths, count):
    """One step, as it comes from the backend."""
    decays = tuple(map(jnp.float32, DECAYS))
    weights = statistics.ageing(decays, jnp.asarray(count))
    sums = Sums(*(w * x for w, x in zip(weights, sums, strict=True)))
    return observe_many(old, sums, jnp.int32(1), nu_widths, count=count)


def constant(**values):
    """Sums of two leaves of energy 1, alike at every step."""
    filled = dict.fromkeys(Sums._fields, 0.0) | {"energy": 1.0} | values
    return Sums(*(jnp.full(2, filled[name], jnp.float32) for name in Sums._fields))


def after(steps, sums, widths=(4, 4), observed=None, start=0):
    observed = statistics.nothing_observed(2) if observed is None else observed
    for count in range(start + 1, start + steps + 1):
        observed = observe(observed, sums, jnp.array(widths), count=jnp.int32(count))
    return observed


def test_moving_averages():
    """A weight of 1/64 for the newest; divided by the weight of all, a constant is itself."""
    random = np.random.default_rng(0)
    average, weight, observed = 0.0, 0.0, statistics.nothing_observed(2)
    for count in range(1, 50):
        x = random.random(2).astype(np.float32)
        observed = observe(observed, constant(gradient=x), jnp.array([4, 4]), count=count)
        average, weight = 63 / 64 * average + x / 64, 63 / 64 * weight + 1 / 64
        np.testing.assert_allclose(observed.sums.gradient, average / weight, rtol=1e-5)
    np.testing.assert_allclose(after(20, constant(nu=3.0)).sums.nu, 3, rtol=1e-5)


@pytest.mark.parametrize("start", [0, 7, 300])
@pytest.mark.parametrize("widths", [(4, 4), (0, 4)])
def test_many_steps_at_once(start, widths):
    """As one after the other, of statistics that do not change."""
    sums = constant(mu_error=0.02, nu_error=0.03, spread=0.3, saturated=0.1, gradient=2.0)
    old, widths = after(start, constant(mu_error=0.01, nu_error=0.02), widths), jnp.array(widths)
    old = statistics.forget(old, jnp.array([True, True]))
    for steps in (1, 2, 50):
        want, count = old, start + steps
        for t in range(start + 1, count + 1):
            want = observe_many(want, sums, jnp.int32(1), widths, count=jnp.int32(t))
        got = observe_many(old, sums, jnp.int32(steps), widths, count=jnp.int32(count))
        for name, x, y in zip(got._fields, got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, err_msg=f"{name} {steps}")


def test_no_steps_at_all():
    """Nothing changes, whatever the sums are; not at the very start either, without decays."""
    old = after(30, constant(mu_error=0.02), widths=(0, 4))
    none = jnp.int32(0)
    got = observe_many(old, constant(nu=9.0), none, jnp.array([4, 4]), count=jnp.int32(30))
    jax.tree.map(np.testing.assert_array_equal, got, old)
    first, zero = statistics.nothing_observed(2), jnp.float32(0)
    got = statistics.observe(first, constant(), none, jnp.array([4, 0]), (zero, zero), none)
    jax.tree.map(np.testing.assert_array_equal, got, first)


@pytest.mark.parametrize("moment", [0, 1])
def test_errors_pile_up(moment):
    """D(t) = injected + (b n(t-1) / n(t))**2 D(t-1), of the averages as they are at t."""
    b, independence = DECAYS[moment], (1.0, statistics.NU_INDEPENDENCE)[moment]
    sums = constant(mu_error=0.02, nu_error=0.03)
    observed, want = statistics.nothing_observed(2), 0.0
    for count in range(1, 200):
        observed = observe(observed, sums, jnp.array([4, 4]), count=count)
        n, before = ((1 - b**t) / (1 - b) for t in (count, count - 1))
        averages = Sums(*np.asarray(observed.averages, float))
        injected = (averages.mu_error, averages.nu_error)[moment] / averages.energy
        # Of mu, what is carried on; of nu, which injects 1/n while it is young, what it does now.
        now = injected * b**2 if moment == 0 else injected * independence / (n * (1 - b))
        want = now + (b * before / n) ** 2 * want
        got = (observed.mu_noise, observed.nu_noise)[moment]
        np.testing.assert_allclose(got, want, rtol=1e-4)


def test_the_noise_of_old_moments():
    """In the end what has piled up is injected / (1 - b**2), and `noise` foretells it."""
    observed = after(1500, constant(mu_error=0.02, nu_error=0.03))
    mu, nu = statistics.noise(observed.averages, DECAYS)
    np.testing.assert_allclose(mu, 0.02 * 0.81 / (1 - 0.81), rtol=1e-3)
    np.testing.assert_allclose(nu, statistics.NU_INDEPENDENCE * 0.03 / (1 - 0.9801), rtol=1e-3)
    np.testing.assert_allclose(observed.mu_noise, mu, rtol=1e-3)
    np.testing.assert_allclose(observed.nu_noise, nu, rtol=1e-2)


def test_without_codes():
    """All of the spread is error, and it is taken to grow, unmeasured."""
    observed = after(100, constant(spread=0.5), widths=(0, 4))
    noise, spread = np.asarray(observed.nu_noise), np.asarray(observed.spread)
    np.testing.assert_allclose(noise[0], spread[0], rtol=1e-6)
    assert spread[0] > statistics.NU_SPREAD
    error = np.asarray(statistics.distortion(observed, jnp.array([0, 4])))
    np.testing.assert_allclose(error[1], spread[0], rtol=1e-6)
    assert error[3] <= max(noise[1], 1e-12)


def test_forgetting():
    """Of the leaves that changed: the averages start anew, what has piled up stays."""
    before = after(50, constant(mu_error=0.02, gradient=1.0))
    observed = statistics.forget(before, jnp.array([True, False]))
    assert not np.any(np.asarray(observed.averages)[:, 0]) and observed.weight[0] == 0
    np.testing.assert_array_equal(observed.averages[:, 1], before.averages[:, 1])
    np.testing.assert_array_equal(observed.mu_noise, before.mu_noise)
    again = after(3, constant(gradient=5.0), observed=observed, start=50)
    np.testing.assert_allclose(again.sums.gradient[0], 5.0, rtol=1e-5)


def test_nothing_measured():
    """Gradients that are zero, from the first step on: no error, no division by zero."""
    observed = after(10, constant(energy=0.0))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(observed))
    assert not np.any(observed.mu_noise) and not np.any(observed.nu_noise)


def test_moments_that_fade_to_zero():
    """In a living group mu may fade to nothing: its statistics stay finite, and are averaged on."""
    state = common.init(common.zeros(), 5, 4)
    for step in range(80):
        g = common.gaussian(seed=step)
        for x in g.values():
            x[: len(x) // 2] *= step < 3  # the first half sleeps, v still remembers it
        _, state = common.update(g, state, 0.5, 0.999)
    decoded = common.decode(state, common.zeros())
    asleep = np.asarray(decoded.mu["tile"])[:64] == 0
    assert asleep.all() and (np.asarray(decoded.nu["tile"])[:64] > 0).all()
    weight = np.asarray(renewed(state).weight)
    np.testing.assert_allclose(weight, 1 - (63 / 64) ** 80, rtol=1e-4)
