"""nu's codec: the energy kept, drift unbiased, shrinkage in the update alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stquant_jax import codecs
from tests import oracle

WIDTHS, WINDOWS = range(9), (1, 2, 3, 4, 6, 8)
GROUPS = 128


@jax.jit
def decode(old, width, window):
    lat = codecs.lattice(width, window, 0.0)
    return codecs.decode_second(*old, jnp.ones_like(old[0], jnp.float32), lat)


@jax.jit
def encode(v, old, round_row, width, window, dither, coin, shrinkage=0.5):
    """SecondCode of v, which grew out of the codes, scales and rows `old`."""
    lat, valid = codecs.lattice(width, window, shrinkage), jnp.ones_like(v)
    second = codecs.decode_second(*old, valid, lat)
    return codecs.encode_second(v, second, old[2], round_row, valid, lat, dither, coin)


def codes(width, seed=0, groups=GROUPS, lowest=15_000, highest=45_000):
    """Codes, scales and rows of a tile, at random."""
    random = np.random.default_rng(seed)
    code = random.integers(0, 2**width, (1, 32, groups))
    code -= code.min(1, keepdims=True)  # as every encoding leaves them
    row = random.integers(0, 64, (1, 32, 1))
    return (
        jnp.asarray(code, jnp.uint32),
        jnp.asarray(random.integers(lowest, highest, (1, 1, groups)), jnp.uint32),
        jnp.asarray(row - row.min(), jnp.float32),
    )


def noise(seed=0, groups=GROUPS):
    random = np.random.default_rng(seed)
    return random.random((1, 32, groups), np.float32), random.random((1, 1, groups), np.float32)


def packed(new):
    return new.codes, new.scale, new.row


def sigma_of(second):
    return np.asarray(second.root * second.base, np.float64)


def energy(second):
    return np.sum(np.asarray(second.v, np.float64), 1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("window", WINDOWS)
def test_decode(width, window):
    old = codes(width)
    want = oracle.decode_nu(*(np.asarray(x, np.int64) for x in old), width, window)
    second = decode(old, width, window)
    np.testing.assert_allclose(sigma_of(second), want, rtol=2e-5)
    np.testing.assert_allclose(second.v, want**2, rtol=4e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_states_of_version_0_1(width):
    """Their roots were powers of two, to the part in 10,000 that the documentation says."""
    code, scale, row = (np.asarray(x, np.float64) for x in codes(width))
    base = oracle.BASE_LOWEST + (scale - 1) * oracle.BASE_STEP
    want = 2 ** (base - row / 32 - 3 / 2**width * code)
    np.testing.assert_allclose(sigma_of(decode(codes(width), width, 3)), want, rtol=1.2e-4)


@pytest.mark.parametrize("width", WIDTHS)
def test_levels_fall(width):
    """By delta octaves from code to code; they begin at the base."""
    n = 2**width
    code = jnp.arange(n, dtype=jnp.uint32)[None, :, None]
    scale = jnp.full((1, 1, 1), 30_000, jnp.uint32)
    sigma = sigma_of(decode((code, scale, jnp.zeros((1, n, 1))), width, 3)).ravel()
    base = oracle.BASE_LOWEST + (30_000 - 1) * oracle.BASE_STEP
    np.testing.assert_allclose(np.log2(sigma), base - 3 / n * np.arange(n), atol=2e-4)  # the cubic


def test_scales():
    """Increasing over both bytes; 0 is a group of zeros, the top code one that is not finite."""
    scale = jnp.arange(2**16, dtype=jnp.uint32)[None, None]
    old = jnp.zeros((1, 1, 2**16), jnp.uint32), scale, jnp.zeros((1, 1, 1))
    sigma = sigma_of(decode(old, 0, 2)).ravel()
    assert sigma[0] == 0 and np.isnan(sigma[-1])
    assert np.all(np.diff(sigma[:-1]) > 0)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(WIDTHS),
    st.sampled_from(WINDOWS),
    st.integers(0, 31),
    st.floats(0, 3),
)
def test_energy_is_kept(seed, width, window, round_row, spread):
    """To the rounding of the scale, whatever the elements do: they are as likely to be clipped."""
    old = codes(width, seed)
    v = np.asarray(decode(old, width, window).v)
    v = v * np.exp(spread * np.random.default_rng(seed).standard_normal(v.shape)).astype(np.float32)
    new = encode(v, old, round_row, width, window, *noise(seed))
    octaves = np.log2(energy(decode(packed(new), width, window)) / np.sum(v, 1, dtype=np.float64))
    assert np.max(np.abs(octaves)) <= 2 / 512 + 1e-4  # v is the square of sigma
    assert abs(np.mean(octaves)) < 6 * 2 / 512 / np.sqrt(12 * GROUPS)


@pytest.mark.parametrize("width", [2, 3, 4, 6, 8])  # one bit has no level that is not the last
@pytest.mark.parametrize("growth", [0.5, 1.0, 2.0])
def test_drift_is_unbiased(width, growth):
    """In log sigma, for elements that do not leave the lattice.

    The shift that puts the largest at code 0 and the base that keeps the energy move all of a group
    alike: it is the elements' distances from one of them that are compared, over many draws.
    """
    window, draws = 3, 2**14
    old = codes(width, 1, 1)
    code = jnp.minimum(old[0], 2**width - 1 - 2**width // 4)  # some way to the last one
    old = code, *old[1:]
    old = tuple(jnp.repeat(x, n, -1) for x, n in zip(old, (draws, draws, 1), strict=True))
    drift = np.random.default_rng(0).uniform(-0.2, 0.2, (1, 32, 1)) * 3 / 2**width  # octaves
    before = decode(old, width, window)
    v = np.asarray(before.v) * np.exp2(2 * drift) * growth
    new = encode(v.astype(np.float32), old, 5, width, window, *noise(0, draws))
    after = decode(packed(new), width, window)
    octaves = np.log2(sigma_of(after)[0])
    true = 0.5 * np.log2(v[0])
    inside = np.asarray(new.codes[0]).max(-1) < 2**width - 1
    assert inside.sum() >= 4
    octaves, true = octaves[inside], true[inside]
    error = (octaves - octaves[:1]) - (true - true[:1])
    delta = window / 2**width
    assert np.max(np.abs(error)) < 2 * delta + 1 / 32
    assert np.max(np.abs(error.mean(-1))) < 6 * delta * np.sqrt(0.5 / draws)


@pytest.mark.parametrize("width", WIDTHS)
def test_shrinkage_is_not_stored(width):
    """Codes, scales and rows do not depend on it; what the update divides by does."""
    old = codes(width)
    v = np.asarray(decode(old, width, 3).v)
    v = v * np.exp(0.3 * np.random.default_rng(0).standard_normal(v.shape)).astype(np.float32)
    none, whole, half = (encode(v, old, 7, width, 3, *noise(), s) for s in (0.0, 1.0, 0.5))
    for other in (whole, half):
        for x, y in zip(packed(none), packed(other), strict=True):
            np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(none.v_used, v, rtol=2e-5)
    # Shrunk all the way, elements are told apart by their row alone.
    logs = np.log2(whole.v_used)
    between_rows = logs - logs[:, :1]
    assert np.max(np.ptp(between_rows, axis=-1)) < 1e-4
    want = (1 - oracle.SHORT / 2) * (v + whole.v_used / (1 - oracle.SHORT)) / 2
    np.testing.assert_allclose(half.v_used, want, rtol=1e-4)


@pytest.mark.parametrize("width", WIDTHS)
def test_absent_groups(width):
    """Below 2**-126 of energy a group is zero; from zero it starts at its own mean."""
    absent = codes(width, lowest=0, highest=1)
    v = np.full((1, 32, GROUPS), 1e-3, np.float32)
    v[..., : GROUPS // 2] = 2.0**-126 / 33
    new = encode(v, absent, 0, width, 3, *noise())
    alive = np.arange(GROUPS) >= GROUPS // 2
    np.testing.assert_array_equal(np.asarray(new.scale)[0, 0] > 0, alive)
    second = decode(packed(new), width, 3)
    assert not np.any(np.asarray(second.v)[..., ~alive])
    np.testing.assert_allclose(energy(second)[..., alive], 32e-3, rtol=0.01)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("width", [0, 1, 4, 8])
def test_not_finite(width, bad):
    """One element spoils its group, which stays spoilt; the others do not notice."""
    old = codes(width)
    v = np.array(decode(old, width, 3).v)
    fine = encode(v, old, 3, width, 3, *noise())
    v = v.copy()  # the one that is given to `encode` may be read later
    v[0, 9, 5] = bad
    new = encode(v, old, 3, width, 3, *noise())
    scale = np.asarray(new.scale).ravel()
    assert scale[5] == oracle.BASE_NOT_FINITE
    assert np.isnan(np.asarray(decode(packed(new), width, 3).v)[..., 5]).all()
    others = np.arange(GROUPS) != 5
    np.testing.assert_array_equal(scale[others], np.asarray(fine.scale).ravel()[others])
    again = encode(decode(packed(new), width, 3).v, packed(new), 4, width, 3, *noise(1))
    assert np.asarray(again.scale).ravel()[5] == oracle.BASE_NOT_FINITE
    assert np.all(np.isfinite(again.v_used[..., others]))


def product(rows, groups):
    """v that is a factor per row, of octaves of its root, times one per group."""
    return np.exp2(2 * (rows[None, :, None] + groups[None, None, :])).astype(np.float32)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_found_at_once(width):
    """Of a product of rows and groups, out of zeros and wherever it goes from there: to two
    steps of the rows, and with codes one and a half of theirs, for it is the energy that is kept.
    """
    random, round_row = np.random.default_rng(0), 3
    old = codes(width, lowest=0, highest=1)
    for spread in (1.5, 0.5, 2.0):
        v = product(spread * random.uniform(-1, 1, 32), random.uniform(-9, 9, GROUPS))
        old = packed(encode(v, old, round_row, width, 3, *noise()))
        octaves = np.log2(sigma_of(decode(old, width, 3)) / np.sqrt(v))
        assert np.max(np.abs(octaves)) < 3 / 32 + (1.5 * 3 / 2**width if width else 0)


@pytest.mark.parametrize("width", WIDTHS)
def test_groups_that_come_alive_leave_rows_where_they_are(width):
    """If they look as the rows say. What they are has nothing to do with having been zero."""
    random = np.random.default_rng(0)
    rows = random.integers(-64, 64, 32) / 32
    some = product(rows, random.uniform(-9, 9, GROUPS))
    some[..., ::3] = 0
    old = packed(encode(some, codes(width, lowest=0, highest=1), 0, width, 3, *noise()))
    v = np.asarray(decode(old, width, 3).v)
    late = product(-np.asarray(old[2]).ravel() / 32, random.uniform(-9, 9, GROUPS))
    new = encode(np.where(v > 0, v, late), old, 0, width, 3, *noise(1))
    assert np.max(np.abs(np.asarray(new.row) - np.asarray(old[2]))) <= 1
    np.testing.assert_array_equal(np.asarray(new.scale) > 0, True)
