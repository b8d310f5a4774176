"""A running Adam goes on in a few bits, and back: what is stored is what Optax had.

One tree has every kind of leaf at every pair of widths. Programs are one for each geometry, so that
nearly all tests share those of this tree.
"""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stquant_jax as stquant
from stquant_jax import Fixed, Storage
from stquant_jax.conversion import interop
from stquant_jax.conversion.moments import slots_of
from stquant_jax.engine.state import packed_of
from tests import common, oracle, test_oracle
from tests import oracle_storage as storage
from tests.test_oracle import QUANTIZED, read

WIDTHS, WINDOW = [(2, 2), (4, 0), (5, 4), (8, 8)], 3
PRECISION = Fixed(5, 4, WINDOW, {f"{mu} {nu}$": (mu, nu) for mu, nu in WIDTHS})
LEAVES = {f"{kind} {mu} {nu}": (kind, mu, nu) for kind in QUANTIZED for mu, nu in WIDTHS}
PLACES = {name: test_oracle.PLACES[kind] for name, (kind, *_) in LEAVES.items()}
B1, B2 = np.float32(0.9), np.float32(0.999)
ADAM = optax.scale_by_adam(B1, B2)
QUANTIZING = stquant.scale_by_adam_q(B1, B2, precision=PRECISION)
UPDATE = jax.jit(QUANTIZING.update, donate_argnums=1)
STEP, MU_STEP = oracle.BASE_STEP, 1 / 24  # octaves: of sigma's scale, of mu's where it is fine
ULP = 1e-4  # octaves; float32 has 2**-18 of logarithms of up to 63 octaves, and some are summed


def spread(kinds):
    """The same leaves for all widths."""
    return {"bias": kinds["bias"]} | {name: kinds[kind] for name, (kind, *_) in LEAVES.items()}


def draw(seed):
    return common.gaussian(seed=seed)


PARAMS = spread(common.zeros())


@cache
def adam():
    """Optax's state after 60 steps: NumPy's arrays, as from a file."""
    step, state = jax.jit(ADAM.update), ADAM.init(common.zeros())
    for seed in range(60):
        _, state = step(draw(seed), state)
    state = jax.tree.map(np.array, state)
    return state._replace(mu=spread(state.mu), nu=spread(state.nu))


def convert(state, seed=0, params=PARAMS, precision=PRECISION):
    """The quantized state, and it in Optax's form."""
    state = stquant.from_optax(state, params, precision, Storage(seed=seed))
    return state, stquant.to_optax(state, params, precision)


@cache
def converted():
    return convert(adam())


def tiles(tree, name, places=PLACES):
    return storage.to_tiles(np.asarray(tree[name], np.float64), places[name])


def sums(x):
    return x.sum(-2, keepdims=True)


def octaves(x, y):
    """log2 of a ratio of squares, halved; NaN of absent groups."""
    with np.errstate(all="ignore"):
        return 0.5 * np.log2(x / y)


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.thorough
def test_what_is_stored(name):
    """Codes are those of the definitions, and by the definitions what `to_optax` tells. Groups keep
    their energy and their length to the steps of the scales."""
    state, back = converted()
    assert int(state.count) == int(back.count) == 60
    (_, mu, nu), place, got = LEAVES[name], PLACES[name], read(state, PLACES)[name]
    slot = oracle.Slot(mu, nu, WINDOW, 0, interop._SALT, list(LEAVES).index(name))
    v, m, v_q, m_q = (tiles(x, name) for x in (adam().nu, adam().mu, back.nu, back.mu))
    nothing = np.zeros(v.shape)  # instead of updates
    want = oracle.encode_anew(m, v, place, slot, 60)
    test_oracle.assert_leaf(nothing, got, nothing, want, place)

    sigma = oracle.decode_nu(got.nu, got.nu_scale, got.nu_row, nu, WINDOW) * (place.element >= 0)
    # Exponents of up to 63 in float32: 2**-17 of what they are of.
    np.testing.assert_allclose(v_q, sigma**2, 1e-5)
    np.testing.assert_allclose(m_q, oracle.decode_mu(got.mu, got.mu_scale, sigma, mu), 1e-5)

    living = sums(v) > 0
    off = octaves(sums(v_q), sums(v))[living]
    assert np.max(np.abs(off)) <= STEP + ULP
    # Up or down by chance: a standard deviation of half a step at most; six of the mean's.
    assert abs(off.mean()) < 6 * 0.5 * STEP / np.sqrt(off.size)
    with np.errstate(invalid="ignore"):
        e, e_q = (np.where(v_q > 0, x / np.sqrt(v_q), 0) for x in (m, m_q))
    assert np.max(np.abs(octaves(sums(e_q**2), sums(e**2))[living])) <= MU_STEP + ULP


def test_unbiased():
    """Over rounding's seeds, which leaves differ by: roots inside a group, its energy, and zeros of
    mu where levels straddle zero."""
    seeds, widths = 100, (2, 4, 8)
    names = {nu: [f"{i:02} 2 {nu}" for i in range(seeds)] for nu in widths}
    places = dict.fromkeys(sorted(sum(names.values(), [])), test_oracle.PLACES["tile"])
    m, v = np.array(adam().mu["tile 8 8"]), adam().nu["tile 8 8"].clip(1e-12)
    m[:, ::3] = 0  # a third of every group
    mu, nu = (dict.fromkeys(places, x) for x in (m, v))
    precision = Fixed(2, 4, WINDOW, {f" 2 {x}$": (2, x) for x in widths})
    state, back = convert(adam()._replace(mu=mu, nu=nu), 0, mu, precision)
    codes = read(state, places)
    for width, some in names.items():
        m, v = (tiles(x, some[0], places) for x in (mu, nu))
        v_q, m_q = (np.stack([tiles(x, i, places) for i in some]) for x in (back.nu, back.mu))
        # The base is common to a group: elements are compared with the mean of its free ones.
        free = np.stack([codes[i].nu for i in some]).max(0) < 2**width - 1
        assert width < 4 or free.mean() > 0.05
        roots = np.where(free, octaves(v_q, v), 0)
        roots -= sums(roots) / np.maximum(sums(free), 1)
        # A code is one of two neighbours: a standard deviation of half a step at most.
        bias = np.max(np.abs(roots.mean(0)[free]), initial=0)
        assert bias < 6 * 0.5 * WINDOW / 2**width / np.sqrt(seeds)
        energy = octaves(sums(v_q), sums(v)).mean(0)
        assert np.max(np.abs(energy)) < 6 * 0.5 * STEP / np.sqrt(seeds)
        zeros = (m_q / np.sqrt(v_q))[:, m == 0]
        assert np.all(np.abs(zeros.mean(0)) < 6 * zeros.std(0).max() / np.sqrt(seeds))
        assert zeros.std() > 0


def test_special_groups():
    """Whatever the moments: groups below 2**-126 of energy are zero, mu included; all others keep
    theirs, the largest too; one element that is not finite marks its group, in both moments, and no
    other group."""
    random, state = np.random.default_rng(0), jax.tree.map(np.array, adam())
    state.mu["bias"][3], state.nu["bias"][5] = np.nan, np.inf
    for name in LEAVES:
        m, v = state.mu[name].reshape(-1), state.nu[name].reshape(-1)
        v *= np.where(random.random(v.size) < 0.5, 0, 10 ** (3 * random.standard_normal(v.size)))
        m[:] = np.sqrt(v) * random.uniform(-8, 8, v.size)
        groups = [x[x >= 0] for x in PLACES[name].element[0].T[:9]]
        for group, mean in zip(groups, (0, 1e-40, 1e36, 2.0**-110), strict=False):
            v[group] = adam().nu[name].reshape(-1)[group]
            v[group] *= mean / v[group].mean(dtype=float)
            m[group] = 0.1 * np.sqrt(v[group])
        m[groups[0]] = 1  # which nu does not bear out
        v[groups[4][7]], v[groups[5][7]], m[groups[6][7]] = np.nan, np.inf, np.nan
        m[groups[7][7]], v[groups[8]] = -np.inf, 3e38  # the latter as a sum
    _, back = convert(state)
    for name in LEAVES:
        v, v_q, m_q = (tiles(x, name) for x in (state.nu, back.nu, back.mu))
        inside = PLACES[name].element[0, :, 4:9] >= 0
        for x in (v_q, m_q):
            assert not x[0, :, :2].any()
            np.testing.assert_array_equal(np.isnan(x[0, :, 4:9]), inside)
            x[0, :, 4:9] = v[0, :, 4:9] = 0
            assert np.isfinite(x).all()
        # Elements stop at 2**-63, whose squares are 2**-126: 32 of them add 2**-21 of 2**-100.
        kept = sums(v) > 2.0**-100
        kept[0, :, 3] = True  # all its elements are near 2**-55
        off = octaves(sums(v_q), sums(v))[kept]
        assert np.max(np.abs(off)) <= STEP + ULP
    chex.assert_trees_all_equal(*([x.mu["bias"], x.nu["bias"]] for x in (back, state)))


def test_seeds():
    """One seed, one state, to the bit; another, other codes; Optax's state is left alone."""
    before, (first, _) = jax.tree.map(np.array, adam()), converted()
    chex.assert_trees_all_equal(convert(adam())[0], first)
    other, _ = convert(adam(), seed=1)
    assert np.mean(np.asarray(first.arena) != np.asarray(other.arena)) > 0.1
    chex.assert_trees_all_equal(adam(), before)


def test_dtypes():
    """Moments as `mu_dtype`, or parameters of 16 bits, leave them."""
    mu, dtype = adam().mu, jnp.bfloat16
    half = mu["tile 5 4"].astype(dtype)
    half, wide = (adam()._replace(mu=mu | {"tile 5 4": x}) for x in (half, half.astype("f4")))
    got, full = convert(half)
    chex.assert_trees_all_equal(got, convert(wide)[0])
    back = stquant.to_optax(got, PARAMS, PRECISION, mu_dtype=dtype)
    chex.assert_trees_all_equal(back.mu, jax.tree.map(lambda x: x.astype(dtype), full.mu))
    chex.assert_trees_all_equal(back.nu, full.nu)


def test_storages():
    """Padded tiles and small quantized leaves too; a pinned leaf is exact to the bit."""
    precision = Fixed(8, 8, WINDOW, {"embed": "exact"})
    where, names = Storage(min_size=0, row_alignment=8), ("bias", "embed 8 8", "tile 8 8")
    old = adam()._replace(**{k: {x: getattr(adam(), k)[x] for x in names} for k in ("mu", "nu")})
    state = stquant.from_optax(old, old.mu, precision, where)
    like = stquant.scale_by_adam_q(precision=precision, storage=where).init(old.mu)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, like)
    back = stquant.to_optax(state, old.mu, precision, where)
    # Of nu two steps of the lattice: a code's and the base's. Less of mu. What lies beyond the
    # window is small.
    bound = 2 * np.log(2) * (2 * WINDOW / 2**8 + STEP)
    for got, want in ((back.mu, old.mu), (back.nu, old.nu)):
        for x, y in ((got[name], want[name]) for name in names):
            assert np.linalg.norm(x - y) < bound * np.linalg.norm(y)
        chex.assert_trees_all_equal(got["embed 8 8"], want["embed 8 8"])


@pytest.mark.thorough
def test_next_update():
    """It is Optax's from the decoded moments, and close to the one from the moments before."""
    grads, (state, back) = spread(draw(5)), convert(adam())
    (decoded, _), (want, _) = (ADAM.update(grads, x) for x in (back, adam()))
    codes = read(state, PLACES)
    got, after = UPDATE(grads, state)
    assert int(after.count) == 61
    np.testing.assert_allclose(got["bias"], want["bias"], 1e-6)
    for name in (name for name in LEAVES if name.endswith("8 8")):  # others shrink their roots
        # A root is a logarithm of up to 63 octaves in float32.
        np.testing.assert_allclose(got[name], decoded[name], rtol=1e-4, atol=1e-5)
        free = codes[name].nu.max(-2, keepdims=True) < 255
        x, y = (np.where(free, tiles(tree, name), 0) for tree in (got, want))
        # Of sigma two steps of the lattice; of mu half a step of its scale, and its levels: a cell
        # is 1/127 of the largest, 3.5 deviations at most, and rounding uniform in it, 12**-0.5.
        bound = np.log(2) * (2 * WINDOW / 2**8 + STEP + MU_STEP / 2) + 1 / 127
        assert np.linalg.norm(x - y) <= bound * np.linalg.norm(y) and free.any()


@pytest.mark.thorough
def test_further_steps():
    """In the steps after it switched, a run is no further from the exact one than a run that was
    quantized from the start."""
    step, exact, old = jax.jit(ADAM.update), adam(), QUANTIZING.init(PARAMS)
    for seed in range(60):
        _, old = UPDATE(spread(draw(seed)), old)
    (new, _), error = convert(exact), np.zeros((len(LEAVES), 2))
    for seed in range(60, 80):
        grads = spread(draw(seed))
        (want, exact), (x, old), (y, new) = (
            f(grads, state) for f, state in ((step, exact), (UPDATE, old), (UPDATE, new))
        )
        error += [[np.sum((u[name] - want[name]) ** 2) for u in (x, y)] for name in LEAVES]
    # Both are sums over 4096 elements and more, of errors that last for 1 / (1 - b1) = 10 steps:
    # of squares of 8000 independent ones, known to (2 / 8000)**0.5 = 1.6%. Six times that.
    assert np.all(error[:, 1] < 1.1 * error[:, 0]), error


def test_empty_state():
    """A run that has not begun: the moments are zero, and the updates those of a fresh state."""
    (state, back), grads = convert(ADAM.init(PARAMS)), spread(draw(0))
    chex.assert_trees_all_equal(back, ADAM.init(PARAMS))
    chex.assert_trees_all_equal(UPDATE(grads, state), UPDATE(grads, QUANTIZING.init(PARAMS)))


SMALL = common.zeros({"layer": (128, 32), "bias": (40,)})
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 5, 50)
MASK = {"layer": True, "bias": False}
FIXED = Fixed(5, 4)
OPTIMIZERS = {
    "adam": lambda adam, adamw: adam(1e-3),
    "schedule": lambda adam, adamw: adamw(SCHEDULE, mask=MASK, nesterov=True),
    "clipped": lambda adam, adamw: optax.chain(optax.clip_by_global_norm(1.0), adamw(SCHEDULE)),
    "steps": lambda adam, adamw: optax.MultiSteps(adamw(1e-3), 2),
    "inject": lambda adam, adamw: optax.inject_hyperparams(lambda rate: adamw(rate))(1e-3),
    "frozen": lambda adam, adamw: optax.chain(optax.masked(adamw(1e-3), True), optax.trace(0.9)),
}


def kinds(tree):
    """What programs are compiled for: weak types too."""
    return jax.eval_shape(lambda x: x, tree)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_structures(make):
    """There, the state of our optimizer; back, Optax's: each goes on in the program that it had,
    and all else in the state is left as it was."""
    ours = [partial(f, precision=FIXED) for f in (stquant.adam, stquant.adamw)]
    theirs, mine = make(optax.adam, optax.adamw), make(*ours)
    _, before = jax.jit(theirs.update)(SMALL, theirs.init(SMALL), SMALL)
    state = stquant.from_optax(before, SMALL, FIXED)
    rest = jax.tree.leaves(before, is_leaf=interop._is_adam)
    kept = jax.tree.leaves(state, is_leaf=interop.is_state)
    assert all(x is y or interop._is_adam(x) for x, y in zip(rest, kept, strict=True))
    updates, after = jax.eval_shape(mine.update, SMALL, state, SMALL)
    assert kinds(jax.jit(mine.init)(SMALL)) == kinds(state) == after
    assert updates == kinds(SMALL)
    assert kinds(stquant.to_optax(state, SMALL, FIXED)) == kinds(before)


def test_programs():
    """One for each geometry, wherever the leaf lies and however wide its codes are. The arena is
    written in place; beside it there are about one leaf's moments, and its result."""
    layout = interop.layout_for(PARAMS, PRECISION, Storage())
    leaves, slots = zip(*slots_of(layout, converted()[0].precision.plan), strict=True)
    assert len(leaves) == len(LEAVES) and len(set(leaves)) == len(QUANTIZED)
    assert all(kinds(x) == kinds(slots[0]) for x in slots)

    x = jnp.zeros((512, 4096))
    state = stquant.scale_by_adam_q(precision=FIXED).init(x)
    layout = interop.layout_for(x, FIXED, Storage())
    packed = packed_of(state)
    ((leaf, at),) = slots_of(layout, state.precision.plan)
    encode = interop._encode, (at, jnp.uint32(0), jnp.int32(1), packed, x, x)
    decode = interop._decode, (at, packed)
    for (program, args), aliased in ((encode, common.nbytes(packed)), (decode, 0)):
        memory = program.lower(leaf, None, (), *args).compile().memory_analysis()
        assert memory.alias_size_in_bytes == aliased
        assert memory.temp_size_in_bytes < 1.1 * 2 * x.nbytes
