"""`Budget` in training: bits go where the error is, inside the bytes that were promised."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stquant_jax as stquant
from stquant_jax.storage.arena import slot_tiles
from stquant_jax.storage.layout import layout_of
from stquant_jax.storage.settings import Storage
from tests import common

SHAPE = (128, 256)  # eight tiles
LEAVES = ("even", "spread")
PARAMS = {name: jnp.zeros(SHAPE) for name in LEAVES}
B2 = 0.95  # nu remembers 20 steps: a policy soon trusts what it sees


TX = stquant.scale_by_adam_q(b2=B2, precision=stquant.Budget(4.0, interval=5, warmup=0))
UPDATE = jax.jit(TX.update)


def scales():
    """All elements alike in one leaf; in the other each has a scale of its own."""
    random = np.random.default_rng(0)
    return {"even": np.ones(SHAPE), "spread": np.exp(1.2 * random.standard_normal(SHAPE))}


@partial(jax.jit, static_argnums=(0, 3))
def run(precision, state, key, steps):
    """Steps on Gaussian gradients of these scales; the state, and metrics after each step."""
    tx = stquant.scale_by_adam_q(b2=B2, precision=precision)
    scale = {name: jnp.asarray(1e-3 * x, jnp.float32) for name, x in scales().items()}

    def step(state, key):
        noise = jax.random.normal(key, SHAPE)
        _, state = tx.update({name: x * noise for name, x in scale.items()}, state)
        return state, stquant.metrics(state)

    return jax.lax.scan(step, state, jax.random.split(key, steps))


@cache
def trained(precision):
    state = stquant.scale_by_adam_q(b2=B2, precision=precision).init(PARAMS)
    return run(precision, state, jax.random.key(0), 400)


def rows_used(widths):
    return np.asarray(widths) @ slot_tiles(layout_of(PARAMS, Storage()))


@pytest.mark.thorough
def test_bits_go_where_the_spread_is():
    state, told = trained(stquant.Budget(4.0, interval=20))
    first, last = np.asarray(told["widths"])[[0, -1]]
    even, spread = last[1::2]
    assert first[1] == first[3] and spread > even
    assert told["windows"][-1, 3] > told["windows"][-1, 1]
    shrinkage = np.asarray(state.precision.plan.shrinkage)
    assert shrinkage[3] < shrinkage[1] and not shrinkage[0::2].any()
    assert told["spread"][-1, 1] > 3 * told["spread"][-1, 0]


def test_every_plan_fits_and_moves_one_step():
    state, told = trained(stquant.Budget(4.0, interval=20))
    widths = np.asarray(told["widths"])
    assert np.all(rows_used(widths) <= state.arena.shape[0])
    moved = np.flatnonzero(np.any(np.diff(widths, axis=0), axis=1)) + 2  # counts
    assert len(moved) and np.all(moved % 20 == 0) and moved[0] >= 100  # the warm-up
    allowed = {2: (2, 3, 4, 5, 6, 7, 8), 0: (0, 2, 3, 4, 5, 6, 7, 8)}
    for slot, column in enumerate(widths.T):
        ladder = list(allowed[0 if slot % 2 else 2])
        steps = np.diff([ladder.index(w) for w in column])
        assert np.max(np.abs(steps)) <= 1


@pytest.mark.thorough
def test_bytes_stay_and_nothing_compiles_again():
    precision = stquant.Budget(4.0, interval=20)
    state = stquant.scale_by_adam_q(b2=B2, precision=precision).init(PARAMS)
    before = common.nbytes(state)
    compiled = run._cache_size()
    state, told = run(precision, state, jax.random.key(0), 400)
    state, more = run(precision, state, jax.random.key(1), 400)
    assert run._cache_size() <= compiled + 1
    assert common.nbytes(state) == before <= 4.0 / 32 * 16 * 128 * 256
    assert len(np.unique(np.concatenate([told["widths"], more["widths"]]), axis=0)) > 1


@pytest.mark.thorough
def test_promise():
    """Slots above the promise come first; where the budget cannot keep it, metrics say so, and in a
    larger budget it is kept."""
    tight = stquant.Budget(3.0, interval=20, max_distortion=0.004)
    state, told = trained(tight)
    assert told["unmet"][-1].any() and not told["promise_kept"][-1]
    wide = stquant.Budget(8.0, interval=20, max_distortion=0.004)
    state = stquant.resize(state, PARAMS, wide)
    state, told = run(wide, state, jax.random.key(1), 400)
    assert told["promise_kept"][-1] and not told["unmet"][-1].any()


POLICIES = [
    stquant.Budget(4.0, interval=20),
    stquant.STQuant(4.0, interval=20, factors={"rms": (2, 2)}, up=0.5, patience=1),
]


@pytest.mark.parametrize("precision", POLICIES, ids=lambda x: type(x).__name__)
def test_reset(precision):
    """With all arrays set to zero, its plan too, a state goes on as a fresh one, to the bit."""
    state, told = trained(precision)
    assert np.any(told["widths"][-1] != told["widths"][0])
    zeros = jax.tree.map(jnp.zeros_like, state)
    again = run(precision, zeros, jax.random.key(0), 400)
    chex.assert_trees_all_equal(again, (state, told))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_gradients_leave_the_plan_sound(bad):
    """They show in the update, not in the plan."""
    update, state = UPDATE, TX.init(PARAMS)
    for i in range(30):
        noise = np.random.default_rng(i).standard_normal(SHAPE)
        grads = {name: np.float32(x * noise) for name, x in scales().items()}
        if i == 12:
            grads["even"][:] = bad
        updates, state = update(grads, state)
        assert rows_used(state.precision.widths) <= state.arena.shape[0]
    assert not np.isfinite(updates["even"]).any() and np.isfinite(updates["spread"]).all()
    for name, x in stquant.metrics(state).items():
        assert np.isfinite(x).all(), name
    assert set(np.asarray(state.precision.widths).tolist()) <= set(range(9))
