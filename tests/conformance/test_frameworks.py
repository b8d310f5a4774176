"""Flax's holders of optimizers."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.training.train_state import TrainState

from tests.conformance.shared import EXACT, can, gradients, params, types


def training(case, storage):
    model = nnx.Linear(40, 48, use_bias=False, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, case.optimizer(storage, 0.01), wrt=nnx.Param)


def train(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(jnp.ones(40)) - 1) ** 2))(model)
    optimizer.update(model, grads)
    return loss, nnx.state(optimizer)


def test_nnx(case, storage):
    """The state of an nnx.Optimizer keeps its types."""
    with can(case, "frameworks"):
        model, optimizer = training(case, storage)
        before = types(nnx.state(optimizer))
        _, state = nnx.eval_shape(train, model, optimizer)
        assert types(state) == before


def test_nnx_trains(case):
    with can(case, "frameworks"):
        model, optimizer = training(case, EXACT)
        step = nnx.jit(train)
        first, _, last = (step(model, optimizer)[0] for _ in range(3))
        assert last < first


def test_linen(case, storage):
    """A TrainState keeps its types."""
    with can(case, "frameworks"):
        state = TrainState.create(apply_fn=None, params=params(), tx=case.optimizer(storage))
        new = jax.eval_shape(lambda state: state.apply_gradients(grads=gradients()), state)
        assert types(new.params) == types(state.params)
        assert types(new.opt_state) == types(state.opt_state)
