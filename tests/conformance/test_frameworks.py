"""Flax's holders of optimizers."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.training.train_state import TrainState

from tests.conformance.shared import can, gradients, params, types


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
    """A TrainState keeps its types."""
    with can(case, "flax"):
        state = TrainState.create(apply_fn=None, params=params(), tx=case.optimizer(storage))
        new = jax.eval_shape(lambda state: state.apply_gradients(grads=gradients()), state)
        assert types(new.params) == types(state.params)
        assert types(new.opt_state) == types(state.opt_state)
