"""What an optimizer is for: it goes where Optax's goes."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from tests.common import nbytes
from tests.conformance.shared import can

pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")

STEPS = 600
START = {"parabola": jnp.array([-1.0, 10.0, 1.0]), "rosenbrock": jnp.zeros(2)}
GOAL = {"parabola": jnp.array([1.0, -1.0, 1.0]), "rosenbrock": jnp.ones(2)}


def loss(at):
    (x, y), parabola = at["rosenbrock"], at["parabola"] - GOAL["parabola"]
    return jnp.sum(parabola**2) + (1 - x) ** 2 + 100 * (y - x**2) ** 2


@cache
def training(case, storage):
    """A program of many steps, what it makes of the start, and how many bytes of state there were.
    The learning rate is a schedule."""
    tx = case.optimizer(storage, optax.cosine_decay_schedule(case.rate, STEPS))

    def step(carry, _):
        at, state = carry
        updates, state = tx.update(jax.grad(loss)(at), state, at)
        return (optax.apply_updates(at, updates), state), None

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(at, state):
        return jax.lax.scan(step, (at, state), length=STEPS)[0]

    start = jax.tree.map(jnp.copy, START)
    state = tx.init(start)
    program = train.lower(start, state).compile()
    size = nbytes((start, state))
    return program, program(start, state), size


def test_goal(case, storage):
    with can(case, "targets"):
        _, (at, state), _ = training(case, storage)
        chex.assert_trees_all_close(at, GOAL, rtol=3e-2, atol=3e-2)
    assert optax.tree_utils.tree_get_all_with_path(state, "count")[0][1] == STEPS


def test_donated(case, storage):
    """All bytes of a donated state are those of the new one, and none was refused: that would be a
    warning, which is an error here."""
    with can(case, "donation"):
        program, _, size = training(case, storage)
        assert program.memory_analysis().alias_size_in_bytes >= size
