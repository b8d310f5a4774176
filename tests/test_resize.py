"""`resize`: the same moments in another arena, to go on with."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stquant_jax as stquant
from stquant_jax.conversion.resize import resize
from stquant_jax.precision.policy import DEFAULT_SHRINKAGE, DEFAULT_WINDOW
from tests import common

PARAMS = common.zeros()


@cache
def trained(mu=5, nu=4, window=None):
    """A state after three steps; its arena has room for all widths, so that programs are few."""
    state = common.init(PARAMS, mu, nu, window)
    for step in range(3):
        _, state = common.update(common.gaussian(seed=step), state)
    return state


def moments(state):
    """As float32 trees, from an arena of any size through one program."""
    room = common.init(PARAMS).arena.shape[0]
    arena = jnp.pad(state.arena, ((0, room - state.arena.shape[0]), (0, 0)))
    return common.decode(state._replace(arena=arena), PARAMS)


def widths(state):
    return np.asarray(state.precision.widths).reshape(-1, 2)


@pytest.mark.parametrize(
    "precision",
    [
        stquant.Budget(6.0),
        stquant.Budget(8.0, interval=None),
        stquant.Fixed(5, 8),
        stquant.Fixed(8, 4, pins={"tile": (5, 6)}),
    ],
    ids=str,
)
def test_growing_loses_nothing(precision):
    """Every decoded moment is the same to the bit, in just the bytes that `plan` promises."""
    state = trained()
    grown = resize(state, PARAMS, precision)
    assert np.all(widths(grown) >= widths(state)) and np.any(widths(grown) > widths(state))
    chex.assert_trees_all_equal(moments(grown), moments(state))
    assert np.all(grown.precision.plan.windows == state.precision.plan.windows)
    assert common.nbytes(grown) == stquant.plan(PARAMS, precision).total_bytes


def test_first_codes_of_nu():
    """From width 0 they begin on the prediction, in the default window and with its shrinkage."""
    state = trained(5, 0)
    grown = resize(state, PARAMS, stquant.Fixed(5, 4))
    chex.assert_trees_all_equal(moments(grown), moments(state))
    assert np.all(grown.precision.plan.windows[1::2] == DEFAULT_WINDOW[4])
    assert not grown.precision.plan.windows[::2].any()
    np.testing.assert_allclose(grown.precision.plan.shrinkage[1::2], DEFAULT_SHRINKAGE[4])
    assert not grown.precision.plan.shrinkage[::2].any()


def test_kept_window():
    """A window is not changed in passing: that would round."""
    state = trained(5, 4, 6)
    grown = resize(state, PARAMS, stquant.Fixed(5, 5, window=2))
    assert np.all(grown.precision.plan.windows[1::2] == 6)
    chex.assert_trees_all_equal(moments(grown), moments(state))


def test_shrinking_rounds():
    """Codes are coarser, what they stand for on average is not; lengths of groups stay."""
    state = trained(8, 8)
    shrunk = resize(state, PARAMS, stquant.Fixed(5, 4))
    assert widths(shrunk).tolist() == [[5, 4]] * len(widths(shrunk))
    assert common.nbytes(shrunk) == stquant.plan(PARAMS, stquant.Fixed(5, 4)).total_bytes
    got, want = moments(shrunk), moments(state)
    for name in ("embed", "ragged", "stack", "tile"):
        for moment in ("mu", "nu"):
            x, y = (np.asarray(getattr(tree, moment)[name]) for tree in (got, want))
            assert np.linalg.norm(x - y) < 0.25 * np.linalg.norm(y)
        np.testing.assert_allclose(got.nu[name].sum(), want.nu[name].sum(), rtol=0.01)
    chex.assert_trees_all_equal(got.mu["bias"], want.mu["bias"])
    assert int(shrunk.count) == 3


def test_smaller_budget():
    """The least useful bits go; the budget is kept. (At others than this one, rows that are left
    over are enough for more bits in another leaf.)"""
    state = resize(trained(), PARAMS, stquant.Budget(5.0))
    small = resize(state, PARAMS, stquant.Budget(4.6))
    assert common.nbytes(small) <= 4.6 / 32 * (4 + 8 * sum(x.size for x in PARAMS.values()))
    assert np.all(widths(small) <= widths(state)) and np.any(widths(small) < widths(state))
    with pytest.raises(ValueError, match="below the floor: the smallest budget"):
        resize(state, PARAMS, stquant.Budget(0.5))


def test_same_policy():
    """Nothing changes, not even what was measured; other leaves' statistics stay too."""
    state = resize(trained(), PARAMS, stquant.Fixed(5, 4))
    chex.assert_trees_all_equal(resize(state, PARAMS, stquant.Fixed(5, 4)), state)
    pinned = resize(state, PARAMS, stquant.Fixed(5, 4, pins={"stack": 6}))
    assert widths(pinned).tolist() == [[5, 4], [5, 4], [6, 6], [5, 4]]
    old, new = state.precision.observed, pinned.precision.observed
    assert old.weight.tolist() != [0] * 4
    assert new.weight.tolist() == [*old.weight[:2].tolist(), 0, *old.weight[3:].tolist()]
    chex.assert_trees_all_equal(new.mu_noise, old.mu_noise)


@pytest.mark.thorough
def test_in_a_run():
    """Of an optimizer's state all else stays, and training goes on with the new optimizer."""
    shapes = common.TILE | {"bias": (40,)}
    params = common.zeros(shapes)
    budgets = [stquant.Budget(bits, interval=None) for bits in (5.0, 7.0)]
    old, new = (
        optax.chain(stquant.scale_by_adam_q(precision=budget), optax.trace(0.5))
        for budget in budgets
    )
    state, step = old.init(params), jax.jit(old.update)
    for seed in range(2):
        _, state = step(common.gaussian(shapes, seed), state)
    resized = resize(state, params, budgets[1])
    chex.assert_trees_all_equal_shapes_and_dtypes(resized, new.init(params))
    chex.assert_trees_all_equal(resized[1], state[1])

    grads, decoded = common.gaussian(shapes, 2), stquant.to_optax(resized[0], params)
    want, _ = optax.scale_by_adam().update(grads, decoded)
    got, updated = jax.jit(new.update)(grads, resized)
    got = jax.tree.map(lambda update, trace: update - 0.5 * trace, got, resized[1].trace)
    for name in params:
        assert np.linalg.norm(got[name] - want[name]) < 0.06 * np.linalg.norm(want[name])
    assert 5.0 < stquant.report(updated, params).bits <= 7.0
