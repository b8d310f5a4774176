"""What a single encoding does: bounds of its error, and what is kept exactly or on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stquant_jax import codecs
from tests import oracle

MU_WIDTHS = range(2, 9)
GROUPS = 64
CENTER = 128  # the scale that is 1
VALID = np.ones((1, 32, 1), np.float32)


@jax.jit
def encode_mu(e, width, dither, coin):
    lev = codecs.levels(width)
    return codecs.encode_first(e, VALID * jnp.ones_like(e), jnp.ones_like(coin), lev, dither, coin)


@jax.jit
def decode_mu(code, scale, width):
    """With sigma = 1: what the codes say of e."""
    return codecs.decode_first(code, scale, *jnp.ones(2), codecs.levels(width))


def mu_codes(e, width, seed=0):
    """uint32 codes and scales of e [1, 32, groups], rounded with fresh random numbers."""
    random = np.random.default_rng(seed)
    dither = random.random(e.shape, np.float32) - np.float32(0.5)
    coin = random.random((1, 1, e.shape[-1]), np.float32)
    return encode_mu(e.astype(np.float32), width, dither, coin)


def groups(kind, seed, octaves=0.0):
    """float32[1, 32, groups], the largest 2**octaves, as training or an adversary sends them."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((1, 32, GROUPS))
    if kind == "heavy":
        x = x * np.exp(2 * random.standard_normal(x.shape))
    if kind == "sparse":
        x = x * (random.random(x.shape) < 0.1)
    if kind == "one":
        x = x * (np.arange(32)[:, None] == random.integers(32, size=GROUPS))
    if kind == "equal":
        x = np.sign(x)
    x[:, 1] += (x == 0).all(1)  # a group of zeros has a test of its own
    return (x / np.abs(x).max(1, keepdims=True) * 2.0**octaves).astype(np.float32)


KINDS = st.sampled_from(["gaussian", "heavy", "sparse", "one", "equal"])
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("width", MU_WIDTHS)
def test_mu_levels(width):
    """Increasing, symmetric, evenly spaced; by definition."""
    want = oracle.mu_levels(width)
    code = jnp.arange(len(want), dtype=jnp.uint32)[None, :, None]
    got = np.asarray(decode_mu(code, jnp.full((1, 1, 1), CENTER, jnp.uint32), width)).ravel()
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.all(np.diff(got) > 0)
    assert (0 in got) == (width >= 4)
    np.testing.assert_array_equal(got, -got[::-1])


@pytest.mark.parametrize("width", range(2, 8))
def test_mu_levels_are_nested(width):
    """Bit for bit: what makes growing free of loss."""
    code = jnp.arange(256, dtype=jnp.uint32)[None, :, None]
    scale = jnp.full((1, 1, 1), 77, jnp.uint32)
    few, many = (np.asarray(decode_mu(code, scale, w))[0, : 2**w] for w in (width, width + 1))
    few = few[:-1] if width >= 4 else few  # the code that no level has
    assert np.all(np.isin(few, many))


def test_mu_scales():
    """Increasing over the whole byte, and by definition; 0 is a zero group, 255 is not finite."""
    scale = jnp.arange(256, dtype=jnp.uint32)[None, None]
    top = jnp.full((1, 1, 256), 14, jnp.uint32)
    got = np.asarray(decode_mu(top, scale, 4), np.float64).ravel()
    assert got[0] == 0 and np.isnan(got[-1])
    assert np.all(np.diff(got[:-1]) > 0)
    want = 7 / 8 * 2.0 ** oracle.mu_octaves(np.arange(1, 255))
    np.testing.assert_allclose(got[1:-1], want, rtol=1e-5)


def norm(x):
    return np.sqrt(np.sum(np.square(x, dtype=np.float64), -2))


@given(KINDS, SEEDS, st.sampled_from(MU_WIDTHS), st.floats(-8, 8))
def test_mu_error_bound(kind, seed, width, octaves):
    """Half a cell of the largest |e|, what clips the largest, and a step of the scale.

    With b the bound of a cell and c the scale that fits cells to the largest, ||c level - e|| <= b
    sqrt(32). The scale that keeps the length is off c by no more than that again, since it makes
    ||s level|| = ||e||, and its rounding adds a step of the byte.
    """
    e = groups(kind, seed, octaves)
    e[..., 0, :] += 2.0**octaves * (
        np.abs(e).max(-2) == 0
    )  # a group of zeros has a test of its own
    code, scale = mu_codes(e, width, seed)
    largest = np.abs(e).max(-2, keepdims=True)
    reach = oracle.REACH[width]
    cells = 2 ** (width - 1) if width < 4 else 2 ** (width - 1) - 1  # on either side of zero
    level = np.asarray(decode_mu(code, jnp.full_like(scale, CENTER), width))
    level = level / oracle.mu_levels(width)[-1]
    half = reach / cells / 2
    spread = reach * (1 - half / reach if width < 4 else 1)  # of the outermost level
    off = np.abs(spread * level - e / largest)
    near = np.abs(e / largest) < half  # here 2 and 3 bits choose at random
    bound = np.where(near & (width < 4), 2 * half, half + (1 - reach)) + 1e-5
    assert np.all(off <= bound)

    step = 2 ** (1 / (24 if np.all(np.abs(oracle.mu_octaves(scale)) < 3.5) else 5)) - 1
    error = norm(np.asarray(decode_mu(code, scale, width)) - e)
    assert np.all(error <= 2 * norm(bound * largest * np.ones_like(e)) + step * norm(e) * 1.01)


@pytest.mark.parametrize("width", MU_WIDTHS)
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "sparse"])
@pytest.mark.parametrize("octaves", [-9, -5, 0, 3, 9])
def test_mu_keeps_the_length(width, kind, octaves):
    """Decoded, a group is as long as it was on average over the coin, all over the byte."""
    e = groups(kind, 1)
    e *= (2.0**octaves / norm(e)).astype(np.float32)
    dither = np.full(e.shape, -0.2, np.float32)
    energies = []
    for coin in (np.arange(64) + 0.5) / 64:
        code, scale = encode_mu(e, width, dither, np.full((1, 1, GROUPS), coin, np.float32))
        energies.append(norm(decode_mu(code.astype(jnp.uint32), scale, width)) ** 2)
    np.testing.assert_allclose(np.mean(energies, 0), 4.0**octaves, rtol=0.005)


@given(KINDS, SEEDS, st.sampled_from(range(4, 9)))
def test_mu_zero_is_exact(kind, seed, width):
    e = groups(kind, seed)
    code, scale = mu_codes(e, width, seed)
    np.testing.assert_array_equal(np.asarray(decode_mu(code, scale, width))[e == 0], 0)


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("kind", ["sparse", "one"])
def test_mu_zero_on_average(kind, width):
    """Between two levels the choice is random, so that what has no gradient does not drift."""
    draws = 256  # every value that the dither takes
    e = np.repeat(groups(kind, 0), draws, -1)
    dither = np.tile((np.arange(draws, dtype=np.float32) + 0.5) / draws - np.float32(0.5), GROUPS)
    dither = np.broadcast_to(dither, e.shape)
    code, _ = encode_mu(e, width, dither, np.zeros((1, 1, e.shape[-1]), np.float32))
    level = decode_mu(code.astype(jnp.uint32), jnp.full((1, 1, e.shape[-1]), CENTER), width)
    mean = np.asarray(level).reshape(32, GROUPS, draws).mean(-1)
    assert np.all(np.abs(mean[e[0, :, ::draws] == 0]) < 1e-6)


@pytest.mark.parametrize("width", MU_WIDTHS)
def test_mu_zero_group(width):
    code, scale = mu_codes(np.zeros((1, 32, GROUPS)), width)
    assert not np.any(scale) and not np.any(decode_mu(code, scale, width))
