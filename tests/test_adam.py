"""Optax's semantics: exact leaves equal its own to float32 rounding, quantized ones approach it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stquant_jax as stquant
from tests import common

EXACT = {"bias": (40,), "scalar": (), "empty": (0, 5), "small": (3, 4, 5)}
MIXED = EXACT | common.TILE


def gradient(shapes, step):
    random = np.random.default_rng(step)
    return {name: np.float32(random.standard_normal(shape)) for name, shape in shapes.items()}


def assert_exact(ours, theirs, rtol=2e-6):
    """To rounding: ours multiplies by what Optax divides by."""
    for name in EXACT:
        got, want = np.asarray(ours[name]), np.asarray(theirs[name])
        rounding = 1e-6 * np.max(np.abs(want), initial=0)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rounding, err_msg=name)


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"b1": 0.0, "b2": 0.9},
        {"b1": 0.5, "b2": 0.99, "eps": 1e-3},
        {"eps": 0.1, "eps_root": 1e-4},
        {"nesterov": True},
        {"nesterov": True, "b1": 0.95, "eps_root": 1e-8},
    ],
    ids=str,
)
@pytest.mark.parametrize("shapes", [EXACT, MIXED], ids=["all exact", "mixed"])
def test_exact_leaves(shapes, hyper):
    """Bias correction, both eps, Nesterov momentum: as `optax.scale_by_adam`.

    b2 is traced, so ours takes 1 - b2 of the b2 that float32 holds, 1.3e-5 from Optax's.
    """
    params, theirs = common.zeros(shapes), optax.scale_by_adam(**hyper)
    state, reference, step = common.init(params), theirs.init(params), jax.jit(theirs.update)
    for i in range(10):
        g = gradient(shapes, i)
        got, state = common.update(g, state, **hyper)
        want, reference = step(g, reference)
        assert_exact(got, want, 2e-5)
    moments = common.decode(state, params)
    assert int(moments.count) == int(reference.count) == 10
    assert_exact(moments.mu, reference.mu, 2e-5)
    assert_exact(moments.nu, reference.nu, 2e-5)


DECAYED = {"bias": False, "scalar": True, "empty": True, "small": True}


@pytest.mark.parametrize(
    "rate", [1e-2, optax.linear_schedule(1e-2, 0, 8)], ids=["rate", "schedule"]
)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("adam", {}),
        ("adam", {"b1": 0.8, "eps": 1e-5, "eps_root": 1e-6, "nesterov": True}),
        ("adamw", {}),
        ("adamw", {"weight_decay": 0.1, "mask": DECAYED}),
        ("adamw", {"weight_decay": 0.1, "mask": lambda tree: DECAYED}),
        ("adamw", {"b2": 0.95, "eps_root": 1e-5, "nesterov": True}),
    ],
)
def test_aliases(name, arguments, rate):
    """`adam` and `adamw` take Optax's arguments and give its updates."""
    ours = getattr(stquant, name)(rate, **arguments, precision=stquant.Fixed(5, 4))
    theirs = getattr(optax, name)(rate, **arguments)
    params = {key: jnp.ones(shape) for key, shape in EXACT.items()}
    state, reference = ours.init(params), theirs.init(params)
    step, reference_step = jax.jit(ours.update), jax.jit(theirs.update)
    for i in range(4):
        g = gradient(EXACT, i)
        got, state = step(g, state, params)
        want, reference = reference_step(g, reference, params)
        assert_exact(got, want)


QUANTIZED = {"flat": (5000,), "tile": (128, 32)}
# Squared error of the updates over their energy, steps 50 to 120 of white noise.
ERROR = {(2, 0): 0.6, (3, 2): 0.3, (4, 3): 0.1, (5, 4): 0.04, (6, 5): 0.02, (8, 8): 0.005}


def test_quantized_leaves():
    """They follow `optax.scale_by_adam` the closer, the more bits they have."""
    exact, params = optax.scale_by_adam(), common.zeros(QUANTIZED)
    states = {widths: common.init(params, *widths) for widths in ERROR}
    reference, step = exact.init(params), jax.jit(exact.update)
    squares, energy = dict.fromkeys(ERROR, 0.0), 0.0
    for i in range(120):
        g = common.gaussian(QUANTIZED, i, spread=0.2)
        want, reference = step(g, reference)
        for widths in ERROR:
            got, states[widths] = common.update(g, states[widths])
            if i >= 50:
                squares[widths] += sum(np.sum((got[x] - want[x]) ** 2) for x in g)
        energy += sum(np.sum(want[x] ** 2) for x in g) if i >= 50 else 0
    error = {widths: x / energy for widths, x in squares.items()}
    assert list(error.values()) == sorted(error.values(), reverse=True)
    assert all(error[widths] < bound for widths, bound in ERROR.items()), error


@pytest.mark.parametrize("widths", [(2, 0), (5, 4), (8, 8)])
def test_first_step(widths):
    """From zero, a constant gradient of either sign gives an update of +-1: |g| / sqrt(g**2)."""
    g = {name: np.sign(x) * np.float32(3e-4) for name, x in common.gaussian(QUANTIZED).items()}
    updates, _ = common.update(g, common.init(g, *widths), eps=0.0)
    for name in g:
        np.testing.assert_allclose(updates[name], np.sign(g[name]), rtol=1e-4)


def test_extra_arguments_are_ignored():
    """Also params, which may be left out: the program is the same."""
    tx = stquant.scale_by_adam_q(precision=stquant.Fixed(5, 4))
    g = common.zeros(common.TILE)

    def with_extra(g, state):
        return tx.update(g, state, g, value=jnp.float32(1), loss_fn=None)

    plain, extra = (jax.make_jaxpr(f)(g, tx.init(g)) for f in (tx.update, with_extra))
    assert str(plain) == str(extra)


def cast(tree, dtypes):
    return {name: jnp.asarray(tree[name], dtype) for name, dtype in dtypes.items()}


@pytest.mark.parametrize(
    "dtypes",
    [
        {"a": jnp.bfloat16, "b": jnp.bfloat16, "c": jnp.bfloat16},
        {"a": jnp.bfloat16, "b": jnp.float16, "c": jnp.float32},
    ],
    ids=["bf16", "mixed"],
)
def test_dtypes(dtypes):
    """Each update has its gradient's dtype; what is computed and stored does not depend on it."""
    g = cast(common.gaussian({"a": (32, 128), "b": (50,), "c": (64, 64)}), dtypes)
    updates, state = common.update(g, common.init(g))
    assert {name: x.dtype for name, x in updates.items()} == dtypes
    wide = cast(g, dict.fromkeys(g, jnp.float32))
    want, reference = common.update(wide, common.init(wide))
    jax.tree.map(np.testing.assert_array_equal, state, reference)
    jax.tree.map(np.testing.assert_array_equal, updates, cast(want, dtypes))


@pytest.mark.thorough
def test_seeds():
    """One seed gives the same bits, another seed others."""

    def run(seed):
        storage = stquant.Storage(seed=seed)
        tx = stquant.scale_by_adam_q(precision=stquant.Fixed(3, 2), storage=storage)
        state, step = tx.init(common.zeros(common.TILE)), jax.jit(tx.update)
        for i in range(5):
            updates, state = step(common.gaussian(common.TILE, i), state)
        return updates, state

    first, again, other = run(0), run(0), run(1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first[1].arena != other[1].arena)
    assert np.any(first[0]["tile"] != other[0]["tile"])
