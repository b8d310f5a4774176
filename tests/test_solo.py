"""SOLO against its definitions, and what its paper says of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stquant_jax.solo import codecs, decays
from stquant_jax.solo.decays import solo_momentum, swamping_bound
from stquant_jax.solo.transform import scale_by_solo, solo_adamw
from stquant_jax.storage.settings import Storage
from tests import common, oracle_solo

WIDTHS = (2, 3, 4)
ALL = Storage(min_size=0)  # quantizes every leaf
ENCODE_MU = jax.jit(codecs.encode_mu, static_argnums=1)
DECODE_MU = jax.jit(codecs.decode_mu, static_argnums=2)
ENCODE_NU = jax.jit(codecs.encode_nu, static_argnums=(1, 2))
DECODE_NU = jax.jit(codecs.decode_nu)

BORDER = 1e-6  # within this margin of the next code float32 may round to either


def blocks(n=256, spread=1.5, seed=0):
    """Normal values, their scale log-normal: float32[n, 128]."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, 128)) * np.exp(spread * random.standard_normal((n, 128)))
    return (1e-3 * x).astype(np.float32)


def uniform(n=256, seed=1):
    return np.random.default_rng(seed).random((n, 128), np.float32)


def same_codes(got, want, margin):
    """All of them but one or two on a border, of a million or so."""
    differ = np.asarray(got) != want
    assert np.sum(differ) <= 2 and np.all(margin[differ] < BORDER)


def round_trip_nu(v, bits, quantile=0.1, noise=None):
    noise = uniform(len(v)) if noise is None else noise
    return np.asarray(DECODE_NU(*ENCODE_NU(jnp.asarray(v), bits, quantile, noise)), np.float64)


# --- the codec of m ---

LEVELS = {
    2: [0.55],
    3: [0.055, 0.325, 0.775],
    4: [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875],
}


@pytest.mark.parametrize("bits", range(2, 9))
def test_dynamic_map(bits):
    levels = codecs.dynamic_map(bits)
    assert levels.dtype == np.float32 and len(levels) == 2**bits
    np.testing.assert_allclose(levels, oracle_solo.levels(bits), rtol=1e-6)
    if bits in LEVELS:
        listed = [*(-x for x in LEVELS[bits]), 0, *LEVELS[bits], 1]
        np.testing.assert_allclose(levels, sorted(listed), rtol=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_mu_codes(bits):
    m = blocks()
    codes, scale = ENCODE_MU(m, bits)
    want = oracle_solo.encode_mu(m.astype(np.float64), bits)
    np.testing.assert_array_equal(scale, want.scale)
    same_codes(codes, want.codes, want.margin)
    decoded = oracle_solo.decode_mu(np.asarray(codes), want.scale, bits)
    np.testing.assert_allclose(DECODE_MU(codes, scale, bits), decoded, rtol=1e-6)


@given(st.sampled_from(WIDTHS), st.integers(0, 2**32 - 1), st.floats(0, 8), st.integers(-100, 100))
def test_mu_is_nearest(bits, seed, spread, octave):
    m = np.ldexp(blocks(8, spread, seed), octave)
    decoded = np.asarray(DECODE_MU(*ENCODE_MU(m, bits), bits))
    scale = np.abs(m).max(-1, keepdims=True)
    error = np.abs(m[..., None] - oracle_solo.levels(bits) * scale[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(decoded - m) / scale, error / scale, atol=1e-6)


# --- the codec of v ---


@pytest.mark.parametrize("quantile", [0.05, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("bits", WIDTHS)
def test_nu_codes(bits, quantile):
    v = blocks() ** 2
    v[5:9] *= np.random.default_rng(0).random((4, 128)) < 0.3  # mostly zeros
    codes, scale, alpha = ENCODE_NU(v, bits, quantile, uniform())
    want = oracle_solo.encode_nu(v.astype(np.float64), bits, quantile, uniform())
    np.testing.assert_array_equal(scale, want.scale)
    np.testing.assert_allclose(alpha, want.alpha, rtol=1e-5)
    same_codes(codes, want.codes, want.margin)
    decoded = oracle_solo.decode_nu(np.asarray(codes), want.scale, np.asarray(alpha, np.float64))
    np.testing.assert_allclose(DECODE_NU(codes, scale, alpha), decoded, rtol=2e-6)


@given(st.sampled_from(WIDTHS), st.integers(0, 2**32 - 1), st.floats(0, 4), st.integers(-20, 50))
def test_nu_is_bracketed(bits, seed, spread, octave):
    """Between D and D x_p, each value decodes to a level next to it; the largest to itself."""
    v = np.ldexp(blocks(8, spread, seed), octave) ** 2
    decoded = round_trip_nu(v, bits, noise=uniform(8, seed))
    largest = v.max(-1, keepdims=True)
    lowest = np.quantile(v, 0.1, axis=-1, keepdims=True)
    v = np.clip(v, lowest, largest)
    step = (largest / lowest) ** (1 / (2**bits - 1))
    np.testing.assert_array_less(decoded, v * step * (1 + 1e-5))
    np.testing.assert_array_less(v / step, decoded * (1 + 1e-5))
    np.testing.assert_array_equal(decoded.max(-1, keepdims=True), largest)


@pytest.mark.parametrize("bits", WIDTHS)
def test_nu_is_unbiased_in_the_logarithm(bits):
    v = blocks(4) ** 2
    draws = (np.arange(256) + 0.5) / 256
    logs = [np.log(round_trip_nu(v, bits, noise=np.full(v.shape, u, np.float32))) for u in draws]
    lowest = np.quantile(v, 0.1, axis=-1, keepdims=True)
    inside = v > lowest * 1.001
    np.testing.assert_allclose(np.mean(logs, 0)[inside], np.log(v)[inside], atol=0.05)


@pytest.mark.parametrize("bits", WIDTHS)
def test_padding_is_no_sample(bits):
    """A block that is half zeros has the quantile of its other half; zeros take the last code."""
    v = blocks()[:, :64] ** 2
    codes, _, alpha = ENCODE_NU(np.pad(v, ((0, 0), (0, 64))), bits, 0.5, uniform())
    x_p = np.quantile(v / v.max(-1, keepdims=True), 0.5, axis=-1)
    np.testing.assert_allclose(alpha, x_p ** (1 / (2**bits - 1)), rtol=1e-5)
    assert np.all(np.asarray(codes)[:, 64:] == 2**bits - 1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_blocks_of_one_value(bits):
    """Zeros stay exactly zero; constants and single values what they are."""
    x = np.zeros((6, 128), np.float32)
    x[1] = 3e-7
    x[2] = 2.0**-126
    x[3] = 2.0**-127  # denormal
    x[4, 7] = 5e10
    x[5] = 2.0**126
    nu, mu = round_trip_nu(x, bits), np.asarray(DECODE_MU(*ENCODE_MU(x, bits), bits))
    for decoded in (nu, mu):
        assert not np.any(decoded[[0, 3]])
        np.testing.assert_allclose(decoded[[1, 2, 5]], x[[1, 2, 5]], rtol=2e-7)
        assert decoded[4, 7] == x[4, 7]
    assert np.count_nonzero(mu[4]) == 1


@pytest.mark.parametrize("bad", [np.inf, 3e38, np.nan])
@pytest.mark.parametrize("bits", WIDTHS)
def test_not_finite(bits, bad):
    """One element spoils its block and no other."""
    x = np.abs(blocks(3))
    x[1, 77] = bad
    for decoded, clean in (
        (DECODE_MU(*ENCODE_MU(x, bits), bits), DECODE_MU(*ENCODE_MU(x[::2], bits), bits)),
        (round_trip_nu(x, bits), round_trip_nu(x[::2], bits, noise=uniform(3)[::2])),
    ):
        assert np.all(np.isnan(decoded[1]))
        np.testing.assert_array_equal(decoded[::2], clean)


# --- steps ---

SHAPES = {"bias": (40,), "ragged": (60, 97), "single": (1,), "tile": (64, 64)}


@partial(jax.jit, static_argnums=2)
def update(grads, state, bits=(4, 2)):
    return scale_by_solo(bits=bits, storage=Storage(min_size=0, seed=7)).update(grads, state)


def init(shapes=SHAPES, bits=(4, 2)):
    return scale_by_solo(bits=bits, storage=ALL).init(common.zeros(shapes))


def gradients(step):
    """Blocks of zeros, of one value, of squares below 2**-126; one gets an inf, one a NaN."""
    grads = {name: np.array(x) for name, x in common.gaussian(SHAPES, step).items()}
    flat = grads["ragged"].reshape(-1)
    flat[:256] = 0
    flat[256:384] = 1e-3
    flat[384:512] = 1e-20
    if step >= 2:
        flat[512], flat[640] = np.inf, np.nan
    return grads


def stored(state, name):
    """A leaf's part of the state, unpacked."""
    mu, mu_scale, nu, nu_scale, nu_alpha = (np.asarray(tree[name]) for tree in state[1:])
    mu, nu = (oracle_solo.unpack(x, len(mu_scale)) for x in (mu, nu))
    return oracle_solo.Codes(mu, *np.float64((mu_scale,)), nu, *np.float64((nu_scale, nu_alpha)))


@pytest.mark.parametrize("bits", [(4, 2), (2, 4), (3, 3)], ids=str)
def test_steps_by_definition(bits):
    """Updates, and codes for codes; each step begins at the library's own state."""
    state = init(bits=bits)
    for count in range(1, 6):
        grads, old = gradients(count), state
        updates, state = update(grads, old, bits)
        for i, name in enumerate(sorted(SHAPES)):
            g, new = grads[name].astype(np.float64), stored(state, name)
            random = oracle_solo.noise(7, i, count, len(new.mu))
            want, mu, nu = oracle_solo.step(
                g, stored(old, name), oracle_solo.Solo(bits=bits), random, count
            )
            np.testing.assert_allclose(updates[name], want, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(new.mu_scale, mu.scale, rtol=1e-5)
            np.testing.assert_allclose(new.nu_scale, nu.scale, rtol=1e-5)
            np.testing.assert_allclose(new.nu_alpha, nu.alpha, rtol=1e-4)
            # Of elements that are all alike, but for last bits, all levels of v are the same.
            alike = (nu.alpha > 1 - BORDER) & (nu.scale > 0)
            mu_told, nu_told = np.isfinite(mu.scale), np.isfinite(nu.scale) & ~alike
            for got, one, told in ((new.mu, mu, mu_told), (new.nu, nu, nu_told)):
                same_codes(got[told], one.codes[told], one.margin[told])
            for planes, codes, width in zip(
                (state.mu[name], state.nu[name]), (new.mu, new.nu), bits, strict=True
            ):
                np.testing.assert_array_equal(planes, oracle_solo.pack(codes, width))


def run(tx, grads, state):
    """Updates and states of all steps."""
    step = jax.jit(tx.update)
    out = []
    for g in grads:
        updates, state = step(g, state)
        out.append((updates, state))
    return out


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_scan_is_the_loop():
    """But for the last bit of a float, and the codes that fall on a border by it."""
    shapes = {"ragged": SHAPES["ragged"]}
    tx = scale_by_solo(storage=ALL)
    state = tx.init(common.zeros(shapes))
    grads = [common.gaussian(shapes, seed) for seed in range(5)]
    loop = run(tx, grads, state)
    stacked = jax.tree.map(lambda *x: np.stack(x), *grads)
    scan = jax.jit(lambda s: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], s, stacked))
    state, updates = scan(state)
    for one, other in zip(jax.tree.leaves(loop[-1][1]), jax.tree.leaves(state), strict=True):
        if one.dtype == jnp.float32:
            np.testing.assert_allclose(one, other, rtol=1e-5)
        else:
            assert np.mean(one != other) < 0.01
    for name, x in loop[-1][0].items():
        np.testing.assert_allclose(x, updates[name][-1], rtol=1e-4, atol=1e-5)


def test_donation():
    """The new state takes the old one's place; its shapes never change."""
    grads, state = common.gaussian(SHAPES), init()
    step = jax.jit(scale_by_solo(storage=ALL).update, donate_argnums=1)
    _, new = step(grads, state)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    step(grads, new)
    assert step._cache_size() == 1


def test_noise():
    """Uniform, and another one in every step, leaf and run."""
    n = 256
    noise = oracle_solo.noise(7, 1, 5, n)
    count, _ = np.histogram(noise, 64, (0, 1))
    assert np.sum((count - noise.size / 64) ** 2 / (noise.size / 64)) < 63 + 5 * 11
    others = [oracle_solo.noise(7, 1, 6, n), oracle_solo.noise(7, 2, 5, n)]
    others += [oracle_solo.noise(8, 1, 5, n), np.roll(noise, 1), np.roll(noise, 1, 0)]
    for other in others:
        correlation = np.corrcoef(noise.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(noise.size)


def test_seed():
    """Another one rounds v, and v alone, otherwise."""
    grads = [common.gaussian(common.TILE)]
    one, two = (
        run(tx, grads, tx.init(common.zeros(common.TILE)))[0][1]
        for tx in (scale_by_solo(storage=Storage(seed=seed)) for seed in (1, 2))
    )
    equal((one.mu, one.nu_scale, one.nu_alpha), (two.mu, two.nu_scale, two.nu_alpha))
    assert np.any(one.nu["tile"] != two.nu["tile"])


@pytest.mark.parametrize("bits", [(4, 2), (3, 2), (2, 2), (3, 4)], ids=str)
def test_bytes(bits):
    """A code costs its bits, a block three numbers; in tiles of 32 blocks."""
    n = 128 * 1024
    state = jax.eval_shape(scale_by_solo(bits=bits).init, {"w": jnp.zeros((128, 1024))})
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size - 4 == n * sum(bits) / 8 + 3 * 4 * n / 128
    ragged = jax.eval_shape(scale_by_solo(bits=bits).init, {"w": jnp.zeros(4096 + 129)})
    assert [x.shape for x in jax.tree.leaves(ragged.mu)] == [(bits[0], 2, 128)]
    assert [x.shape for x in jax.tree.leaves(ragged.nu_alpha)] == [(34,)]


def test_small_leaves_are_exact():
    """As Optax has them, to the rounding of float32; the others stay near."""
    params = common.zeros({"bias": (40,), "scalar": (), "tile": (64, 64)})
    grads = [
        {**common.gaussian({"bias": (40,), "tile": (64, 64)}, seed, 0.1), "scalar": np.float32(1)}
        for seed in range(5)
    ]
    tx, reference = scale_by_solo(0.8, 0.99, 1e-6), optax.scale_by_adam(0.8, 0.99, 1e-6)
    ours, theirs = (run(x, grads, x.init(params)) for x in (tx, reference))
    for (u, state), (v, _) in zip(ours, theirs, strict=True):
        for name in ("bias", "scalar"):
            np.testing.assert_allclose(u[name], v[name], rtol=1e-4, atol=1e-6)
            assert state.mu[name].shape == params[name].shape
            assert isinstance(state.mu_scale[name], optax.MaskedNode)
    assert np.corrcoef(ours[-1][0]["tile"].ravel(), theirs[-1][0]["tile"].ravel())[0, 1] > 0.9


def test_dtypes():
    """Updates have the gradients', the state its own; the math is in float32."""
    tx, dtype = scale_by_solo(), jnp.bfloat16
    low = jax.tree.map(lambda x: (10 * x).astype(dtype), common.gaussian(common.TILE, spread=0.1))
    high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    state = tx.init(common.zeros(common.TILE, dtype))
    ((u, low_state),), ((v, high_state),) = run(tx, [low], state), run(tx, [high], state)
    equal(low_state, high_state)
    equal(u, jax.tree.map(lambda x: x.astype(dtype), v))
    assert {x.dtype for x in jax.tree.leaves(u)} == {jnp.dtype(dtype)}


# --- with Optax ---


def test_adamw_is_the_chain():
    params = common.gaussian(common.TILE, 3)
    grads, mask = common.gaussian(common.TILE), {"tile": True}
    schedule = optax.linear_schedule(1e-2, 0, 10)
    ours = solo_adamw(schedule, 0.7, 0.99, 1e-6, 0.1, mask, bits=(3, 3), quantile=0.2)
    chain = optax.chain(
        scale_by_solo(0.7, 0.99, 1e-6, bits=(3, 3), quantile=0.2),
        optax.add_decayed_weights(0.1, mask),
        optax.scale_by_learning_rate(schedule),
    )
    equal(*(jax.jit(x.update)(grads, x.init(params), params) for x in (ours, chain)))


def test_inject_hyperparams():
    inject = optax.inject_hyperparams(
        solo_adamw, static_args="quantile", hyperparam_dtype=jnp.float32
    )
    grads = params = common.gaussian(common.TILE)
    (updates, _), (want, _) = (
        jax.jit(tx.update)(grads, tx.init(params), params)
        for tx in (inject(1e-3, bits=(2, 2)), solo_adamw(1e-3, bits=(2, 2)))
    )
    np.testing.assert_allclose(updates["tile"], want["tile"], rtol=1e-5)


def test_masked():
    """Leaves that are not there are no leaves of the state."""
    params = {**common.zeros(common.TILE), "step": jnp.zeros((), jnp.int32)}
    tx = optax.masked(scale_by_solo(), {"tile": True, "step": False})
    grads = {**common.gaussian(common.TILE), "step": params["step"]}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params))
    assert updates["step"] == 0 and np.any(updates["tile"])


def test_no_leaves():
    tx = scale_by_solo()
    assert tx.update({}, tx.init({}))[0] == {}


@pytest.mark.parametrize("bits", [(4, 2), (2, 2)], ids=str)
def test_quadratic(bits):
    """Ill-conditioned, solved to a thousandth of a millionth of where it began."""
    target = jnp.asarray(blocks(32, 1.0))
    curvature = jnp.asarray(np.exp(blocks(32, 0) * 1e3))
    tx = solo_adamw(optax.cosine_decay_schedule(1e-3, 400), weight_decay=0.0, bits=bits)

    def loss(x):
        return jnp.sum(curvature * (x - target) ** 2)

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        return (optax.apply_updates(x, updates), state), None

    x = jnp.zeros_like(target)
    (end, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=400))((x, tx.init(x)))
    assert loss(end) < 1e-3 * loss(x)


# --- what the paper says of momentum and swamping ---


@pytest.mark.parametrize("bits", decays.HALF_GAP)
def test_half_gaps(bits):
    """The paper's, to three digits."""
    gap = np.median(np.diff(oracle_solo.levels(bits)))
    assert abs(gap / 2 - decays.HALF_GAP[bits]) < 0.0005 + 1e-9


@pytest.mark.parametrize(
    ("reference_bits", "momenta"), [(8, (0.350, 0.211, 0.116)), (5, (0.820, 0.694, 0.527))]
)
def test_momentum_table(reference_bits, momenta):
    got = [solo_momentum(bits, 0.9, reference_bits) for bits in (4, 3, 2)]
    np.testing.assert_array_equal(np.round(got, 3), momenta)


@given(st.floats(0, 0.999), st.sampled_from(sorted(decays.HALF_GAP)))
def test_momentum(reference, bits):
    """Its own at the same width; with less precision, less momentum."""
    np.testing.assert_allclose(solo_momentum(bits, reference, bits), reference, atol=1e-12)
    momenta = [solo_momentum(b, reference, bits) for b in sorted(decays.HALF_GAP)]
    assert np.all(np.diff(momenta) >= 0) and 0 <= momenta[0] and momenta[-1] < 1


def decaying(codec, b2, steps=300):
    """Half of a block's gradients stay 1, those of the other half decay from there: its v."""
    v, g = np.ones(128), np.ones(128)
    for _ in range(steps):
        g[64:] *= 0.5
        v = codec(b2 * v + (1 - b2) * g**2)
    return v[64:]


@pytest.mark.parametrize("bits", WIDTHS)
def test_swamping(bits):
    """Rounded to the nearest of linear levels, v never moves from the bound on, and does below."""

    def linear(v):
        return np.floor(v / v.max() * (2**bits - 1) + 0.5) / (2**bits - 1) * v.max()

    bound = swamping_bound(bits)
    np.testing.assert_allclose(bound, {4: 0.967, 3: 0.929, 2: 0.833}[bits], atol=5e-4)
    for b2 in (bound + 1e-9, 0.99, 0.999):
        np.testing.assert_array_equal(decaying(linear, b2), 1)
    assert np.all(decaying(linear, bound - 1e-3) < 1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_solo_keeps_moving(bits):
    """Where linear levels stand still, the logarithm of v falls as fast as it should."""
    random = np.random.default_rng(bits)

    def codec(v):
        noise = random.random((1, 128), np.float32)
        return round_trip_nu(v[None].astype(np.float32), bits, noise=noise)[0]

    v = decaying(codec, 0.99)
    np.testing.assert_allclose(np.mean(np.log(v)), 300 * np.log(0.99), rtol=0.05)


# --- errors ---

PARAMS = common.zeros({"tile": (128, 32), "bias": (40,)})

ARGUMENTS = [
    (lambda: scale_by_solo(bits=4), "bits=4", "a pair"),
    (lambda: scale_by_solo(bits=(4, 2, 2)), "bits=(4, 2, 2)", "a pair"),
    (lambda: scale_by_solo(bits=(5, 2)), "bits=(5, 2)", "2, 3 or 4"),
    (lambda: scale_by_solo(bits=(4, 1)), "bits=(4, 1)", "2, 3 or 4"),
    (lambda: scale_by_solo(bits=(4.0, 2)), "bits=(4.0, 2)", "2, 3 or 4"),
    (lambda: scale_by_solo(bits="42"), "bits='42'", "a pair"),
    (lambda: scale_by_solo(quantile=0.0), "quantile=0.0", "between 0 and 1"),
    (lambda: scale_by_solo(quantile=1), "quantile=1", "between 0 and 1"),
    (lambda: scale_by_solo(quantile=float("nan")), "quantile=nan", "between 0 and 1"),
    (lambda: scale_by_solo(quantile=jnp.float32(0.1)), "quantile=Array", "static_args"),
    (lambda: scale_by_solo(b1=1.0), "b1=1.0", "0 <= b1 < 1"),
    (lambda: scale_by_solo(b2=-0.5), "b2=-0.5", "0 <= b2 < 1"),
    (lambda: scale_by_solo(eps=-1e-8), "eps=-1e-08", "at least 0"),
    (lambda: scale_by_solo(b2=jnp.bfloat16(0.999)), "b2 arrived as bfloat16", "float32"),
    (lambda: scale_by_solo(storage="xla"), "storage='xla'", "stquant.Storage"),
    (lambda: scale_by_solo(storage=Storage(backend="pallas_tpu")), "pallas_tpu", "'xla'"),
    (lambda: scale_by_solo(storage=Storage(backend="pallas_gpu")), "pallas_gpu", "'xla'"),
    (lambda: scale_by_solo(storage=Storage(row_alignment=8)), "row_alignment=8", "expected None"),
    (lambda: solo_adamw(1e-3, bits=(8, 8)), "bits=(8, 8)", "2, 3 or 4"),
    (lambda: solo_momentum(9), "bits=9", "from 2 to 8"),
    (lambda: solo_momentum(4, reference_bits=1), "reference_bits=1", "from 2 to 8"),
    (lambda: solo_momentum(4, 1.0), "reference=1.0", "0 <= reference < 1"),
    (lambda: swamping_bound(0), "bits=0", "positive integer"),
    (lambda: swamping_bound(2.5), "bits=2.5", "positive integer"),
]


@pytest.mark.parametrize(("call", "got", "accepted"), ARGUMENTS, ids=[x[1] for x in ARGUMENTS])
def test_arguments(call, got, accepted):
    with pytest.raises(ValueError) as error:
        call()
    assert got in str(error.value)
    assert accepted in str(error.value)


@pytest.mark.parametrize("leaf", [jnp.zeros(3, jnp.complex64), jnp.zeros(3, jnp.int32), 0.5])
def test_leaves(leaf):
    with pytest.raises(ValueError, match=r"leaf 'layer\.1' .*: expected"):
        scale_by_solo().init({"layer": [jnp.zeros(4), leaf]})


@pytest.mark.parametrize(
    "other",
    [
        {"tile": (128, 64), "bias": (40,)},
        {"tile": (128, 32), "bias": (41,)},
        {"tile": (128, 32)},
        {"tile": (128, 32), "bias": (40,), "more": (64, 64)},
    ],
    ids=str,
)
def test_gradients_of_another_model(other):
    with pytest.raises(ValueError, match="expected gradients of the tree and shapes given to init"):
        scale_by_solo().update(common.zeros(other), scale_by_solo().init(PARAMS))


def test_another_state():
    for tx in (scale_by_solo(bits=(4, 3)), scale_by_solo(storage=ALL)):
        with pytest.raises(ValueError, match="the same bits and storage"):
            tx.update(PARAMS, scale_by_solo().init(PARAMS))
    with pytest.raises(ValueError, match="state is ScaleByAdamState: expected"):
        scale_by_solo().update(PARAMS, optax.scale_by_adam().init(PARAMS))
