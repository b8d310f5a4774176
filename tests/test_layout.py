"""Leaves of every shape go to tiles and back; groups lie where the definition puts them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stquant_jax.storage import arena
from stquant_jax.storage.layout import MAX_WASTE, layout_of
from stquant_jax.storage.places import Place
from stquant_jax.storage.planes import TILE
from stquant_jax.storage.settings import Storage
from stquant_jax.storage.tiling import from_tiles, to_tiles
from tests import oracle_storage

# Shape and format; groups run along the shorter axis.
KINDS = {
    (32, 128): "tiled",
    (128, 32): "tiled",
    (4, 32, 128): "tiled",
    (60, 256): "tiled",  # a ragged band within 1/8
    (256, 250): "tiled",
    (2, 2, 64, 250): "tiled",
    (64, 160): "folded",
    (160, 64): "folded",
    (3, 3, 32, 32): "folded",
    (4096,): "flat",
    (5000,): "flat",
    (16, 4096): "flat",  # half a group
    (3, 3, 40, 36): "flat",
    (4, 33, 130): "flat",
}


def leaf_of(shape, dtype=jnp.float32, **storage):
    return layout_of(jax.ShapeDtypeStruct(shape, dtype), Storage(**storage)).leaves[0]


def tiles_of(x, leaf):
    """Compiled as one: a shape's single operations would each be compiled alone."""
    return np.asarray(jax.jit(lambda x: to_tiles(x, leaf))(x))


def back(tiles, leaf):
    return np.asarray(jax.jit(lambda tiles: from_tiles(tiles, leaf))(tiles))


def index(shape):
    """1, 2, 3, ... so that padding, which is 0, is told apart."""
    return np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(("shape", "kind"), KINDS.items(), ids=str)
def test_kinds(shape, kind):
    leaf = leaf_of(shape)
    assert leaf.kind == kind
    assert leaf.tiles and leaf.reason
    want = oracle_storage.place(shape)
    assert want.kind == kind
    np.testing.assert_array_equal(tiles_of(index(shape), leaf), want.element + 1)


@settings(max_examples=12)  # each is a program
@given(st.lists(st.integers(1, 70), min_size=0, max_size=4).map(tuple))
def test_round_trip(shape):
    """Any shape, scalars too, and what is padding: against the definition."""
    leaf, x = leaf_of(shape, min_size=0), index(shape)
    tiles = tiles_of(x, leaf)
    assert tiles.shape == (leaf.tiles, 32, 128)
    np.testing.assert_array_equal(back(tiles, leaf), x)
    if shape:
        np.testing.assert_array_equal(tiles, oracle_storage.place(shape).element + 1)


@settings(max_examples=12)  # each is a program
@given(st.lists(st.integers(1, 70), min_size=1, max_size=4).map(tuple))
def test_places(shape):
    """Groups are numbered as defined. Padding has no weight, or lies in a group with no element."""
    leaf, want = leaf_of(shape, min_size=0), oracle_storage.place(shape)
    locate = jax.jit(lambda tile: Place.of(leaf).of_tiles(tile, leaf.tiles, leaf.ragged))
    group, valid = map(np.asarray, locate(jnp.int32(0)))
    inside = want.element >= 0
    occupied = inside.any(-2, keepdims=True)
    np.testing.assert_array_equal(group[occupied], want.group[occupied])
    np.testing.assert_array_equal(valid * occupied, inside)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple))
def test_waste(shape):
    """Tiles waste 1/8 at most; what is folded or flat is padded at its end alone."""
    leaf = leaf_of(shape, min_size=0)
    wasted = leaf.tiles * TILE - leaf.size
    assert wasted >= 0
    if leaf.kind == "tiled":
        assert wasted <= MAX_WASTE * leaf.tiles * TILE
    else:
        assert wasted < TILE


def test_ties_go_along_the_rows():
    x = index((64, 128 * 2))
    np.testing.assert_array_equal(tiles_of(x, leaf_of(x.shape))[0, :, 0], x[:32, 0])
    x = index((256, 256))
    np.testing.assert_array_equal(tiles_of(x, leaf_of(x.shape))[0, :, 0], x[:32, 0])
    x = index((256, 64))
    np.testing.assert_array_equal(tiles_of(x, leaf_of(x.shape))[0, :, 0], x[0, :32])


@pytest.mark.parametrize(("shape", "axis"), [((64, 512), 1), ((512, 64), 0), ((64, 512), 0)])
def test_shards_keep_groups_whole(shape, axis):
    """Cut in multiples of a tile, the parts have the groups that the whole has."""
    x = index(shape)
    whole = np.asarray(tiles_of(x, leaf_of(shape))).swapaxes(1, 2).reshape(-1, 32)
    parts = np.split(x, 2, axis)
    parts = [np.asarray(tiles_of(part, leaf_of(part.shape, min_size=0))) for part in parts]
    groups = np.concatenate([part.swapaxes(1, 2).reshape(-1, 32) for part in parts])
    assert set(map(tuple, groups)) == set(map(tuple, whole))


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((), "exact"),
        ((0,), "exact"),
        ((3, 0, 5), "exact"),
        ((4095,), "exact"),
        ((64, 64), "folded"),
    ],
)
def test_min_size(shape, kind):
    leaf = leaf_of(shape)
    assert leaf.kind == kind and bool(leaf.tiles) == (kind != "exact")
    assert leaf_of(shape, min_size=10**6).kind == "exact"
    if leaf.size:
        assert leaf_of(shape, min_size=leaf.size).tiles
        assert not leaf_of(shape, min_size=leaf.size + 1).tiles


@pytest.mark.parametrize("shape", [(32, 128), (60, 256), (5000,), (64, 160)])
def test_row_alignment(shape):
    """Tiles come in eights, the added ones empty."""
    plain, aligned = leaf_of(shape), leaf_of(shape, row_alignment=8)
    assert aligned.tiles % 8 == 0 and 0 <= aligned.tiles - plain.tiles < 8
    tiles = tiles_of(index(shape), aligned)
    np.testing.assert_array_equal(tiles[: plain.tiles], tiles_of(index(shape), plain))
    np.testing.assert_array_equal(back(tiles, aligned), index(shape))
    assert not tiles[plain.tiles :].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((60, 256)), dtype)
    tiles = tiles_of(x, leaf_of(x.shape, dtype))
    assert tiles.dtype == dtype
    np.testing.assert_array_equal(back(tiles, leaf_of(x.shape, dtype)), x)


def test_tree():
    """Leaves in tree order, their paths, and where their tiles and slots begin."""
    tree = {"b": {"w": jnp.zeros((64, 256)), "b": jnp.zeros(7)}, "a": [jnp.zeros((128, 32))]}
    layout = layout_of(tree, Storage())
    assert [leaf.path for leaf in layout.leaves] == ["a.0", "b.b", "b.w"]
    assert [leaf.path for leaf in layout.quantized] == ["a.0", "b.w"]
    assert layout.first_tile == (0, 1) and layout.tiles == 5
    assert layout.exact_size == 7 and layout.size == 7 + 4096 + 4 * 4096
    widths = jnp.asarray([5, 0, 3, 8])
    assert arena.offsets(widths, layout).tolist() == [0, 5, 5, 5 + 3 * 4]
    leaves = jax.tree.leaves(tree)
    merged = layout.merge(*layout.split(leaves))
    assert all(x is y for x, y in zip(merged, leaves, strict=True))


def test_empty_tree():
    layout = layout_of({}, Storage())
    assert layout.leaves == () and layout.tiles == 0 and layout.first_tile == ()


@pytest.mark.parametrize("widths", [(2, 0), (5, 4), (8, 8)])
def test_offsets_are_disjoint(widths):
    """The slots fill the arena of their widths to the row."""
    layout = layout_of({str(shape): jnp.zeros(shape) for shape in KINDS}, Storage())
    slots = arena.slot_tiles(layout)
    widths = np.tile(widths, len(KINDS))
    first = np.asarray(arena.offsets(jnp.asarray(widths), layout))
    np.testing.assert_array_equal(first[1:], (first + widths * slots)[:-1])
    assert first[0] == 0
