"""Bit-planes are exact at every width, for random and adversarial codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stquant_jax.storage import arena, planes
from tests import oracle_storage

PACK, UNPACK = jax.jit(planes.pack), jax.jit(planes.unpack)
READ = jax.jit(arena.read_planes, static_argnums=2)
WRITE = jax.jit(arena.write_planes)
TILES = 3


def one_bit(shape, top, random):
    """A single bit of a single code."""
    codes = np.zeros(shape, np.uint32)
    codes.flat[random.integers(codes.size)] = 1 << random.integers(top.bit_length())
    return codes


PATTERNS = {
    "random": lambda shape, top, random: random.integers(0, top + 1, shape, np.uint32),
    "zero": lambda shape, top, random: np.zeros(shape, np.uint32),
    "top": lambda shape, top, random: np.full(shape, top, np.uint32),
    "one bit": one_bit,
    "stripes": lambda shape, top, random: (np.indices(shape).sum(0) % 2 * top).astype(np.uint32),
    "counter": lambda shape, top, random: (
        np.arange(np.prod(shape), dtype=np.uint32).reshape(shape) & np.uint32(top)
    ),
}


@st.composite
def codes(draw):
    """(width, codes of that width)"""
    width = draw(st.integers(1, 8))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pattern = PATTERNS[draw(st.sampled_from(list(PATTERNS)))]
    return width, pattern((TILES, 32, 128), 2**width - 1, random)


@given(codes())
def test_round_trip(example):
    width, x = example
    packed = PACK(x)
    assert packed.shape == (8, TILES, 128) and packed.dtype == jnp.uint32
    np.testing.assert_array_equal(packed, oracle_storage.to_planes(x))
    assert not packed[width:].any()
    np.testing.assert_array_equal(UNPACK(packed), x)


@given(st.integers(0, 2**32 - 1))
def test_any_planes(seed):
    """Every pattern of bits is the planes of some codes: none is lost, none is spare."""
    bits = np.random.default_rng(seed).integers(0, 2**32, (8, TILES, 128), np.uint32)
    np.testing.assert_array_equal(PACK(UNPACK(bits)), bits)


@pytest.mark.parametrize("shape", [(32, 128), (1, 32, 128), (2, 3, 32, 128)])
def test_leading_axes(shape):
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint32)
    packed = planes.pack(jnp.asarray(x))
    assert packed.shape == (8, *shape[:-2], 128)
    np.testing.assert_array_equal(packed, oracle_storage.to_planes(x))
    np.testing.assert_array_equal(planes.unpack(packed), x)


def span(first, width, stride):
    return arena.Span(*map(jnp.int32, (first, width, stride)))


@given(codes(), st.integers(0, 8), st.integers(0, 5), st.integers(0, 4))
def test_slots_in_arena(example, width, offset, tile):
    """Chunks of two slots lie where the oracle looks for them; all around them stays.

    Widths are traced. The second may be 0, where nothing is read or written.
    """
    first_width, x = example
    y = np.asarray(x)[::-1] & np.uint32(2**width - 1)
    tiles = TILES + 4  # of a slot; the chunk begins at `tile` of them
    second = offset + first_width * tiles
    before = np.random.default_rng(1).integers(0, 2**32, (offset + 16 * tiles + 3, 128), np.uint32)
    spans = [span(offset + tile, first_width, tiles), span(second + tile, width, tiles)]
    after = np.asarray(WRITE(before, spans, [PACK(x), PACK(y)]))

    kept = np.ones(len(before), bool)
    for start, slot_width, codes_, place in zip(
        (offset, second), (first_width, width), (x, y), spans, strict=True
    ):
        read = oracle_storage.read_slot(after, start, slot_width, tiles)
        np.testing.assert_array_equal(read[tile : tile + TILES], codes_)
        np.testing.assert_array_equal(UNPACK(READ(after, place, TILES)), codes_)
        for p in range(slot_width):
            kept[start + p * tiles + tile :][:TILES] = False
    np.testing.assert_array_equal(after[kept], before[kept])
