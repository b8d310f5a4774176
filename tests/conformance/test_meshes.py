"""Explicit mesh axes: arrays tell how they are divided, in their types. By tracing alone."""

from importlib.metadata import version

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.conformance.shared import EXACT, can

SPECS = {"bias": P(), "kernel": P(None, "x"), "stack": P(None, "x")}


@pytest.fixture(autouse=True)
def mesh():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        yield mesh


def params(mesh):
    shapes = {"bias": (3,), "kernel": (32, 1024), "stack": (2, 8, 4)}
    return {
        name: jnp.ones(shape, jnp.bfloat16, device=jax.NamedSharding(mesh, SPECS[name]))
        for name, shape in shapes.items()
    }


def typeof(tree):
    """Shapes, dtypes, and along which axes of the mesh: f32[32,1024@x]."""
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)


def test_init(case, storage, mesh):
    """Under jit or not, of arrays or of shapes: one sharding of the state."""
    tx, model = case.optimizer(storage), params(mesh)
    with can(case, "abstract"):
        want = typeof(tx.init(model))
        assert typeof(jax.eval_shape(tx.init, model)) == want
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model
        )
        assert typeof(jax.eval_shape(tx.init, abstract)) == want


def test_update(case, storage, mesh):
    """The state's sharding is that of init, the updates' that of the gradients; a step may be left
    out."""
    old = tuple(map(int, version("optax").split(".")[:3])) < (0, 2, 8)
    if case.name == "adafactor" and storage is EXACT and old:
        pytest.skip("this Optax makes adafactor's state undivided")
    tx, model = case.optimizer(storage), params(mesh)

    def maybe(skip, model, state):
        step = lambda: tx.update(model, state, model)  # noqa: E731
        return jax.lax.cond(skip, lambda: (model, state), step)

    with can(case, "explicit"):
        state = tx.init(model)
        updates, new = jax.eval_shape(maybe, True, model, state)
        assert typeof(new) == typeof(state)
        assert typeof(updates) == typeof(model)
