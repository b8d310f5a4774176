"""The codec of moments that stand alone, against the NumPy oracle and what it promises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stquant_jax.codecs import decode_signed, encode_signed, levels
from stquant_jax.codecs.signed import SCALE_NOT_FINITE
from tests import oracle_signed as oracle

WIDTHS = 2, 3, 4, 5, 8
GROUPS = 64
ONES = np.ones((32, GROUPS), np.float32)


@jax.jit
def encode(width, x, old, dither, coin):
    return encode_signed(x, old, jnp.asarray(ONES), levels(width), dither, coin)


@jax.jit
def decode(width, codes, scale):
    return decode_signed(codes, scale, jnp.asarray(ONES), levels(width))


def draw(seed):
    random = np.random.default_rng(seed)
    size = 2.0 ** random.uniform(-100, 100, GROUPS)
    x = random.standard_normal((32, GROUPS)) * np.exp(random.standard_normal((32, GROUPS))) * size
    x *= random.random((32, GROUPS)) > 0.2
    old = x + random.standard_normal((32, GROUPS)) * size * 10.0 ** random.uniform(-4, 0, GROUPS)
    return *(y.astype(np.float32) for y in (x, old)), random


@pytest.mark.parametrize("width", WIDTHS)
@given(st.integers(0, 2**32 - 1))
def test_codes_and_scales_are_the_oracles(width, seed):
    x, old, random = draw(seed)
    dither = random.random((32, GROUPS), np.float32)
    coin = random.random((1, GROUPS), np.float32)
    codes, scale = map(np.asarray, encode(width, x, old, dither, coin))
    for j in range(GROUPS):
        group, before = x[:, j].astype(float), old[:, j].astype(float)
        want, doubt = oracle.rounded(group, before, dither[:, j], width)
        sure = doubt > 1e-3
        np.testing.assert_array_equal(codes[sure, j], want[sure])
        exact = oracle.scale_code(group, codes[:, j], coin[0, j], width)
        assert np.floor(exact - 1e-2) <= scale[0, j] <= np.floor(exact + 1e-2)
    got = np.asarray(decode(width, codes, scale))
    want = np.stack([oracle.decode(codes[:, j], scale[0, j], width) for j in range(GROUPS)], 1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_zero_and_not_finite_groups(width):
    x = np.ones((32, GROUPS), np.float32)
    x[:, 0], x[3, 1], x[4, 2], x[:, 3], x[:, 4], x[:, 5] = 0, np.nan, -np.inf, 1e-40, 3e37, 3e38
    half = np.full_like(x, 0.5)
    codes, scale = encode(width, x, np.zeros_like(x), half, half[:1])
    assert scale[0, 0] == scale[0, 3] == 0
    assert scale[0, 1] == scale[0, 2] == SCALE_NOT_FINITE
    got = np.asarray(decode(width, codes, scale))
    assert (got[:, [0, 3]] == 0).all()
    assert np.isnan(got[:, [1, 2]]).all()
    assert np.isfinite(got[:, [4, *range(6, GROUPS)]]).all()
    np.testing.assert_allclose(got[:, 4], 3e37, rtol=1e-2)
    # Beyond what scales reach: NaN, rather than less.
    assert np.isnan(got[:, 5]).all() or np.allclose(got[:, 5], 3e38, rtol=1e-2)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_group_keeps_its_length(width):
    """On average over the coins; and never more than a step of the scale."""
    x, old, random = draw(7)
    coins, lengths = (np.arange(32, dtype=np.float32) + 0.5) / 32, []
    dither = random.random((32, GROUPS), np.float32)
    for coin in coins:
        codes, scale = encode(width, x, old, dither, np.full((1, GROUPS), coin, np.float32))
        got = np.asarray(decode(width, codes, scale), float)
        lengths.append(np.linalg.norm(got, axis=0) / np.linalg.norm(x.astype(float), axis=0))
    np.testing.assert_allclose(np.log2(lengths), 0, atol=1.01 / oracle.PER_OCTAVE)
    np.testing.assert_allclose(np.mean(np.log2(lengths), axis=0), 0, atol=2e-4)


@pytest.mark.parametrize("width", (4, 8))
def test_what_moves_less_than_a_level_moves_on_average(width):
    """Rounded to the nearest it would stand still for ever."""
    lev = oracle.levels(width)
    old = np.zeros((32, GROUPS))
    old[0] = lev[-1]
    old[1:] = lev[len(lev) // 2 + 1]
    x = old + 0.2 * (lev[1] - lev[0])
    x[0] = old[0]
    random, moved = np.random.default_rng(0), []
    for _ in range(64):
        dither = random.random((32, GROUPS), np.float32)
        got = decode(width, *encode(width, *map(np.float32, (x, old)), dither, dither[:1]))
        moved.append(np.asarray(got)[1:].mean())
    assert abs(np.mean(moved) - x[1, 0]) < 0.02 * (lev[1] - lev[0])


@pytest.mark.parametrize("decay", (0.9, 0.99, 0.999))
def test_closed_loop(decay):
    """An average of noisy gradients at 8 bits, everything fed back: what quantize_state promises
    of a moment (docs/explanation/design.md)."""
    steps = 600
    noise = partial(np.random.default_rng(1).standard_normal, (32, GROUPS))
    exact = held = np.zeros((32, GROUPS), np.float32)
    scales = np.exp(noise()).astype(np.float32)
    random, errors = np.random.default_rng(2), []
    for step in range(steps):
        g = (scales * noise()).astype(np.float32)
        exact, new = (decay * m + (1 - decay) * g for m in (exact, held))
        dither = random.random((33, GROUPS), np.float32)
        codes, scale = encode(8, new.astype(np.float32), held, dither[:32], dither[32:])
        held = np.asarray(decode(8, codes, scale))
        if step > steps // 2:
            errors.append(((held - exact) ** 2).sum() / (exact**2).sum())
    assert np.mean(errors) < {0.9: 1e-3, 0.99: 1e-2, 0.999: 6e-2}[decay]
