"""Polynomials on bits within their bounds; hashes, and what is made of them, uniform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stquant_jax.storage.noise import Dither, keys_of
from stquant_jax.storage.numerics import (
    EXP2_FIXED_ONE,
    TINY,
    exp2,
    exp2_of_fixed,
    hash32,
    log2,
    log2_of_ratio,
    to_code,
    to_float,
)
from tests import oracle, oracle_storage

HASH = jax.jit(hash32)


def relative_error(got, want):
    return np.max(np.abs(np.asarray(got, np.float64) / want - 1))


def test_exp2():
    x = np.concatenate([np.linspace(-126, 127.99, 400_001), np.arange(-126, 128), [-1e-7, -1e-30]])
    x = x.astype(np.float32)
    assert relative_error(jax.jit(exp2)(x), 2.0 ** x.astype(np.float64)) < 2e-7


@pytest.mark.parametrize(
    "x",
    [
        np.geomspace(TINY, 3e38, 400_001),
        1 + np.linspace(-1e-3, 1e-3, 100_001),
        1 + np.arange(-64, 65) * 2.0**-23,
        [np.sqrt(0.5), np.sqrt(2), TINY, 2.0**127],
    ],
    ids=["range", "drift", "ulps", "edges"],
)
def test_log2(x):
    x = np.asarray(x, np.float32)
    x = x[x != 1]
    assert relative_error(jax.jit(log2)(x), np.log2(x.astype(np.float64))) < 4e-7


@pytest.mark.parametrize("of", [log2, log2_of_ratio])
def test_log2_of_powers_of_two(of):
    """Exact, so that a group that does not grow does not drift."""
    k = np.arange(-126, 128)
    np.testing.assert_array_equal(jax.jit(of)(np.exp2(k).astype(np.float32)), k)


def test_log2_of_ratio():
    """Near 1 the drift is what it is to a part in 2,000; of zero it is far away."""
    x = np.concatenate([np.geomspace(1e-30, 1e30, 100_001), 1 + np.linspace(-1e-3, 1e-3, 10_001)])
    x = x.astype(np.float32)
    x = x[x != 1]
    got = jax.jit(log2_of_ratio)(np.append(x, np.float32(0)))
    assert relative_error(got[:-1], np.log2(x.astype(np.float64))) < 1e-3
    near = np.abs(x - 1) < 1e-2
    assert relative_error(got[:-1][near], np.log2(x[near].astype(np.float64))) < 1e-4
    assert got[-1] == -127


def test_exp2_of_fixed():
    """Falls, from 1 by a half an octave, by what the oracle says."""
    x = np.unique(np.concatenate([np.linspace(0, 100, 100_001) * 2**23, np.arange(100) << 23]))
    x = x.astype(np.int32)
    got = np.asarray(jax.jit(exp2_of_fixed)(x), np.float64)
    octaves = x / EXP2_FIXED_ONE
    assert np.all(np.diff(got) < 0)
    np.testing.assert_array_equal(got[np.isin(x, np.arange(100) << 23)], 0.5 ** np.arange(100))
    assert relative_error(got, 2.0**-octaves) < 1.1e-4
    assert relative_error(got, oracle.root_nu(octaves, 1.0)) < 3e-7


@given(st.lists(st.integers(0, 2**22 - 1), min_size=1, max_size=8))
def test_codes(codes):
    codes = jnp.asarray(codes, jnp.uint32)
    x = to_float(codes)
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x, codes)
    np.testing.assert_array_equal(to_code(x), codes)
    assert to_code(x).dtype == jnp.uint32


@given(st.integers(0, 2**32 - 1))
def test_hash_by_definition(x):
    assert int(HASH(jnp.uint32(x))) == int(oracle_storage.hash32(x))


def test_hash_is_bijective():
    """Its inverse undoes it: two xor-shifts of half a word or more, two odd factors."""
    x = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    h = np.asarray(HASH(x))
    h = h ^ (h >> 16)
    h = h * np.uint32(pow(0x846CA68B, -1, 2**32))
    h = h ^ (h >> 15) ^ (h >> 30)
    h = h * np.uint32(pow(0x7FEB352D, -1, 2**32))
    np.testing.assert_array_equal(h ^ (h >> 16), x)


def test_hash_avalanche():
    """Every bit of a counter turns over every bit of its hash half of the time."""
    x = np.arange(2**14, dtype=np.uint32)
    bits = np.arange(32, dtype=np.uint32)
    flipped = np.asarray(HASH(x ^ (np.uint32(1) << bits)[:, None])) ^ np.asarray(HASH(x))
    share = ((flipped[:, None] >> bits[:, None]) & 1).mean(-1)
    assert np.max(np.abs(share - 0.5)) < 0.05


def noise(seed=0, leaf=0, step=1, groups=4096):
    group = jnp.arange(groups, dtype=jnp.uint32)[None]
    element = jnp.arange(32, dtype=jnp.uint32)[:, None]
    return draw(seed, jnp.int32(leaf), jnp.int32(step), group, element)


@partial(jax.jit, static_argnums=0)
def draw(seed, leaf, step, group, element):
    found = Dither(keys_of(seed, leaf, step), group, element)
    return oracle_storage.Noise(found.nu, found.mu, found.nu_coin, found.mu_coin)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_noise_by_definition(seed):
    want = oracle_storage.noise(seed, 3, 1000, np.arange(256)[None])
    for x, y in zip(noise(seed, 3, 1000, 256), want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_noise_is_uniform():
    """Chi-squared over 64 cells: mean 63, deviation 11, of elements next to nothing; mu's about
    zero."""
    for name, x in noise()._asdict().items():
        x = x + 0.5 if name == "mu" else x
        assert 0 <= x.min() and x.max() < 1
        count, _ = np.histogram(x, 64, (0, 1))
        mean = x.size / 64
        bound = 63 + 5 * 11 if name.endswith("coin") else 1.0
        assert np.sum((count - mean) ** 2 / mean) < bound


def test_noise_of_a_group():
    """The numbers of its elements leave no gap wider than 5/32: their rounding nearly cancels."""
    found = noise()
    for x in (found.nu, found.mu + 0.5):
        gaps = np.diff(np.sort(x, axis=0), axis=0, append=np.min(x, axis=0, keepdims=True) + 1)
        assert gaps.max() < 5 / 32


def test_noise_is_independent():
    """Of groups, leaves, seeds and each other for coins; mu's of an element from step to step."""
    a = noise()
    pairs = [(a.nu_coin, a.mu_coin), (a.nu_coin[:, :-1], a.nu_coin[:, 1:])]
    pairs += [(a.nu_coin, noise(leaf=1).nu_coin), (a.nu_coin, noise(seed=1).nu_coin)]
    pairs += [(a.nu[:1], a.nu_coin), (a.mu[:1], a.mu_coin)]
    fresh = np.stack([noise(step=t, groups=1).mu[5, 0] for t in range(4096)])
    rotated = np.stack([noise(step=t, groups=1).nu[5, 0] for t in range(4096)])
    pairs += [(fresh[:-lag], fresh[lag:]) for lag in (1, 2, 3, 11)] + [(fresh, rotated)]
    for x, y in pairs:
        x, y = np.ravel(x), np.ravel(y)
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(x.size)


@pytest.mark.parametrize("name", ["nu", "nu_coin", "mu_coin"])
def test_noise_over_steps(name):
    """In n steps an element's numbers leave no gap wider than 3/n: they sample [0, 1) evenly."""
    steps = 256
    x = np.stack([getattr(noise(step=t, groups=8), name) for t in range(steps)])
    gaps = np.diff(np.sort(x, axis=0), axis=0)
    assert gaps.max() < 3 / steps
    assert np.max(np.abs(x.mean(0) - 0.5)) < 3 / steps
