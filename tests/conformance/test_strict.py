"""JAX's strict modes: what is ours passes them all; an original of Optax's that is wrapped passes
those that it passes by itself."""

from contextlib import ExitStack
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import stquant_jax as stquant
from stquant_jax.wrapping.state import QuantizedState
from tests.conformance.shared import PACKED

PROMOTION = partial(jax.numpy_dtype_promotion, "strict")
RANKS = partial(jax.numpy_rank_promotion, "raise")
MODES = {"dtypes": PROMOTION, "ranks": RANKS, "leaks": jax.checking_leaks}
# For a leaf of one tile, its last group cut short, and the end of its lanes padding.
ELEMENTS = 4001


def params(shape=(48, 40), dtype=jnp.float32):
    return {"kernel": jnp.ones(shape, dtype)}


def training(tx):
    """The program of a short training, ``init`` included."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum(jnp.square(p["kernel"])))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=2)[0]

    jax.eval_shape(train, params())


def failure(f, *args):
    try:
        f(*args)
    except Exception as error:
        return error
    return None


def wraps(tx):
    """It runs an update of Optax's own."""
    is_quantized = lambda x: isinstance(x, QuantizedState)  # noqa: E731
    state = jax.eval_shape(tx.init, params())
    return any(map(is_quantized, jax.tree.leaves(state, is_leaf=is_quantized)))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_traced(case, mode):
    tx = case.optimizer(PACKED)
    with mode():
        tx.init(params())
        if wraps(tx) and failure(training, case.original()):
            pytest.skip("Optax's own does not pass")
        training(tx)


@pytest.mark.thorough
def test_op_by_op(case):
    """Without jit no NaN comes up on the way either, of finite gradients. Every mode at once."""
    tx, model = case.optimizer(PACKED), params(ELEMENTS)
    grads = np.random.default_rng(0).standard_normal(ELEMENTS)
    grads[:32], grads[32:64], grads[64:96] = 0, 1e15, 1e-30
    modes = [RANKS, partial(jax.debug_nans, True), jax.disable_jit]
    with ExitStack() as stack:
        for mode in modes if wraps(tx) else [PROMOTION, *modes]:
            stack.enter_context(mode())
        step({"kernel": jnp.float32(grads)}, tx, model)


def step(grads, tx, model):
    updates, _ = tx.update(grads, tx.init(model), model)
    optax.apply_updates(model, updates)


POLICIES = {
    "Budget": stquant.Budget(5.0, max_distortion=0.1),
    "STQuant": stquant.STQuant(5.0),
    "Fixed": stquant.Fixed(),
}


@pytest.mark.parametrize("precision", POLICIES.values(), ids=POLICIES)
def test_tools(precision):
    """What there is beside the two functions."""
    tx, model = stquant.adamw(1e-3, precision=precision), params((64, 128), jnp.bfloat16)
    fused = partial(stquant.fused_update, tx, stochastic_rounding=True)
    with PROMOTION(), RANKS():
        state = tx.init(model)
        jax.eval_shape(fused, model, state, model)
        jax.eval_shape(stquant.metrics, state)
        assert stquant.report(state, model, precision).leaves
        jax.eval_shape(lambda state: stquant.to_optax(state, model, precision), state)
        stquant.to_portable(jax.eval_shape(lambda: state), model, precision)


@pytest.mark.parametrize("make", [stquant.adamw, stquant.solo_adamw, stquant.lion])
def test_divided(make):
    """What a part adds to numbers that all devices share."""
    sharding = stquant.Sharding(jax.make_mesh((2, 4), ("x", "y")), P("x", None, "y"))
    tx, model = make(1e-3, sharding=sharding), {"kernel": jnp.ones((2, 128, 512))}
    with PROMOTION(), RANKS():
        state = jax.eval_shape(tx.init, model)
        jax.eval_shape(tx.update, model, state, model)
