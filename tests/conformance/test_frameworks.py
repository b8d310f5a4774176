"""Flax's holders of optimizers."""

import chex
import jax.numpy as jnp
from flax import nnx
from flax.training.train_state import TrainState

from tests.conformance.shared import can, compiled, gradients, params, steps, types


def test_nnx(case, storage):
    """nnx.Optimizer under nnx.jit: the loss falls, the state keeps its types."""
    model = nnx.Linear(40, 48, use_bias=False, rngs=nnx.Rngs(0))
    with can(case, "flax"):
        optimizer = nnx.Optimizer(model, case.optimizer(storage, 0.01), wrt=nnx.Param)
        before = types(nnx.state(optimizer))

        @nnx.jit
        def train(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(jnp.ones(40)) - 1) ** 2))(model)
            optimizer.update(model, grads)
            return loss

        first, _, last = (train(model, optimizer) for _ in range(3))
        assert last < first
        assert types(nnx.state(optimizer)) == before


def test_linen(case, storage):
    """TrainState.apply_gradients takes the optimizer's own step."""
    with can(case, "flax"):
        state = TrainState.create(apply_fn=None, params=params(), tx=compiled(case, storage))
        state = state.apply_gradients(grads=gradients())
        want, own = steps(case, storage)[0]
        chex.assert_trees_all_equal(state.params, {k: 1 + u for k, u in want.items()})
        chex.assert_trees_all_equal(state.opt_state, own)
