"""What an optimizer is for: it goes as far as Optax's original."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.common import nbytes
from tests.conformance.shared import can

pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")

STEPS = 600
START = {"parabola": jnp.array([-1.0, 10.0, 1.0]), "rosenbrock": jnp.zeros(2)}
GOAL = jnp.array([1.0, -1.0, 1.0])  # of the parabola; the other's is (1, 1)


def loss(at):
    (x, y), parabola = at["rosenbrock"], at["parabola"] - GOAL
    return jnp.sum(parabola**2) + (1 - x) ** 2 + 100 * (y - x**2) ** 2


def program_of(tx):
    """Many steps as one program, and what it starts from: all of it is donated."""

    def step(carry, _):
        at, state = carry
        updates, state = tx.update(jax.grad(loss)(at), state, at)
        return (optax.apply_updates(at, updates), state), None

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(at, state):
        return jax.lax.scan(step, (at, state), length=STEPS)[0]

    start = jax.tree.map(jnp.copy, START)
    start = start, tx.init(start)
    return train.lower(*start).compile(), start


SCHEDULE = partial(optax.cosine_decay_schedule, decay_steps=STEPS)


@cache
def training(case, storage):
    """A program, where it ends, and how many bytes it was given."""
    program, start = program_of(case.optimizer(storage, SCHEDULE(case.rate)))
    size = nbytes(start)
    return program, program(*start)[0], size


@cache
def reference_loss(case):
    program, start = program_of(case.original(SCHEDULE(case.rate)))
    return loss(program(*start)[0])


@pytest.mark.thorough
def test_goal(case, storage):
    """The learning rate is a schedule."""
    with can(case, "targets"):
        _, end, _ = training(case, storage)
        assert loss(end) < 0.1 * loss(START)
        assert loss(end) < 1.1 * reference_loss(case) + 0.01


def test_donated(case, storage):
    """All bytes of a donated state are those of the new one, and none was refused: that would be a
    warning, which is an error here."""
    with can(case, "donation"):
        program, _, size = training(case, storage)
        assert program.memory_analysis().alias_size_in_bytes >= size
