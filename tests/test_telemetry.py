"""`metrics`: what a logger gets, at any time, inside a compiled step and outside."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stquant_jax as stquant
from stquant_jax.inspection.metrics import metrics
from tests import common

PARAMS = common.zeros()
PLAN = stquant.plan(PARAMS, stquant.Fixed(5, 4))
SLOTS, LEAVES = len(PLAN.slots), len(PLAN.slots) // 2
OF_ALL = {
    "megabytes": ((), jnp.float32),
    "count": ((), jnp.int32),
    "widths": ((SLOTS,), jnp.int32),
    "windows": ((SLOTS,), jnp.int32),
    "distortion": ((SLOTS,), jnp.float32),
    "nu_saturation": ((LEAVES,), jnp.float32),
    "mu_zeros": ((LEAVES,), jnp.float32),
    "spread": ((LEAVES,), jnp.float32),
}
OF_BUDGET = {"unmet": ((SLOTS,), jnp.bool_), "promise_kept": ((), jnp.bool_)}


def after(steps, state, gradient=lambda step: common.gaussian(seed=step, spread=0.2)):
    for step in range(steps):
        _, state = common.update(gradient(step), state)
    return state


@pytest.mark.parametrize(
    ("precision", "names"),
    [(stquant.Fixed(5, 4), OF_ALL), (stquant.Budget(5.0), OF_ALL | OF_BUDGET)],
    ids=["fixed", "budget"],
)
def test_names_and_shapes(precision, names):
    """The same from the first step on; a policy adds its own."""
    state = stquant.scale_by_adam_q(precision=precision).init(PARAMS)
    got = metrics(state)
    assert {name: (x.shape, x.dtype) for name, x in got.items()} == names
    chex.assert_tree_all_finite(got)
    assert not got["mu_zeros"].any() and not got["nu_saturation"].any()
    np.testing.assert_allclose(got["distortion"][::2], 0)
    assert got["widths"].tolist() == state.precision.widths.tolist()


def test_jit_and_wrappers():
    """In a compiled function and out of it, of the state itself and of one around it."""
    state = after(3, common.init(PARAMS))
    got = metrics(state)
    chex.assert_trees_all_close(jax.jit(metrics)(state), got, rtol=1e-6)
    chex.assert_trees_all_equal(metrics((optax.EmptyState(), {"adam": state})), got)
    assert int(got["count"]) == 3
    assert got["widths"].tolist() == [5, 4] * LEAVES
    for share in ("mu_zeros", "nu_saturation"):
        assert np.all((got[share] >= 0) & (got[share] <= 1))
    for part in got["distortion"][::2], got["distortion"][1::2]:
        assert np.all((part > 0) & (part < 1))
    assert np.all((got["spread"] > 0) & (got["spread"] < 10))  # of single gradients, nearly


def test_distortion_falls_with_the_width():
    few, many = (metrics(after(3, common.init(PARAMS, mu)))["distortion"][::2] for mu in (3, 6))
    assert np.all(few > 4 * many)


def test_zeros():
    """Every second element without gradient: half of the codes."""
    odd = {"tile": 1e-3 * (np.indices((128, 32), np.float32).sum(0) % 2)}
    state = after(2, common.init(odd, 8, 8), lambda step: odd)
    assert float(metrics(state)["mu_zeros"][0]) == pytest.approx(0.5)


def test_outlives_donation():
    state = common.init(PARAMS)
    told = metrics(state)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert state.arena.is_deleted()
    assert int(told["count"]) == 0 and told["widths"].tolist() == [5, 4] * LEAVES


def test_promise():
    """Kept unless a slot is above it."""
    state = stquant.scale_by_adam_q(precision=stquant.Budget(5.0)).init(PARAMS)
    assert metrics(state)["promise_kept"]
    memory = state.precision.memory
    memory = memory._replace(unmet=memory.unmet.at[3].set(True))
    told = metrics(state._replace(precision=state.precision._replace(memory=memory)))
    assert not told["promise_kept"]
    assert np.flatnonzero(told["unmet"]).tolist() == [3]
