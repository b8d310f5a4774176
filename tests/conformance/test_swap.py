"""What people do with an optimizer beside training, on quantized leaves: it is as with Optax's, or
an error that says what to do."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stquant_jax as stquant
from tests.conformance.shared import EXACT, PACKED, compiled, gradients, params, steps

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: COMPILED.append(event) if "backend_compile" in event else None
)


def test_called_op_by_op(case):
    """Nothing is compiled from the second call on that Optax's own does not compile, as Muon's
    does: neither by `update` nor by `init`, nor by what tells of a state."""
    grads = gradients()

    def compiled_again(tx, more):
        state = tx.init(params())
        for _ in range(3):
            before = len(COMPILED)
            _, state = tx.update(grads, state, params())
            more(state)
            tx.init(params())
        return len(COMPILED) - before

    ours = compiled_again(case.optimizer(PACKED), stquant.metrics)
    assert ours <= compiled_again(case.original(), lambda state: None)


def test_small_trees(case):
    """Below `min_size` all stays as Optax keeps it, whatever the budget."""
    precision = {} if "budget" in case.limits else {"precision": stquant.Budget(2.5)}
    tx, theirs = case.optimizer(EXACT, **precision), case.original()
    got, want = (jax.eval_shape(x.init, params()) for x in (tx, theirs))
    assert not any(x.dtype in (jnp.uint8, jnp.uint16) for x in arrays(got))
    assert nbytes(got) <= nbytes(want) + 32
    jax.eval_shape(tx.update, params(), got, params())


def arrays(tree):
    """Those that hold anything of a leaf; Orbax saves none that is empty."""
    return [x for x in jax.tree.leaves(tree) if x.size > 1]


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_differentiated(case):
    """Refused where leaves are quantized, by name; with all leaves exact as Optax's own."""

    def through(tx, scale):
        grads = jax.tree.map(lambda g: scale * g, gradients())
        updates, _ = tx.update(grads, tx.init(params()), params())
        return sum(jnp.sum(x) for x in jax.tree.leaves(updates))

    for derivative in (jax.grad, jax.jacfwd):
        with pytest.raises(stquant.NotDifferentiableError, match="stop_gradient"):
            jax.eval_shape(derivative(partial(through, case.optimizer(PACKED))), 1.0)
    stopped = lambda scale: through(case.optimizer(PACKED), jax.lax.stop_gradient(scale))  # noqa: E731
    jax.eval_shape(jax.grad(stopped), 1.0)
    if not case.name.startswith("muon"):  # loops of its own
        jax.eval_shape(jax.grad(partial(through, case.optimizer(EXACT))), 1.0)


def test_functions_among_the_parameters(case):
    """As whole models in Equinox have them: None among the gradients."""
    tx = case.optimizer(PACKED)
    model = params() | {"activation": jnp.tanh}
    grads = gradients() | {"activation": None}
    state = tx.init(params() | {"activation": None})
    updates, _ = jax.eval_shape(lambda grads, state: tx.update(grads, state, model), grads, state)
    assert updates["activation"] is None
    chex.assert_trees_all_equal_shapes(updates, grads)


def test_metrics_have_names(case):
    """By leaf and moment, the same for a state in Flax's boxes; what they tell is in the state."""
    (_, state) = steps(case, PACKED)[-1]
    told = stquant.metrics(state, params(), storage=PACKED)
    boxed = jax.tree.map(nnx.Param, state)
    chex.assert_trees_all_equal(stquant.metrics(boxed, params(), storage=PACKED), told)
    assert all(x.shape == () for x in told.values()) and told["count"] == 4
    widths = {name: int(x) for name, x in told.items() if name.startswith("widths/")}
    assert {name.split("/")[1] for name in widths} == params().keys()
    assert list(widths.values()) == stquant.metrics(state)["widths"].tolist()
    assert set(widths.values()) == {4 if "solo" in case.name else 8}
    ours = [x for x in jax.tree.leaves(state) if x.dtype in (jnp.uint8, jnp.uint16, jnp.uint32)]
    assert 0 < nbytes(ours) <= 1e6 * told["megabytes"] <= nbytes(state)


def test_averaged(case):
    """The mean of two states is refused: codes are no numbers."""
    (_, a), (_, b) = steps(case, PACKED)[-2:]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    with pytest.raises(ValueError, match="to_optax|is float32"):
        jax.eval_shape(case.optimizer(PACKED).update, gradients(), mean, params())


def test_another_storage(case):
    """A state that does not fit is refused while tracing, not by NaN."""
    tx = case.optimizer(PACKED)
    state = case.optimizer(EXACT).init(params())
    with pytest.raises(ValueError, match="expected"):
        jax.eval_shape(tx.update, gradients(), state, params())


def test_reset(case):
    """Zeros are a fresh state, for as long as Optax's own is zero at the start."""
    tx = compiled(case, PACKED)
    (_, trained) = steps(case, PACKED)[-1]
    fresh = tx.init(params())
    if any(np.any(x) for x in jax.tree.leaves(case.original().init(params()))):
        pytest.skip("Optax's own does not start from zeros")
    zeros = jax.tree.map(jnp.zeros_like, trained)
    for seed in range(2):
        got, zeros = tx.update(gradients(seed), zeros, params())
        want, fresh = tx.update(gradients(seed), fresh, params())
        chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal(zeros, fresh)


def test_inside_a_chain():
    """`fused_update` of a chain whose last link is ours: clipping, then the fused step."""
    wide = {"precision": stquant.Fixed(8, 8), "storage": PACKED}
    clip = optax.clip_by_global_norm(0.1)
    tx = optax.chain(clip, stquant.adamw(0.1, **wide))

    @jax.jit
    def both(grads, state, params):
        updates, after = tx.update(grads, state, params)
        fused = stquant.fused_update(tx, grads, state, params)
        return (optax.apply_updates(params, updates), after), fused

    want, got = both(gradients(), tx.init(params()), params())
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    injected = optax.inject_hyperparams(stquant.adam, hyperparam_dtype=jnp.float32)
    for tx in (
        injected(0.1, **wide),
        optax.named_chain(("clip", clip), ("adam", stquant.adam(0.1, **wide))),
    ):
        step, state = partial(stquant.fused_update, tx), tx.init(params())
        new, after = jax.eval_shape(step, gradients(), state, params())
        chex.assert_trees_all_equal_shapes_and_dtypes((new, after), (params(), state))


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: optax.chain(tx, optax.scale(0.5)),
        lambda tx: optax.chain(tx, optax.sgd(0.1)),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.masked(tx, {"bias": True, "kernel": True, "scale": False}),
        lambda tx: optax.sgd(0.1),
        lambda tx: stquant.lion(0.1),
    ],
)
def test_what_cannot_be_fused(around):
    """Where something changes what the last link returns, or it is none of ours."""
    tx = around(stquant.adamw(0.1, precision=stquant.Fixed(8, 8), storage=PACKED))
    with pytest.raises(ValueError, match="last link of optax.chain"):
        jax.eval_shape(partial(stquant.fused_update, tx), gradients(), tx.init(params()), params())


def test_fused_with_functions_among_the_parameters():
    tx = stquant.adamw(0.1, precision=stquant.Fixed(8, 8), storage=PACKED)
    grads = gradients() | {"activation": None}
    state = tx.init(params() | {"activation": None})
    new, _ = stquant.fused_update(tx, grads, state, params() | {"activation": jnp.tanh})
    assert new["activation"] is jnp.tanh
    assert new["kernel"].shape == (48, 40) and not np.array_equal(new["kernel"], grads["kernel"])
