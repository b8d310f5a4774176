"""Chunks of tiles are read where they lie in a leaf, and written there, padding or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stquant_jax.backends import windows
from stquant_jax.storage.layout import leaf_of
from stquant_jax.storage.settings import Storage
from tests import oracle_storage

# A column of tiles in one chunk, several in one, of a length that chunks do not divide; either side
# the longer one; lanes and bands cut short; flat; tiles that only align.
SHAPES = {
    "whole columns": ((256, 384), 1),
    "transposed": ((384, 256), 1),
    "several columns": ((64, 1024), 1),
    "between": ((320, 512), 1),
    "lanes cut short": ((250, 256), 1),
    "bands cut short": ((1000, 252), 1),
    "both": ((60, 640 - 9), 1),
    "stacked": ((2, 3, 64, 250), 1),
    "flat": ((40, 4096), 1),
    "flat, cut short": ((32 * 1000,), 1),
    "aligned": ((64, 640), 8),
    "aligned, flat": ((32 * 1000,), 8),
}


def check(shape, alignment, size):
    leaf = leaf_of("leaf", shape, jnp.float32, Storage(row_alignment=alignment))
    assert windows.has_windows(leaf)
    element = oracle_storage.place(shape).element
    tiles = np.full((leaf.tiles, *element.shape[1:]), -1)
    tiles[: len(element)] = element
    x = np.arange(1.0, element.max() + 2, dtype=np.float32).reshape(shape)

    def at(tile):
        return windows.Spot.of(tile, jnp.int32(leaf.bands))

    read = jax.jit(
        lambda x, tile, n: windows.read(x, leaf, at(tile), n, lambda x: x), static_argnums=2
    )
    write = jax.jit(lambda x, tile, new: windows.write(x, leaf, at(tile), new, lambda x: x))
    got, ends = -np.ones(shape, np.float32), range(0, leaf.tiles - size + 1, size)
    chunks = [(tile, size) for tile in ends] + [(i, 1) for i in range(len(ends) * size, leaf.tiles)]
    for tile, n in chunks:
        chunk = tiles[tile : tile + n] + 1
        np.testing.assert_array_equal(read(x, tile, n), chunk)
        # What lies in padding is written nowhere.
        new = write(got, tile, np.where(chunk == 0, 7, chunk).astype(np.float32))
        written = np.isin(x, chunk[chunk > 0])
        np.testing.assert_array_equal(new, np.where(written, x, got))
        got = np.asarray(new)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize(("shape", "alignment"), SHAPES.values(), ids=SHAPES)
def test_chunks(shape, alignment, size):
    """Against the definition of tiles."""
    check(shape, alignment, size)


@settings(max_examples=8)  # each is two programs or four
@given(st.integers(32, 300), st.integers(32, 300), st.sampled_from([1, 2, 4, 6, 8]))
def test_any_shape(rows, columns, size):
    leaf = leaf_of("leaf", (rows, columns), jnp.float32, Storage(min_size=0))
    if windows.has_windows(leaf) and leaf.tiles >= size:
        check((rows, columns), 1, size)


def test_dtypes():
    """A chunk is cast to the leaf's dtype where it is written, and keeps it where it is read."""
    leaf = leaf_of("leaf", (64, 256), jnp.bfloat16, Storage())
    x, at = jnp.ones((64, 256), jnp.bfloat16), windows.Spot.of(jnp.int32(0), jnp.int32(2))
    assert windows.read(x, leaf, at, 2, lambda x: x).dtype == jnp.bfloat16
    new = windows.write(x, leaf, at, jnp.full((2, 32, 128), 1.001), lambda x: x)
    np.testing.assert_array_equal(np.asarray(new[:, :128], np.float32), np.float32(1))
    assert new.dtype == jnp.bfloat16
