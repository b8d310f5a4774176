"""What of the rest of the library is for which optimizer, and that it says so where it is not."""

import inspect
from functools import partial

import jax
import optax
import pytest

import stquant_jax as stquant
from tests.conformance import table
from tests.conformance.cases import CASES
from tests.conformance.shared import PACKED, can, gradients, params, types


def precision_of(case, storage):
    return case.own(storage).get("precision", stquant.Fixed())


@pytest.mark.parametrize("policy", [stquant.Budget, stquant.STQuant], ids=lambda x: x.__name__)
def test_moving_bits(case, policy):
    """A budget and a pin are no obstacle where nothing is to be stored: to `tree_map_params`, which
    asks `init` about parameters that are none, and where all are masked out."""
    with can(case, "budget"):
        precision = policy(24.0, interval=10, pins={"kernel": (4, 2)})
        tx = case.optimizer(PACKED, precision=precision)
        state = jax.eval_shape(tx.init, params())
        _, new = jax.eval_shape(tx.update, gradients(), state, params())
        assert types(new) == types(state)
        optax.tree_utils.tree_map_params(tx, lambda x: x, state)
        masked = optax.masked(tx, dict.fromkeys(params(), False))
        jax.eval_shape(masked.update, gradients(), masked.init(params()), params())


def test_kernels(case):
    storage = stquant.Storage(min_size=0, backend="pallas_tpu", interpret=True)
    with can(case, "kernels"):
        tx = case.optimizer(storage)
        jax.eval_shape(tx.update, params(), jax.eval_shape(tx.init, params()), params())


def test_fused_update(case, storage):
    tx = case.optimizer(storage)
    step = partial(stquant.fused_update, tx)
    with can(case, "fused"):
        new, _ = jax.eval_shape(step, gradients(), jax.eval_shape(tx.init, params()), params())
        assert jax.tree.structure(new) == jax.tree.structure(params())


def test_metrics(case, storage):
    state = case.optimizer(storage).init(params())
    with can(case, "metrics"):
        assert jax.eval_shape(stquant.metrics, state)["widths"].ndim == 1


def test_to_optax(case, storage):
    state = case.optimizer(storage).init(params())
    with can(case, "to_optax"):
        theirs = jax.eval_shape(
            lambda x: stquant.to_optax(x, params(), precision_of(case, storage), storage), state
        )
        assert optax.tree_utils.tree_get(theirs, "nu")["bias"].shape == (3,)


def test_portable(case, storage):
    state = jax.eval_shape(case.optimizer(storage).init, params())
    with can(case, "portable"):
        stquant.to_portable(state, params(), precision_of(case, storage), storage)


def test_all_are_in_the_table():
    """What is public and makes a transformation with a storage has a line."""

    def makes_one(x):
        if not inspect.isfunction(x) or "storage" not in inspect.signature(x).parameters:
            return False
        made = inspect.signature(x, eval_str=True).return_annotation
        return inspect.isclass(made) and issubclass(made, optax.GradientTransformation)

    public = {name for name in stquant.__all__ if makes_one(getattr(stquant, name))}
    assert public == {case.make.__name__ for case in CASES}


def test_table():
    """A row for each line, a column where they differ."""
    text = table.render()
    for case in CASES:
        assert f"| `{case.name}` |" in text
    differing = {name for case in CASES for name in case.limits}
    (header,) = (line for line in text.splitlines() if line.startswith("| optimizer"))
    assert header.count("|") == len(differing) + 2
