"""Pins: leaves whose precision the user gives, by a regular expression of their path."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stquant_jax as stquant
from stquant_jax import Budget, Fixed

SHAPES = {
    "head": {"kernel": (64, 128)},
    "layers": [{"kernel": (64, 128), "bias": (40,)}, {"kernel": (64, 128)}],
}
PATHS = ("head.kernel", "layers.0.bias", "layers.0.kernel", "layers.1.kernel")


def tree(fill):
    return jax.tree.map(fill, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = tree(jnp.zeros)


def gradient(seed):
    random = np.random.default_rng(seed)
    return tree(lambda shape: 1e-3 * random.standard_normal(shape).astype(np.float32))


def plan(precision):
    return {leaf.path: leaf for leaf in stquant.plan(PARAMS, precision).leaves}


def widths(precision):
    return {path: (leaf.mu_width, leaf.nu_width) for path, leaf in plan(precision).items()}


@pytest.mark.parametrize("policy", [Fixed(5, 4), Budget(5.0), Budget(7.0)], ids=str)
@pytest.mark.parametrize(
    ("pin", "want"), [(6, (6, 6)), ((8, 2), (8, 2)), ((3, 0), (3, 0)), ("exact", (32, 32))]
)
def test_widths(policy, pin, want):
    """A width for both moments, one for each, or float32; the rest is the policy's."""
    pinned = type(policy)(**vars(policy) | {"pins": {r"layers\.1": pin}})
    bits = getattr(policy, "bits", 32)
    if pin == "exact" and bits < 9:
        with pytest.raises(ValueError, match="smallest budget .* pins and exact leaves included"):
            widths(pinned)
        return
    got = widths(pinned)
    assert got["layers.1.kernel"] == want
    assert stquant.plan(PARAMS, pinned).bits <= bits
    if isinstance(policy, Fixed):
        assert got["head.kernel"] == got["layers.0.kernel"] == (5, 4)


def test_first_match_counts():
    """Patterns are searched in the whole path, in their order."""
    first = {"head": 8, r"0\.kernel$": (7, 0), "kernel": 2}
    assert widths(Fixed(5, 4, pins=first)) == dict(
        zip(PATHS, [(8, 8), (32, 32), (7, 0), (2, 2)], strict=True)
    )
    last = dict(reversed(first.items()))
    assert {w for w in widths(Fixed(5, 4, pins=last)).values() if w != (32, 32)} == {(2, 2)}
    assert widths(Fixed(5, 4, pins={"^kernel|layers": 6, "": 3}))["head.kernel"] == (3, 3)


def test_small_leaves_stay_exact():
    """A pin to a width does not quantize what is too small for it."""
    leaf = plan(Fixed(5, 4, pins={"bias": 6}))["layers.0.bias"]
    assert leaf.kind == "exact" and "min_size" in leaf.reason


@pytest.mark.parametrize("call", [lambda p: widths(p), lambda p: init(p)], ids=["plan", "init"])
def test_no_match(call):
    with pytest.raises(ValueError) as error:
        call(Budget(5.0, pins={"kernel": 5, "embedding": 8}))
    assert "pins['embedding'] matches no leaf" in str(error.value)
    assert all(path in str(error.value) for path in PATHS)


def init(precision):
    return stquant.scale_by_adam_q(precision=precision).init(PARAMS)


BAD = [
    ({"w": 1}, "pins['w']=1", "a width from 2 to 8"),
    ({"w": 9}, "pins['w']=9", "a width from 2 to 8"),
    ({"w": (4, 9)}, "pins['w']=(4, 9)", "nu from 0 to 8"),
    ({"w": (1, 4)}, "pins['w']=(1, 4)", "mu from 2 to 8"),
    ({"w": (4, 4, 4)}, "pins['w']=(4, 4, 4)", "a pair"),
    ({"w": 4.0}, "pins['w']=4.0", "a width"),
    ({"w": True}, "pins['w']=True", "a width"),
    ({"w": "fp32"}, "pins['w']='fp32'", "'exact'"),
    ({"(": 4}, "pins={'(': 4}", "regular expressions"),
    ({3: 4}, "pins={3: 4}", "regular expressions"),
    (["w"], "pins=['w']", "expected a mapping"),
]


@pytest.mark.parametrize("policy", [Fixed, Budget])
@pytest.mark.parametrize(("pins", "got", "accepted"), BAD, ids=[x[1] for x in BAD])
def test_bad_pins(policy, pins, got, accepted):
    with pytest.raises(ValueError) as error:
        policy(pins=pins)
    assert got in str(error.value) and accepted in str(error.value)


@pytest.mark.parametrize("policy", [Fixed, Budget])
def test_policies_stay_values(policy):
    """Hashable and equal when alike, whatever the mapping was; the order of pins counts."""
    a, b = {"w": 4, "v": "exact"}, {"v": "exact", "w": 4}
    assert policy(pins=a) == policy(pins=dict(a)) == policy(pins=tuple(a.items()))
    assert hash(policy(pins=a)) == hash(policy(pins=dict(a)))
    assert policy(pins={"w": 4}) == policy(pins={"w": (4, 4)}) != policy(pins={"w": 5})
    assert policy(pins=a) != policy(pins=b)
    assert policy(pins={}) == policy()


@pytest.mark.parametrize("bits", [4.0, 5.0])
def test_below_the_floor(bits):
    """Pins count into the floor; the smallest budget that is named fits, and just so."""
    pins = {"head": 8, "layers": (6, 4)}
    with pytest.raises(ValueError, match=r"below the floor.*, pins and exact") as error:
        widths(Budget(bits, pins=pins))
    smallest = float(str(error.value).split("parameters is ")[1].split()[0])
    plan = stquant.plan(PARAMS, Budget(smallest, pins=pins))
    small = plan.small_bytes  # on top of the budget
    assert 32 * (plan.total_bytes - small) / (plan.reference_bytes - small) <= smallest
    with pytest.raises(ValueError, match="below the floor"):
        widths(Budget(smallest - 0.002, pins=pins))


@cache
def run():
    """Twelve steps, with two decisions: states after each, and updates."""
    pins = {"head": "exact", r"layers\.0": (3, 2)}
    tx = stquant.scale_by_adam_q(precision=Budget(15.0, interval=5, warmup=0, pins=pins))
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    states, updates = [state], []
    for seed in range(12):
        update, state = step(gradient(seed), state)
        states.append(state)
        updates.append(update)
    return stquant.plan(PARAMS, Budget(15.0, pins=pins)), states, updates


@pytest.mark.thorough
def test_pinned_widths_never_move():
    report, states, _ = run()
    assert report.slots == tuple(f"layers.{i}.kernel/{m}" for i in (0, 1) for m in ("mu", "nu"))
    for state in states:
        assert state.precision.widths[:2].tolist() == [3, 2]


def assert_rounded(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=5e-7 * np.max(np.abs(want)))


def test_exact_leaf():
    """Optax's own moments and updates, to float32's rounding; no rows in the arena."""
    report, states, updates = run()
    head = report.leaves[0]
    assert (head.path, head.kind, head.reason) == ("head.kernel", "exact", "pinned")
    assert "exact" in str(report) and "pinned" in str(report)
    assert head.bytes == 8 * 64 * 128
    assert states[0].mu_scale.shape[0] == 2 * 2  # tiles of the layers' kernels
    adam = optax.scale_by_adam()
    state, step = adam.init(PARAMS), jax.jit(adam.update)
    for seed, update in enumerate(updates):
        want, state = step(gradient(seed), state)
        assert_rounded(update["head"]["kernel"], want["head"]["kernel"])
    moments = stquant.to_optax(states[-1], PARAMS, Fixed(pins={"head": "exact"}))
    for got, want in (moments.mu, state.mu), (moments.nu, state.nu):
        assert_rounded(got["head"]["kernel"], want["head"]["kernel"])
