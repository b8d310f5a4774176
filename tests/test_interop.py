"""A running Adam goes on in a few bits, and back: what is stored is what Optax had."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stquant_jax as stquant
from stquant_jax import Fixed, Storage, interop
from tests import common, oracle
from tests import oracle_storage as storage
from tests.test_oracle import PLACES, QUANTIZED, read

PARAMS = common.zeros()
WIDTHS = [(8, 8), (5, 4), (4, 0), (2, 2)]
WINDOW = 3
STEP = oracle.BASE_STEP  # octaves of sigma, of nu's scale
MU_STEP = 1 / 24  # octaves of mu's scale, in its fine range
B1, B2 = 0.9, 0.999


@cache
def adam(steps=300, seed=0):
    """Optax's state after some steps on Gaussian gradients, whose scales vary by row, by column
    and a little by element."""
    tx = optax.scale_by_adam(B1, B2)
    draws = [common.gaussian(seed=100 + i) for i in range(8)]
    scales = {name: jnp.sqrt(sum(g[name] ** 2 for g in draws) / 8) for name in common.SHAPES}

    @jax.jit
    def run(key):
        def step(state, key):
            keys = jax.random.split(key, len(scales))
            grads = {
                name: scale * jax.random.normal(k, scale.shape)
                for k, (name, scale) in zip(keys, scales.items(), strict=True)
            }
            return tx.update(grads, state)[1], None

        return jax.lax.scan(step, tx.init(PARAMS), jax.random.split(key, steps))[0]

    return run(jax.random.key(seed))


def convert(state, mu, nu, seed=0, params=PARAMS):
    """The quantized state, and it in Optax's form."""
    precision, where = Fixed(mu, nu, WINDOW), Storage(seed=seed)
    state = stquant.from_optax(state, params, precision, where)
    return state, stquant.to_optax(state, params, precision, where)


@cache
def converted(mu, nu):
    return convert(adam(), mu, nu)


def tiles(tree, name):
    return storage.to_tiles(np.asarray(tree[name], np.float64), PLACES[name])


def sums(x):
    return x.sum(-2, keepdims=True)


def octaves(x, y):
    """log2 of a ratio of sums of squares or of squares, halved; NaN of absent groups."""
    with np.errstate(all="ignore"):
        return 0.5 * np.log2(x / y)


# --- one conversion ---


@pytest.mark.parametrize(("mu", "nu"), WIDTHS)
def test_what_is_stored(mu, nu):
    """Groups keep their energy and their length to the scales' steps; by the definitions the codes
    are the moments that `to_optax` tells; elements are a step of the lattice off."""
    state, back = converted(mu, nu)
    assert int(state.count) == int(back.count) == 300
    delta, last = WINDOW / 2**nu, 2**nu - 1
    for name, codes in read(state).items():
        inside, shape = PLACES[name].element >= 0, QUANTIZED[name]
        sigma = oracle.decode_nu(codes.nu, codes.nu_scale, codes.nu_row, nu, WINDOW)
        m = oracle.decode_mu(codes.mu, codes.mu_scale, sigma, mu)
        for got, want in ((back.nu, sigma**2), (back.mu, m)):
            want = storage.from_tiles(want, PLACES[name], shape)
            np.testing.assert_allclose(got[name], want, 1e-5)

        v, m, v_q, m_q = (tiles(tree, name) for tree in (adam().nu, adam().mu, back.nu, back.mu))
        off = octaves(sums(v_q), sums(v))[sums(v) > 0]
        assert np.max(np.abs(off)) <= STEP + 1e-4
        assert abs(off.mean()) < 6 * STEP / np.sqrt(4 * off.size)

        with np.errstate(invalid="ignore"):
            e, e_q = (np.where(v_q > 0, x / np.sqrt(v_q), 0) for x in (m, m_q))
        length = octaves(sums(e_q**2), sums(e**2))[sums(v) > 0]
        assert np.max(np.abs(length)) <= MU_STEP + 1e-4

        # A code is less than a step off, and the common base no more than the codes.
        free = np.where(inside, codes.nu, 0).max(-2, keepdims=True) < last
        off = octaves(v_q, v)[inside & free & (sums(v) > 0)]
        assert np.max(np.abs(off), initial=0) <= 2 * delta + STEP + 1e-4
        assert nu < 8 or np.mean(free) > 0.5


@pytest.mark.parametrize(("mu", "nu"), WIDTHS)
def test_rows(mu, nu):
    """The best product of a factor per group and one per row, to the rounding of a row's byte."""
    state, back = converted(mu, nu)
    for name, codes in read(state).items():
        inside, v = PLACES[name].element >= 0, tiles(adam().nu, name)
        count = inside.sum(-2, keepdims=True)
        with np.errstate(all="ignore"):
            parts = np.where(inside & (sums(v) > 0), v * count / sums(v), np.nan)
            share = np.nanmean(parts, -1, keepdims=True)
            depth = -0.5 * np.log2(share / np.nanmax(share, -2, keepdims=True))
        there = np.isfinite(depth)
        assert np.max(np.abs(codes.nu_row / 32 - depth)[there]) <= 1 / 32 + 1e-4
        assert np.all(codes.nu_row.min(-2)[there.any(-2)] == 0)
        if nu == 0:
            product = share * sums(v) / np.nansum(np.where(inside, share, 0), -2, keepdims=True)
            off = octaves(tiles(back.nu, name), product)[inside & (sums(v) > 0)]
            assert np.max(np.abs(off)) <= 2 / 32 + STEP


@pytest.mark.parametrize(("mu", "nu"), WIDTHS)
def test_errors(mu, nu):
    """Of mu relative to sigma: uniform in a cell, 2**(1 - width) of the group's largest."""
    _, back = converted(mu, nu)
    for name in QUANTIZED:
        v_q, m, m_q = (tiles(tree, name) for tree in (back.nu, adam().mu, back.mu))
        with np.errstate(invalid="ignore"):
            e, e_q = (np.where(v_q > 0, x / np.sqrt(v_q), 0) for x in (m, m_q))
        largest = np.abs(e).max(-2, keepdims=True)
        cell = largest * (2.0 ** (1 - mu) if mu < 4 else 1 / (2 ** (mu - 1) - 1))
        # Nearest where there is a zero; at random next to zero, up to a cell, where there is not.
        reach = (1.0 if mu < 4 else 0.5) * cell + np.abs(e) * 0.2
        assert np.mean(np.abs(e_q - e) <= reach + 1e-6) > 0.99
        bound = 0.6 if mu == 2 else np.hypot(2.5 * 2.0**-mu, np.log(2) * MU_STEP / 2)
        assert np.sqrt(np.sum((e_q - e) ** 2) / np.sum(e**2)) < bound


@pytest.mark.parametrize("nu", [2, 4, 8])
def test_unbiased(nu):
    """Over seeds: roots inside a group, its energy, and zeros of mu where levels straddle zero."""
    name, seeds = "tile", 100
    params = {name: PARAMS[name]}
    exact = jax.tree.map(np.array, adam()._replace(mu={}, nu={}))
    mu = np.array(adam().mu[name])
    mu[:, ::3] = 0  # a third of every group
    v = np.array(adam().nu[name]).clip(1e-12)
    exact = exact._replace(mu={name: mu}, nu={name: v})
    roots, energies, zeros = [], [], []
    for seed in range(seeds):
        state, back = convert(exact, 2, nu, seed, params)
        codes = read(state, {name: PLACES[name]})[name]
        v_q, m_q = tiles(back.nu, name), tiles(back.mu, name)
        roots.append(np.where(codes.nu < 2**nu - 1, 0.5 * np.log2(v_q), np.nan))
        energies.append(octaves(sums(v_q), sums(tiles(exact.nu, name))))
        zeros.append((m_q / np.sqrt(v_q))[tiles(exact.mu, name) == 0])
    delta = WINDOW / 2**nu
    roots = np.stack(roots) - 0.5 * np.log2(tiles(exact.nu, name))
    never_last = np.isfinite(roots).all((0, 2), keepdims=True)[0] & np.isfinite(roots).all(0)
    assert nu < 4 or never_last.mean() > 0.05
    # The base is common to a group: elements are compared with the mean of its free ones.
    free = np.where(never_last, roots, np.nan)
    with np.errstate(all="ignore"):
        free -= np.nanmean(free, -2, keepdims=True)
    bias = free.mean(0)[never_last]
    # a code is one of two neighbours: a standard deviation of half a step at most
    assert np.max(np.abs(bias), initial=0) < 6 * 0.5 * delta / np.sqrt(seeds)
    assert np.max(np.abs(np.mean(energies, 0))) < 6 * 0.5 * STEP / np.sqrt(seeds)
    zeros = np.stack(zeros)
    assert np.all(np.abs(zeros.mean(0)) < 6 * zeros.std(0).max() / np.sqrt(seeds))
    assert zeros.std() > 0


def test_seeds():
    """One seed, one state, to the bit; another seed, other codes; Optax's state is left alone."""
    before = jax.tree.map(np.array, adam())
    first, again, other = (convert(adam(), 5, 4, seed)[0] for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert np.mean(np.asarray(first.arena) != np.asarray(other.arena)) > 0.1
    chex.assert_trees_all_equal(adam(), before)


BAD = {"nan": np.nan, "inf": np.inf, "too large": 3e38}


@pytest.mark.parametrize("moment", ["mu", "nu"])
@pytest.mark.parametrize("bad", BAD)
def test_not_finite(moment, bad):
    """One element marks its group, in both moments, and no other group."""
    state = jax.tree.map(np.array, adam())
    where = {name: np.prod(shape) // 3 for name, shape in common.SHAPES.items()}
    for name, at in where.items():
        getattr(state, moment)[name].reshape(-1)[at] = BAD[bad]
    if moment == "nu" and bad == "too large":  # as a sum
        for name in where:
            place = PLACES.get(name)
            if place is not None:
                group = (place.element == where[name]).any(-2, keepdims=True)
                inside = place.element[np.broadcast_to(group, place.element.shape)]
                state.nu[name].reshape(-1)[inside[inside >= 0]] = 3e38
    if moment == "mu" and bad == "too large":
        return  # finite, and no Adam's: nothing is promised
    _, back = convert(state, 5, 4)
    for name, place in PLACES.items():
        group = (place.element == where[name]).any(-2, keepdims=True)
        marked = np.broadcast_to(group, place.element.shape) & (place.element >= 0)
        for tree in (back.mu, back.nu):
            np.testing.assert_array_equal(np.isnan(tiles(tree, name)), marked)
    got, want = getattr(back, moment)["bias"], getattr(state, moment)["bias"]
    np.testing.assert_array_equal(got, want)  # exact leaves have no groups


@pytest.mark.parametrize(("mu", "nu"), WIDTHS)
def test_zero_tiny_and_huge(mu, nu):
    """Groups below 2**-126 of energy are zero, mu included; the largest sums are kept."""
    state = jax.tree.map(np.array, adam())
    places = {name: place.element[0, :, :4] for name, place in PLACES.items()}
    for name, element in places.items():
        for lane, value in enumerate((0.0, 1e-40, 1e36, 2.0**-110)):
            inside = element[:, lane][element[:, lane] >= 0]
            v = state.nu[name].reshape(-1)[inside].astype(float)
            v *= value / v.mean()
            state.nu[name].reshape(-1)[inside] = v
            state.mu[name].reshape(-1)[inside] = 0.1 * np.sqrt(v)
        inside = element[:, 0][element[:, 0] >= 0]
        state.mu[name].reshape(-1)[inside] = 1.0  # which nu does not bear out
    _, back = convert(state, mu, nu)
    for name in places:
        v, v_q, m_q = (tiles(tree, name)[0, :, :4] for tree in (state.nu, back.nu, back.mu))
        assert not v_q[:, :2].any() and not m_q[:, :2].any()
        assert np.isfinite(v_q).all() and np.isfinite(m_q).all()
        off = octaves(v_q[:, 2:].sum(0), v[:, 2:].sum(0))
        assert np.max(np.abs(off)) <= STEP + 1e-4


@given(
    st.integers(0, 2**32 - 1),
    st.floats(-36, 36),
    st.floats(0, 8),
    st.floats(0, 1),
    st.sampled_from([(5, 4), (4, 0)]),
)
def test_any_moments(seed, magnitude, spread, zeros, widths):
    """Whatever the moments: energies are kept, zeros are, and nothing becomes NaN."""
    random = np.random.default_rng(seed)
    name = "stack"  # flat and ragged
    shape = common.SHAPES[name]
    log = magnitude + spread * random.standard_normal(shape)
    v = np.where(random.random(shape) < zeros, 0, 10.0 ** np.clip(log, -44, 36.5))
    v = v.astype(np.float32)
    m = (random.uniform(-8, 8, shape) * np.sqrt(v)).astype(np.float32)
    exact = optax.ScaleByAdamState(jnp.int32(7), {name: m}, {name: v})
    _, back = convert(exact, *widths, seed, {name: PARAMS[name]})
    v, v_q, m_q = (tiles(tree, name) for tree in (exact.nu, back.nu, back.mu))
    assert np.isfinite(v_q).all() and np.isfinite(m_q).all()
    dead, clear = sums(v) < 0.99 * oracle.TINY, sums(v) > 1.01 * oracle.TINY
    assert not (v_q * dead).any() and not (m_q * dead).any()
    # Elements stop at 2**-63, the bottom of the scale: groups well above it keep what they had.
    off = octaves(sums(v_q), sums(v))[clear & (sums(v) > 2.0**-100)]
    assert np.max(np.abs(off), initial=0) <= STEP + 1e-3


def test_again():
    """There and back twice: the second time little is left to round. A row that is estimated one
    step off moves codes by 8/3, and so does the row that is the lowest."""
    first, once = converted(8, 8)
    second, twice = convert(once, 8, 8, seed=1)
    for name in QUANTIZED:
        for moment, bound in (("mu", 0.02), ("nu", 0.04)):
            x, y = (np.asarray(getattr(tree, moment)[name]) for tree in (once, twice))
            assert np.linalg.norm(x - y) < bound * np.linalg.norm(x)
        codes = [read(state)[name].nu for state in (first, second)]
        assert np.mean(np.abs(codes[0] - codes[1]) <= 7) > 0.99
    chex.assert_trees_all_equal(once.mu["bias"], adam().mu["bias"])
    chex.assert_trees_all_equal(twice.nu["bias"], adam().nu["bias"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    """Moments as `mu_dtype`, or parameters of 16 bits, leave them; NumPy's arrays, from a file."""
    state = jax.tree.map(np.array, adam())
    wide = state._replace(mu=jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), state.mu))
    half = state._replace(mu=jax.tree.map(lambda x: x.astype(dtype), state.mu))
    precision = Fixed(5, 4)
    got = stquant.from_optax(half, PARAMS, precision)
    chex.assert_trees_all_equal(got, stquant.from_optax(wide, PARAMS, precision))
    back = stquant.to_optax(got, PARAMS, precision, mu_dtype=dtype)
    like = optax.scale_by_adam(mu_dtype=dtype).init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, like)
    full = stquant.to_optax(got, PARAMS, precision)
    chex.assert_trees_all_equal(back.mu, jax.tree.map(lambda x: x.astype(dtype), full.mu))


@pytest.mark.parametrize("where", [Storage(row_alignment=8), Storage(min_size=0)], ids=str)
def test_storages(where):
    """Padded tiles and small quantized leaves too; a pinned leaf is exact to the bit."""
    precision = Fixed(8, 8, pins={"embed": "exact"})
    state = stquant.from_optax(adam(), PARAMS, precision, where)
    like = stquant.scale_by_adam_q(precision=precision, storage=where).init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, like)
    back = stquant.to_optax(state, PARAMS, precision, where)
    for name in common.SHAPES:
        for moment in ("mu", "nu"):
            x, y = (np.asarray(getattr(tree, moment)[name]) for tree in (adam(), back))
            assert np.linalg.norm(x - y) < 0.03 * np.linalg.norm(x)
    chex.assert_trees_all_equal(back.nu["embed"], adam().nu["embed"])


# --- the next steps ---


def test_next_update():
    """It is Optax's from the decoded moments, and close to the one from the moments before."""
    grads, tx = common.gaussian(seed=5), optax.scale_by_adam(np.float32(B1), np.float32(B2))
    precision = Fixed(8, 8)
    state = stquant.from_optax(adam(), PARAMS, precision)
    update = jax.jit(stquant.scale_by_adam_q(B1, B2, precision=precision).update)
    got, after = update(grads, state)
    decoded, _ = tx.update(grads, stquant.to_optax(state, PARAMS, precision))
    want, _ = tx.update(grads, adam())
    codes = read(state)
    for name in PARAMS:
        # a root is a logarithm of up to 63 octaves in float32
        np.testing.assert_allclose(got[name], decoded[name], rtol=1e-4, atol=1e-5)
        if name not in codes:
            continue
        inside = PLACES[name].element >= 0
        free = np.where(inside, codes[name].nu, 0).max(-2, keepdims=True) < 255
        x, y = (np.where(free, tiles(tree, name), 0) for tree in (got, want))
        assert free.mean() > 0.5 or name == "stack"  # whose groups lie across all scales
        # of sigma two steps of the lattice, of mu half a step of its scale and of its levels
        bound = np.log(2) * (2 * 4 / 2**8 + STEP + MU_STEP / 2) + 1 / 127
        assert np.linalg.norm(x - y) <= bound * np.linalg.norm(y)
    assert int(after.count) == 301


@pytest.mark.parametrize(("mu", "nu"), [(8, 8), (5, 4), (4, 0)])
def test_further_steps(mu, nu):
    """Fifty steps on, the update is no further from the exact one than that of a run which was
    quantized from the start."""
    tx = optax.scale_by_adam(np.float32(B1), np.float32(B2))
    step = jax.jit(tx.update)
    exact, old = tx.init(PARAMS), common.init(PARAMS, mu, nu)
    for seed in range(200):
        _, exact = step(common.gaussian(seed=seed), exact)
        _, old = common.update(common.gaussian(seed=seed), old)
    new = stquant.from_optax(exact, PARAMS, Fixed(mu, nu))
    new = new._replace(arena=jnp.pad(new.arena, ((0, len(old.arena) - len(new.arena)), (0, 0))))
    error = {name: np.zeros(2) for name in QUANTIZED}
    for seed in range(200, 250):
        grads = common.gaussian(seed=seed)
        want, exact = step(grads, exact)
        from_start, old = common.update(grads, old)
        switched, new = common.update(grads, new)
        for name in QUANTIZED:
            for i, got in enumerate((from_start, switched)):
                error[name][i] += np.sum((got[name] - want[name]) ** 2)
    for name, (from_start, switched) in error.items():
        assert switched < 1.1 * from_start, name


# --- states of optimizers ---

SMALL = common.zeros({"layer": (128, 32), "bias": (40,)})
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 5, 50)
MASK = {"layer": True, "bias": False}


def pair(optimizer, **options):
    """Optax's and ours of one name."""
    return getattr(optax, optimizer), partial(getattr(stquant, optimizer), **options)


FIXED = Fixed(5, 4)
OPTIMIZERS = {
    "adam": lambda adam, adamw: adam(1e-3),
    "adamw": lambda adam, adamw: adamw(1e-3),
    "schedule": lambda adam, adamw: adamw(SCHEDULE, weight_decay=0.1),
    "mask": lambda adam, adamw: adamw(1e-3, mask=MASK),
    "nesterov": lambda adam, adamw: adamw(1e-3, nesterov=True),
    "clipped": lambda adam, adamw: optax.chain(optax.clip_by_global_norm(1.0), adamw(SCHEDULE)),
    "steps": lambda adam, adamw: optax.MultiSteps(adamw(1e-3), 2),
    "inject": lambda adam, adamw: optax.inject_hyperparams(lambda rate: adamw(rate))(1e-3),
    "frozen": lambda adam, adamw: optax.chain(optax.masked(adamw(1e-3), True), optax.trace(0.9)),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_structures(make):
    """There, the state of our optimizer; back, Optax's; each goes on, donated, in the program that
    it had."""
    ours = [partial(f, precision=FIXED) for f in (stquant.adam, stquant.adamw)]
    theirs, mine = make(optax.adam, optax.adamw), make(*ours)
    grads = common.gaussian({name: x.shape for name, x in SMALL.items()})

    def stepper(tx):
        return jax.jit(lambda state, params: tx.update(grads, state, params), donate_argnums=0)

    state, (step, my_step) = theirs.init(SMALL), map(stepper, (theirs, mine))
    my_step(mine.init(SMALL), SMALL)
    for _ in range(2):
        updates, state = step(state, SMALL)
        rest = jax.tree.leaves(state, is_leaf=interop._is_adam)
        state = stquant.from_optax(state, SMALL, FIXED)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, mine.init(SMALL))
        kept = jax.tree.leaves(state, is_leaf=interop.is_state)
        for x, y in zip(rest, kept, strict=True):
            assert x is y or interop._is_adam(x)
        updates, state = my_step(state, SMALL)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, SMALL)
        state = stquant.to_optax(state, SMALL, FIXED)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, theirs.init(SMALL))
    assert step._cache_size() == my_step._cache_size() == 1


def test_empty_state():
    """A run that has not begun: the moments are zero, and the updates those of a fresh state."""
    start = stquant.from_optax(optax.scale_by_adam().init(PARAMS), PARAMS, FIXED)
    fresh = stquant.scale_by_adam_q(precision=FIXED).init(PARAMS)
    moments = stquant.to_optax(start, PARAMS, FIXED)
    chex.assert_trees_all_equal(moments, optax.scale_by_adam().init(PARAMS))
    update = jax.jit(stquant.scale_by_adam_q(precision=FIXED).update)
    grads = common.gaussian()
    chex.assert_trees_all_equal(update(grads, start), update(grads, fresh))


# --- programs ---


def program(function, leaf, *args):
    return jax.jit(function, static_argnums=0, donate_argnames=args[0]).lower(leaf, *args[1:])


def test_leaves_share_programs():
    """One for each geometry, wherever the leaf lies and however wide its codes are."""
    shapes = {f"layer{i}": (96, 160) for i in range(3)} | {"other": (160, 96)}
    params = common.zeros(shapes)
    state = optax.scale_by_adam().init(params)
    before = interop._encode._cache_size(), interop._decode._cache_size()
    precision = Fixed(5, 4, pins={"layer1": (8, 8)})
    stquant.to_optax(stquant.from_optax(state, params, precision), params, precision)
    after = interop._encode._cache_size(), interop._decode._cache_size()
    assert [y - x for x, y in zip(before, after, strict=True)] == [2, 2]


def test_memory():
    """Beside the arena, which is written in place, about one leaf's moments; and its result."""
    shape = (512, 4096)
    params = {"w": jnp.zeros(shape)}
    precision = Fixed(5, 4)
    state = stquant.scale_by_adam_q(precision=precision).init(params)
    packed = interop.rows.Packed(state.arena, state.mu_scale, state.nu_scale, state.nu_row)
    layout = interop.layout_for(params, precision, Storage())
    ((leaf, slots),) = interop.slots_of(layout, state.precision.plan)
    x = params["w"]
    encode = interop._encode.lower(leaf, slots, jnp.uint32(0), jnp.int32(1), packed, x, x)
    memory = encode.compile().memory_analysis()
    assert memory.alias_size_in_bytes == common.nbytes(packed)
    assert memory.temp_size_in_bytes < 1.1 * 2 * x.nbytes
    memory = interop._decode.lower(leaf, slots, packed).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * 2 * x.nbytes


# --- a run ---


PART = 80  # steps
TARGET = jax.random.normal(jax.random.key(0), (32, 8)) / 32**0.5


def loss_of(params, x):
    hidden = jax.nn.gelu(x @ params["up"])
    return jnp.mean((hidden @ params["down"] - jnp.sin(x @ TARGET)) ** 2)


@partial(jax.jit, static_argnums=0)
def train(tx, params, state, key):
    def step(carry, key):
        params, state = carry
        grads = jax.grad(loss_of)(params, jax.random.normal(key, (64, 32)))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jax.random.split(key, PART))[0]


def mlp(optimizers, seed):
    """Loss after a regression by two layers that is handed from optimizer to optimizer."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "up": jax.random.normal(keys[0], (32, 256)) / 32**0.5,
        "down": jax.random.normal(keys[1], (256, 8)) / 16,
    }
    state, last = optimizers[0].init(params), optimizers[0]
    for i, tx in enumerate(optimizers):
        if tx is not last:
            move = stquant.from_optax if i == 1 else stquant.to_optax
            state, last = move(state, params, MLP_FIXED, MLP_STORAGE), tx
        params, state = train(tx, params, state, jax.random.fold_in(keys[2], i))
    return float(loss_of(params, jax.random.normal(keys[3], (4096, 32))))


MLP_FIXED, MLP_STORAGE = Fixed(5, 4), Storage(min_size=2048)  # both layers are quantized


def test_training():
    """There and back in the middle of a run: the loss is within what seeds differ by."""
    rate = optax.cosine_decay_schedule(3e-3, 3 * PART)
    exact = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    adamw = stquant.adamw(rate, precision=MLP_FIXED, storage=MLP_STORAGE)
    ours = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    seeds = range(4)
    stayed = np.array([mlp([exact] * 3, seed) for seed in seeds])
    switched = np.array([mlp([exact, ours, exact], seed) for seed in seeds])
    assert stayed.max() < 0.2  # half of the target's energy: it learns
    assert abs(switched.mean() - stayed.mean()) < np.ptp(stayed)


# --- what is refused ---

GOOD = optax.scale_by_adam().init(SMALL)


def changed(**moments):
    return GOOD._replace(**{k: getattr(GOOD, k) | v for k, v in moments.items()})


REFUSED = [
    (optax.sgd(0.1).init(SMALL), ("state is tuple", "optax.ScaleByAdamState", "not none")),
    ((GOOD, GOOD), ("state is tuple", "one of it", "not 2")),
    (stquant.scale_by_adam_q(precision=FIXED).init(SMALL), ("ScaleByAdamQState", "not none")),
    (changed(mu={"more": jnp.zeros(3)}), ("state.mu", "['more']", "expected the tree")),
    (GOOD._replace(nu={"bias": jnp.zeros(40)}), ("state.nu", "['layer']", "expected the tree")),
    (GOOD._replace(mu=tuple(GOOD.mu.values())), ("state.mu", "expected the tree")),
    (changed(mu={"bias": jnp.zeros(41)}), ("state.mu['bias']", "(41,)", "expected (40,)")),
    (changed(nu={"layer": jnp.zeros((32, 128))}), ("nu['layer']", "(32, 128)", "(128, 32)")),
    (changed(mu={"bias": jnp.zeros(40, int)}), ("mu['bias']", "int32", "real floating")),
    (changed(nu={"bias": jnp.zeros(40, complex)}), ("nu['bias']", "complex64", "real floating")),
    (changed(nu={"bias": -jnp.ones(40)}), ("nu['bias']", "negative", "sums of squares")),
    (changed(nu={"layer": GOOD.nu["layer"].at[3, 3].set(-1)}), ("nu['layer']", "negative")),
]


@pytest.mark.parametrize(("state", "parts"), REFUSED, ids=[" ".join(x[1]) for x in REFUSED])
def test_refused(state, parts):
    with pytest.raises(ValueError) as error:
        stquant.from_optax(state, SMALL, FIXED)
    for part in parts:
        assert part in str(error.value)


def test_refused_options():
    with pytest.raises(ValueError, match="precision=5.0: expected a policy"):
        stquant.from_optax(GOOD, SMALL, 5.0)
    with pytest.raises(ValueError, match="storage='xla': expected a stquant.Storage"):
        stquant.from_optax(GOOD, SMALL, FIXED, "xla")
    with pytest.raises(ValueError, match="below the floor"):
        stquant.from_optax(GOOD, SMALL, stquant.Budget(0.5))
    with pytest.raises(ValueError, match="state is traced: .* call from_optax outside jit"):
        jax.jit(lambda state: stquant.from_optax(state, SMALL, FIXED))(GOOD)
