"""A layer whose kernel is quantized by default, as every framework has it.

A regression on fixed random data, half of it noise: the last loss tells how far an optimizer has
come, not how near to zero. The bias is so small beside the kernel that eight bits in all leave
seven for a code. All frameworks start from the same numbers, and their trees hold the same arrays
in the same order: what is compiled of an optimizer is one program.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import stquant_jax as stquant
from tests.conformance.cases import Case

INPUTS, OUTPUTS, SAMPLES, STEPS = 64, 128, 512, 50

Transformation = optax.GradientTransformation


class Data(NamedTuple):
    start: dict[str, jax.Array]
    x: jax.Array
    y: jax.Array


@cache
def data() -> Data:
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    def kernel():
        return normal(INPUTS, OUTPUTS) / INPUTS**0.5

    start = {"bias": jnp.zeros(OUTPUTS), "kernel": kernel()}
    x = normal(SAMPLES, INPUTS)
    return Data(start, x, jnp.tanh(x @ kernel()) + normal(SAMPLES, OUTPUTS))


def gradients(seed: int) -> dict[str, jax.Array]:
    """Of the same shapes."""
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(1e-3 * random.standard_normal(p.shape), jnp.float32)
        for name, p in data().start.items()
    }


def loss_of(predictions: jax.Array) -> jax.Array:
    return jnp.mean((predictions - data().y) ** 2)


def jitted(tx: Transformation) -> optax.GradientTransformationExtraArgs:
    """Its update compiled, since frameworks here call it op by op.

    Arrays go in and out as lists: a compiled program names its results, and those of all frameworks
    are to be one.
    """

    @partial(jax.jit, static_argnums=(0, 1))
    def run(treedef, others, arrays):
        arrays, others = iter(arrays), dict(others)
        leaves = [others[i] if i in others else next(arrays) for i in range(treedef.num_leaves)]
        return jax.tree.leaves(tx.update(*treedef.unflatten(leaves)))

    def update(updates, state, params):
        leaves, treedef = jax.tree.flatten((updates, state, params))
        others = tuple((i, x) for i, x in enumerate(leaves) if not eqx.is_array(x))
        out = run(treedef, others, [x for x in leaves if eqx.is_array(x)])
        return jax.tree.unflatten(jax.tree.structure((updates, state)), out)

    return optax.GradientTransformationExtraArgs(tx.init, update)


@cache
def optimizer(case: Case) -> Transformation:
    """Ours, at default storage and eight bits."""
    return jitted(case.optimizer(stquant.Storage(), case.network_rate))


@cache
def reference(case: Case) -> float:
    """The last loss with Optax's."""
    return train_haiku(jitted(case.original(case.network_rate)))


# --- an optimizer -> the last loss ---


class NnxNetwork(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0))
        nnx.update(self.dense, data().start)

    def __call__(self, x):
        return jnp.tanh(self.dense(x))


def train_nnx(tx: Transformation) -> float:
    model = NnxNetwork()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradient = nnx.jit(nnx.grad(lambda model: loss_of(model(data().x))))
    for _ in range(STEPS):
        optimizer.update(model, gradient(model))
    return float(loss_of(model(data().x)))


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(OUTPUTS, name="dense")(x))


def train_linen(tx: Transformation) -> float:
    params = {"dense": data().start}
    state = TrainState.create(apply_fn=LinenNetwork().apply, params=params, tx=tx)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: loss_of(state.apply_fn({"params": p}, data().x)))(params)

    for _ in range(STEPS):
        state = state.apply_gradients(grads=gradient(state.params))
    return float(loss_of(state.apply_fn({"params": state.params}, data().x)))


@hk.without_apply_rng
@hk.transform
def haiku_network(x):
    return jnp.tanh(hk.Linear(OUTPUTS, name="dense")(x))


def train_haiku(tx: Transformation) -> float:
    params = {"dense": {"b": data().start["bias"], "w": data().start["kernel"]}}
    gradient = jax.jit(jax.grad(lambda params: loss_of(haiku_network.apply(params, data().x))))
    state = tx.init(params)
    for _ in range(STEPS):
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    return float(loss_of(haiku_network.apply(params, data().x)))


class EquinoxNetwork(eqx.Module):
    """With a function among its leaves."""

    bias: jax.Array
    kernel: jax.Array
    activation: Callable

    def __call__(self, x):
        return self.activation(x @ self.kernel + self.bias)


def arrays_of(model: EquinoxNetwork) -> EquinoxNetwork:
    return eqx.filter(model, eqx.is_inexact_array)


def train_equinox(
    tx: Transformation, params_of: Callable[[EquinoxNetwork], Any] = arrays_of
) -> float:
    model = EquinoxNetwork(**data().start, activation=jnp.tanh)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda model: loss_of(model(data().x))))
    state = tx.init(arrays_of(model))
    for _ in range(STEPS):
        updates, state = tx.update(gradient(model), state, params_of(model))
        model = eqx.apply_updates(model, updates)
    return float(loss_of(model(data().x)))


def train_whole(tx: Transformation) -> float:
    """With functions among the leaves of ``params``."""
    return train_equinox(tx, params_of=lambda model: model)


FRAMEWORKS = {
    "nnx": train_nnx,
    "Linen": train_linen,
    "Haiku": train_haiku,
    "Equinox": train_equinox,
    "Equinox, whole": train_whole,
}
