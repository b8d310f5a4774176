"""Shapes, dtypes and structure, by tracing alone: nothing here is compiled."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import pytest

from tests.conformance.shared import can, gradients, params, types


def struct(tree):
    return jax.eval_shape(lambda: tree)


@pytest.mark.parametrize(
    "dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=lambda x: x.__name__
)
def test_dtypes(case, storage, dtype):
    """Updates are as the gradients; what is stored does not depend on them."""
    tx = case.optimizer(storage)
    with can(case, "dtypes"):
        state = tx.init(params(dtype))
        updates, new = jax.eval_shape(tx.update, gradients(0, dtype), state, params(dtype))
        assert types(updates) == types(params(dtype))
        assert types(new) == types(state)


def test_scan(case, storage):
    tx, grads = case.optimizer(storage), gradients()

    def step(state, _):
        return tx.update(grads, state, grads)[::-1]

    with can(case, "control flow"):
        state = tx.init(params())
        new, _ = jax.eval_shape(lambda state: jax.lax.scan(step, state, length=3), state)
        assert types(new) == types(state)


def test_cond(case, storage):
    """Both branches have one type, so a step may be left out."""
    tx, grads = case.optimizer(storage), gradients()

    def maybe(skip, state):
        return jax.lax.cond(skip, lambda: (grads, state), lambda: tx.update(grads, state, grads))

    with can(case, "control flow"):
        state = tx.init(params())
        _, new = jax.eval_shape(maybe, True, state)
        assert types(new) == types(state)


def test_while_loop(case, storage):
    tx, grads = case.optimizer(storage), gradients()

    def body(carry):
        i, state = carry
        return i + 1, tx.update(grads, state, grads)[1]

    def loop(state):
        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, state))

    with can(case, "control flow"):
        state = tx.init(params())
        _, new = jax.eval_shape(loop, state)
        assert types(new) == types(state)


def test_ensemble(case, storage):
    """Under vmap the states of members stand side by side."""
    tx, members = case.optimizer(storage), 3
    stack = jax.tree.map(lambda x: jnp.stack([x] * members), params())
    with can(case, "vmap"):
        alone = tx.init(params())
        state = jax.vmap(tx.init)(stack)
        updates, new = jax.eval_shape(jax.vmap(tx.update), stack, state, stack)
        assert types(updates) == types(stack)
        assert types(new) == types(state)
        want = jax.tree.map(lambda x: ((members, *x.shape), x.dtype.name), alone)
        assert types(state) == want


def test_extra_args(case, storage):
    """What others in a chain need is passed over."""
    tx = case.optimizer(storage)
    with can(case, "wrappers"):
        jax.eval_shape(
            lambda state: tx.update(gradients(), state, params(), value=1.0, unknown="x"),
            tx.init(params()),
        )


def test_abstract_init(case, storage):
    """`eval_shape` needs no arrays and makes none, but for Muon's three coefficients."""
    tx = case.optimizer(storage)
    with can(case, "abstract"):
        want, shapes = types(tx.init(params())), struct(params())
        before = sum(x.nbytes for x in jax.live_arrays())
        state = jax.eval_shape(tx.init, shapes)
        assert sum(x.nbytes for x in jax.live_arrays()) <= before + 3 * 4
        assert types(state) == want
        updates, new = jax.eval_shape(tx.update, shapes, state, shapes)
        assert types((updates, new)) == types((shapes, state))


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32], ids=lambda x: x.__name__)
def test_refused(case, storage, dtype):
    """Complex and integer leaves, by name, at init."""
    wrong = params() | {"wrong": jnp.ones((48, 40), dtype)}
    with pytest.raises(ValueError, match=f"'wrong'.*{dtype.__name__}.*real floating"):
        case.optimizer(storage).init(wrong)


ODD_TREES = {
    "none": {},
    "empty": {"empty": jnp.zeros((0, 3))},
    "scalar": jnp.zeros(()),
    "bare": jnp.ones((48, 40)),
    "hollow": [None, ()],
}


@pytest.mark.parametrize("tree", ODD_TREES.values(), ids=ODD_TREES)
def test_odd_trees(case, storage, tree):
    """No leaves, none that is quantized, an array without a tree."""
    tx = case.optimizer(storage)
    empty = any(x.size == 0 for x in jax.tree.leaves(tree))
    with can(case, "empty") if empty else nullcontext():
        state = tx.init(tree)
        updates, new = jax.eval_shape(tx.update, tree, state, tree)
        assert types((updates, new)) == types((tree, state))
