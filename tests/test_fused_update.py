"""`fused_update` is `update` and `apply_updates`, rounded once."""

import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stquant_jax as stquant
from stquant_jax.rules.apply import apply_block
from stquant_jax.rules.rounding import stochastic
from stquant_jax.storage.noise import Dither, keys_of, rounding_bits
from tests import common

# An exact leaf, one that is folded, a flat one with a ragged end, a tile.
SHAPES = {"bias": (50,), "embed": (160, 64), "flat": (3, 1400), "tile": (128, 32)}
WIDTHS = stquant.Fixed(5, 4)
ADAM = stquant.adam(optax.linear_schedule(1e-2, 1e-3, 15), precision=WIDTHS)
HALF = {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11, jnp.float32: 2.0**-24}  # a step, relative


def parameters(shapes=SHAPES):
    random = np.random.default_rng(7)
    return {name: jnp.asarray(random.standard_normal(s), jnp.float32) for name, s in shapes.items()}


@cache
def fuse(tx, **options):
    return jax.jit(lambda g, state, p: stquant.fused_update(tx, g, state, p, **options))


@cache
def chain(tx):
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def wide(x):
    return np.asarray(x, np.float64)


# --- the same as Optax's way ---

ALL = stquant.adamw(
    optax.linear_schedule(1e-2, 1e-3, 15),
    weight_decay=optax.linear_schedule(0.0, 0.5, 15),
    mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
    nesterov=True,
    precision=stquant.Budget(5.0, interval=5, warmup=0),
)


@pytest.mark.parametrize("tx", [ADAM, ALL], ids=["adam", "adamw"])
def test_same_as_the_chain(tx):
    """Same bits of state and parameters, by either path or by both in turns.

    Schedules of rate and decay, a mask by shapes, widths that move.
    """
    ours, theirs, params = fuse(tx), chain(tx), parameters()
    runs, plans = [(params, tx.init(params))] * 3, set()
    for i in range(20):
        steps = (theirs, ours, ours if i % 3 else theirs)
        g = common.gaussian(SHAPES, i)
        runs = [step(g, state, p) for step, (p, state) in zip(steps, runs, strict=True)]
        plans.add(tuple(runs[0][1][0].precision.plan.widths.tolist()))
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[2])
    assert (len(plans) > 1) == (tx is ALL)


@pytest.mark.thorough
def test_same_as_separate_programs():
    """Where `apply_updates` is a program of its own, other products are rounded."""
    params, g = parameters(), common.gaussian(SHAPES)
    state = ALL.init(params)
    # Schedules in their middle.
    state = (state[0], *optax.tree_utils.tree_set(state[1:], count=jnp.int32(10)))
    updates, _ = jax.jit(ALL.update)(g, state, params)
    want = optax.apply_updates(params, updates)
    got, _ = fuse(ALL)(g, state, params)
    for name in SHAPES:
        # Two products and two sums, each rounded or not, none above |p| + |p' - p|.
        size = np.abs(wide(params[name])) + np.abs(wide(updates[name]))
        error = np.abs(wide(got[name]) - wide(want[name]))
        assert np.all(error <= 2 * 4 * HALF[jnp.float32] * size), name


# --- narrow parameters ---

RATE, DECAY = 2.0**-6, 0.25
TREE = {"bias": False, "embed": True, "flat": False, "tile": True}
ADAMW = stquant.adamw(RATE, weight_decay=DECAY, mask=TREE, precision=WIDTHS)
# Dtypes of parameters and gradients.
DTYPES = {
    "bias": (jnp.bfloat16, jnp.bfloat16),
    "embed": (jnp.bfloat16, jnp.bfloat16),
    "flat": (jnp.bfloat16, jnp.float32),
    "tile": (jnp.float32, jnp.bfloat16),
}


def first_step():
    """A first step's gradients, parameters, and what they should become, in float64 from Adam's
    update in float32.
    """
    params = {name: x.astype(DTYPES[name][0]) for name, x in parameters().items()}
    g = {name: x.astype(DTYPES[name][1]) for name, x in common.gaussian(SHAPES).items()}
    updates, _ = common.update(
        {name: x.astype(np.float32) for name, x in g.items()}, common.init(params)
    )
    want = {
        name: wide(p) - RATE * (wide(updates[name]) + DECAY * TREE[name] * wide(p))
        for name, p in params.items()
    }
    return g, params, want


def test_rounded_once():
    """Half a step from the exact value, whatever the gradients' dtype."""
    g, params, want = first_step()
    got, _ = fuse(ADAMW)(g, ADAMW.init(params), params)
    for name, x in want.items():
        assert got[name].dtype == params[name].dtype
        # On top of it what float32 rounds of |p| < 8 and less: four times, and in u.
        bound = HALF[DTYPES[name][0]] * np.abs(x) + 5 * HALF[jnp.float32] * 8
        assert np.all(np.abs(wide(got[name]) - x) <= bound), name


@pytest.mark.parametrize("dtype", HALF, ids=lambda x: x.__name__)
def test_any_dtype(dtype):
    """The formula in float32, rounded to nearest."""
    p = parameters()["tile"].astype(dtype)
    u, rate, decay = jnp.float32(0.25), jnp.float32(-RATE), jnp.float32(DECAY)
    got, want = apply_block(p, u, rate, decay), wide(p) - RATE * (0.25 + DECAY * wide(p))
    assert got.dtype == dtype
    bound = HALF[dtype] * np.abs(want) + 4 * HALF[jnp.float32] * 8
    assert np.all(np.abs(wide(got) - want) <= bound)


def neighbours(x):
    """The values of bfloat16 on either side of float64 ones that it does not hold."""
    nearest = x.astype(jnp.bfloat16)
    bits = nearest.view(np.uint16)
    beyond = np.abs(wide(nearest)) > np.abs(x)
    inner = np.where(beyond, bits - 1, bits).astype(np.uint16)
    return wide(inner.view(jnp.bfloat16)), wide((inner + np.uint16(1)).view(jnp.bfloat16))


def test_stochastic_rounding():
    """To one of the two neighbours, the mean right in every leaf; wide leaves are not rounded."""
    g, params, want = first_step()
    state, step = ADAMW.init(params), fuse(ADAMW, stochastic_rounding=True)
    got, _ = step(g, state, params)
    jax.tree.map(np.testing.assert_array_equal, got, step(g, state, params)[0])
    nearest, _ = fuse(ADAMW)(g, state, params)
    np.testing.assert_array_equal(got.pop("tile"), nearest["tile"])
    for name, x in got.items():
        inner, outer = neighbours(want[name])
        rounded = wide(x)
        # Float32 may be on the other side of a value of bfloat16 than float64 is.
        assert np.mean((rounded == inner) | (rounded == outer)) > 0.999, name
        up = (want[name] - inner) / (outer - inner)
        spread = np.sqrt(np.sum(up * (1 - up)))
        assert abs(np.sum(rounded == outer) - np.sum(up)) < 4 * spread, name
        assert np.any(rounded != wide(nearest[name])), name


def test_small_updates_add_up():
    """By 60 updates of 1/40 of a step parameters move 1.5 steps; to nearest they would stay."""
    step = 2.0**-8  # of bfloat16 in [1/2, 1)
    shapes, steps, share = {"bias": (4000,), "tile": (128, 32)}, 60, 1 / 40
    tx = stquant.adam(step * share, precision=WIDTHS)
    params = {name: jnp.full(shape, 0.75, jnp.bfloat16) for name, shape in shapes.items()}
    g = jax.tree.map(jnp.ones_like, params)  # Adam's update of them is 1, to a hundredth

    def body(carry, _):
        params, state = carry
        return stquant.fused_update(tx, g, state, params, stochastic_rounding=True), None

    start = params, tx.init(params)
    (params, _), _ = jax.jit(lambda: jax.lax.scan(body, start, length=steps))()
    for name, x in params.items():
        moved = (0.75 - wide(x)) / step
        # Roundings are independent, of a variance of share * (1 - share) steps squared.
        spread = np.sqrt(steps * share * (1 - share))
        bound = 4 * spread / np.sqrt(x.size) + 0.01 * steps * share
        assert abs(np.mean(moved) - steps * share) < bound, name
        assert abs(np.std(moved) - spread) < 0.1 * spread, name


SPECIAL = [0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, 2.0**-126, 2.0**-133]


def test_rounding_of_what_is_exact():
    """Values of bfloat16 stay, whatever the bits; NaN stays NaN, wherever its payload is."""
    x = jnp.asarray(SPECIAL, jnp.float32)
    want = np.asarray(SPECIAL, jnp.bfloat16).view(np.uint16)
    nan = np.uint32([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7FC00000]).view(np.float32)
    for bits in (0, 0x80000000, 0xFFFFFFFF):
        got = stochastic(x, jnp.full(x.shape, bits, jnp.uint32))
        np.testing.assert_array_equal(got.view(jnp.uint16), want)
        assert np.all(np.isnan(wide(stochastic(jnp.asarray(nan), jnp.uint32(bits)))))


@pytest.mark.parametrize("x", [1 + 2.0**-10, -(2 - 2.0**-9), 2.0**-130 * 1.3, 3.0e38])
def test_rounding_by_counting(x):
    """All 2**16 values of the bits: as many round away from zero as the part cut off says."""
    x = np.float32(x)
    bits = jnp.arange(2**16, dtype=jnp.uint32) << 16
    got = wide(stochastic(jnp.full(bits.shape, x), bits))
    word = x.view(np.uint32)
    inner = (word & np.uint32(0xFFFF0000)).view(np.float32)
    outer = ((word & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
    assert set(got) <= {float(inner), float(outer)}
    assert np.sum(got == outer) == word & 0xFFFF


def test_noise_is_fresh():
    """Uniform, and unlike that of other steps, leaves, seeds, and the codec's own."""
    group = jnp.arange(4096, dtype=jnp.uint32)[None, :]
    element = jnp.arange(32, dtype=jnp.uint32)[:, None]

    def draw(seed, leaf, step):
        bits = rounding_bits(keys_of(seed, jnp.int32(leaf), jnp.int32(step)), group, element)
        return wide(bits >> 16).ravel() / 2**16 - 0.5

    base = draw(0, 0, 5)
    bound = 4.5 / np.sqrt(base.size)
    assert abs(np.mean(base)) < bound * np.sqrt(1 / 12)
    others = [draw(0, 0, 6), draw(0, 0, 7), draw(0, 1, 5), draw(1, 0, 5), np.roll(base, 1)]
    noise = Dither(keys_of(0, jnp.int32(0), jnp.int32(5)), group, element)
    others += [wide(x).ravel() for x in (noise.nu, noise.mu)]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < bound


# --- as a part of a program ---


def test_in_place():
    """With donation, parameters and state keep their memory."""
    params = parameters()
    state = ADAMW.init(params)
    step = jax.jit(lambda *args: stquant.fused_update(ADAMW, *args), donate_argnums=(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 'Some donated buffers were not usable'
        program = step.lower(params, state, params).compile()
    unread = state[0].precision.tally.decays  # each step's own: the program does not take the last
    kept = common.nbytes((state, params)) - unread.nbytes
    assert program.memory_analysis().alias_size_in_bytes >= kept


def test_odd_trees():
    """No leaves, none that is quantized, an array without a tree."""
    for tree in ({}, {"empty": jnp.zeros((0, 3))}, jnp.zeros(()), [None, jnp.ones(3), ()]):
        params, state = stquant.fused_update(ADAM, tree, ADAM.init(tree), tree)
        assert jax.tree.structure(params) == jax.tree.structure(tree)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, tree)
        assert state[0].count == 1


def test_still_a_transformation():
    """It unpacks, chains and wraps as any other."""
    init, update = ADAM
    assert isinstance(ADAM, optax.GradientTransformationExtraArgs)
    assert (init, update) == (ADAM.init, ADAM.update)
    assert optax.with_extra_args_support(ADAM) is ADAM


# --- errors ---

PARAMS = parameters(shapes={"tile": (128, 32), "bias": (40,)})
STATE = ADAM.init(PARAMS)


def swap(**leaves):
    return PARAMS | leaves


@pytest.mark.parametrize(
    ("tx", "arguments", "words"),
    [
        *(
            (tx, {"state": tx.init(PARAMS)}, ("tx is", "stquant.adamw", "tx.update"))
            for tx in (
                optax.adam(1e-2),
                optax.chain(ADAM, optax.scale(2.0)),
                stquant.scale_by_adam_q(),
                stquant.solo_adamw(1e-2),
            )
        ),
        (None, {}, ("tx is NoneType", "stquant.adam")),
        (ADAM, {"params": None}, ("params=None", "expected the parameters")),
        (ADAM, {"params": {"tile": PARAMS["tile"]}}, ("params is another tree", "bias", "grads")),
        (ADAM, {"params": list(PARAMS.values())}, ("params is another tree", "list", "grads")),
        (ADAM, {"params": swap(bias=jnp.ones(41))}, ("(41,) at 'bias'", "(40,)")),
        (ADAM, {"params": swap(bias=jnp.ones(40, int))}, ("int32 at 'bias'", "floating")),
        (ADAM, {"grads": swap(bias=jnp.ones(40, int))}, ("'bias' has dtype int32", "floating")),
        (ADAM, {"state": STATE[0]}, ("state is ScaleByAdamQState", "tuple of 2")),
        (ADAM, {"state": (*STATE, STATE)}, ("state is tuple", "tuple of 2")),
        (ADAM, {"state": None}, ("state is NoneType", "tuple of 2")),
        (ADAM, {"stochastic_rounding": 1}, ("stochastic_rounding=1", "True or False")),
        (
            ADAM,
            {"params": swap(bias=jnp.ones(40, jnp.float16)), "stochastic_rounding": True},
            ("stochastic_rounding=True", "float16 at 'bias'", "bfloat16"),
        ),
    ],
)
def test_errors(tx, arguments, words):
    arguments = {"grads": PARAMS, "state": STATE, "params": PARAMS} | arguments
    with pytest.raises(ValueError) as caught:
        stquant.fused_update(tx, **arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_double_parameters():
    """They would be rounded to float32."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
        with pytest.raises(ValueError, match="float64 at 'bias'.*32 bits or less"):
            stquant.fused_update(ADAM, PARAMS, STATE, wide)
