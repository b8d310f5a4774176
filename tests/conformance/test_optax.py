"""Optax's originals, and its wrappers: op by op around an optimizer's one compiled update where
they allow it."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.common import nbytes
from tests.conformance.shared import EXACT, PACKED, can, compiled, gradients, params, steps, types

# A parameter that is not there is a MaskedNode, to be taken as a leaf, as Optax has it.
mapped = partial(
    optax.tree_utils.tree_map_params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
)


def test_reference(case):
    """With all leaves exact it is Optax's."""
    theirs = case.original()
    update, state = jax.jit(theirs.update), theirs.init(params())
    with can(case, "reference"):
        for seed, (updates, _) in enumerate(steps(case, EXACT)):
            want, state = update(gradients(seed), state, params())
            chex.assert_trees_all_close(updates, want, rtol=2e-5, atol=1e-7)


def test_packed(case):
    """Packed it is near; a leaf of one element is a group of its own."""
    for (updates, _), (want, _) in zip(steps(case, PACKED), steps(case, EXACT), strict=True):
        for name, u in want.items():
            error = np.sum((updates[name] - u) ** 2) / np.sum(u**2)
            assert error < case.error, (name, error)
    assert any(x.dtype == jnp.uint32 for x in jax.tree.leaves(steps(case, PACKED)[0][1]))


def test_compiled_once(case, storage):
    steps(case, storage)
    assert compiled(case, storage).update._cache_size() == 1


# --- wrappers ---


def run(tx, count=3, **extra):
    """Updates and states of the first steps, with the gradients of `steps`."""
    state, out = tx.init(params()), []
    for seed in range(count):
        updates, state = tx.update(gradients(seed), state, params(), **extra)
        out.append((updates, state))
    return out


def test_chain(case, storage):
    tx = optax.chain(optax.clip_by_global_norm(1e3), compiled(case, storage), optax.scale(0.5))
    with can(case, "wrappers"):
        for (updates, _), (want, _) in zip(run(tx), steps(case, storage), strict=False):
            chex.assert_trees_all_close(updates, jax.tree.map(lambda x: 0.5 * x, want), rtol=1e-6)


@cache
def careful(case, storage):
    """Both wrappers that choose between two states, in one program."""
    tx = optax.apply_if_finite(case.optimizer(storage), max_consecutive_errors=3)
    tx = optax.MultiSteps(tx, 2)
    return tx.init(params()), jax.jit(tx.update)


def test_multi_steps(case, storage):
    """Between two steps of the optimizer no bit of its state changes, and no parameter."""
    with can(case, "wrappers"):
        start, update = careful(case, storage)
        updates, half = update(gradients(), start, params())
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        chex.assert_trees_all_equal(half.inner_opt_state, start.inner_opt_state)
        updates, _ = update(gradients(), half, params())
        want, _ = steps(case, storage)[0]
        chex.assert_trees_all_close(updates, want, rtol=1e-5)


def test_apply_if_finite(case, storage):
    """A step that is not finite is undone, to the bit, and counted."""
    with can(case, "wrappers"):
        state, update = careful(case, storage)
        for seed in range(2):
            _, state = update(gradients(seed), state, params())
        good, bad = state.inner_opt_state, gradients(1) | {"scale": jnp.float32(np.nan)}
        for _ in range(2):
            updates, state = update(bad, state, params())
        assert state.inner_opt_state.notfinite_count == 1
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        chex.assert_trees_all_equal(state.inner_opt_state.inner_state, good.inner_state)


def injected(case, storage, **how):
    inject = optax.inject_hyperparams(case.make, static_args=case.static, **how)
    rate = () if case.direction else (case.rate,)
    return inject(*rate, **case.options, **case.own(storage))


def test_inject_hyperparams(case, storage):
    """Hyperparameters may be arrays in the state, traced."""
    tx = injected(case, storage, hyperparam_dtype=jnp.float32)
    state = tx.init(params())
    with can(case, "inject"):
        updates, new = jax.eval_shape(tx.update, gradients(), state, params())
        assert types((updates, new)) == types((params(), state))
        assert new.hyperparams


def test_injected_numbers(case):
    """They make the same steps."""
    tx = injected(case, EXACT, hyperparam_dtype=jnp.float32)
    with can(case, "inject"):
        updates, _ = jax.jit(tx.update)(gradients(), tx.init(params()), params())
        if case.direction:
            updates = jax.tree.map(lambda x: -case.rate * x, updates)
        want, _ = steps(case, EXACT)[0]
        chex.assert_trees_all_close(updates, want, rtol=1e-3, atol=1e-6)


def test_inject_bfloat16(case):
    """`inject_hyperparams` casts to the parameters' dtype, in which 0.999 is 1: refused where that
    matters, or the first update would not be finite."""
    tx, p = injected(case, EXACT), params(jnp.bfloat16)
    with can(case, "inject bfloat16"):
        updates, _ = jax.jit(tx.update)(p, tx.init(p), p)
        chex.assert_tree_all_finite(updates)


def frozen_base(wrap):
    """A large base and small adapters, of which only those are trained; as LoRA has it."""
    mask = {"base": False, "lora": dict.fromkeys(params(), True)}
    return {"base": jnp.ones((64, 64)), "lora": params()}, wrap(mask)


FREEZERS = {
    "masked": lambda tx: (
        lambda mask: optax.chain(
            optax.masked(tx, mask),
            optax.masked(optax.set_to_zero(), jax.tree.map(lambda x: not x, mask)),
        )
    ),
    "partition": lambda tx: (
        lambda mask: optax.partition({True: tx, False: optax.set_to_zero()}, mask)
    ),
}


@pytest.mark.parametrize("freeze", FREEZERS.values(), ids=FREEZERS)
def test_frozen(case, storage, freeze):
    """What is frozen owns no byte of the state, and what is trained has types of its own."""
    tx = case.optimizer(storage)
    model, frozen = frozen_base(freeze(tx))
    with can(case, "wrappers"):
        state = frozen.init(model)
        assert nbytes(state) == nbytes(tx.init({"lora": params()}))
        updates, new = jax.eval_shape(frozen.update, model, state, model)
        assert types((updates, new)) == types((model, state))


def test_all_frozen(case, storage):
    """A part without parameters has a state, and steps."""
    mask = jax.tree.map(lambda _: False, params())
    tx = optax.masked(case.optimizer(storage), mask)
    with can(case, "wrappers"):
        updates, _ = tx.update(gradients(), tx.init(params()), params())
        chex.assert_trees_all_equal(updates, gradients())


def test_schedule_free(case, storage):
    tx = optax.contrib.schedule_free(compiled(case, storage), case.rate, b1=0.9)
    with can(case, "wrappers"):
        first, *_, (_, state) = run(tx)
        assert types(first[1]) == types(state)
        averaged = optax.contrib.schedule_free_eval_params(state, params())
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(averaged))


def test_lookahead(case, storage):
    """Between two syncs the fast parameters take the optimizer's own steps."""
    tx = optax.lookahead(compiled(case, storage), sync_period=5, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced(params())
    with can(case, "wrappers"):
        updates, state = tx.update(gradients(), tx.init(both), both)
        want, own = steps(case, storage)[0]
        chex.assert_trees_all_equal(updates.fast, want)
        chex.assert_trees_all_equal(state.fast_state, own)


def test_mechanize(case, storage):
    """The first step of a learned scale is tiny; states keep their types."""
    tx = optax.contrib.mechanize(compiled(case, storage))
    with can(case, "wrappers"):
        first, *_, (updates, state) = run(tx)
        assert types(first[1]) == types(state)
        assert types(updates) == types(params())
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


def test_reduce_on_plateau(case, storage):
    """A loss that does not fall halves the steps, every time."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = optax.chain(compiled(case, storage), plateau)
    with can(case, "wrappers"):
        for i, (updates, _) in enumerate(run(tx, value=1.0)):
            want, _ = steps(case, storage)[i]
            chex.assert_trees_all_close(updates["kernel"], 0.5**i * want["kernel"])


def test_tree_get(case, storage):
    """Counts are found where Optax's are."""

    def counts(state):
        found = optax.tree_utils.tree_get_all_with_path(state, "count")
        return [int(x) for _, x in found]

    theirs = case.original()
    _, state = jax.jit(theirs.update)(gradients(), theirs.init(params()), params())
    assert counts(steps(case, storage)[0][1]) == counts(state)


def test_tree_map_params(case, storage):
    """Arrays that are packed are no parameters; what the function sees has a parameter's shape, as
    with Optax's original."""

    def seen(tx, state):
        shapes = set()

        def same(x, p):
            if not isinstance(x, optax.MaskedNode):
                shapes.add((x.shape, p.shape))
            return x

        chex.assert_trees_all_equal(mapped(tx, same, state, params()), state)
        return shapes

    tx, theirs = case.optimizer(storage), case.original()
    state = tx.init(params())
    with can(case, "tree_map_params"):
        assert seen(tx, state) <= seen(theirs, theirs.init(params()))
        none = mapped(tx, lambda *_: None, state, params(), transform_non_params=lambda _: None)
        assert not jax.tree.leaves(none)


WRAPPERS = {
    "masked": lambda tx: optax.masked(tx, {"bias": False, "kernel": True, "scale": True}),
    "multi": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_tree_map_params_through_wrappers(case, wrap):
    tx = wrap(case.optimizer(PACKED))
    state = tx.init(params())
    with can(case, "tree_map_params"):
        chex.assert_trees_all_equal(mapped(tx, lambda x: x, state), state)
