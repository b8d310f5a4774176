"""Parts of leaves: their tiles are those of the leaf, by the definitions in `oracle_storage`."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stquant_jax.sharding.shards import part_of, tile_order
from stquant_jax.storage.layout import layout_of
from stquant_jax.storage.places import Place
from stquant_jax.storage.settings import Storage
from stquant_jax.storage.tiling import to_tiles
from tests import oracle_storage

STORAGE = Storage(min_size=0, backend="xla", row_alignment=1)
NAMES = "abcd"


def part(shape, parts):
    leaf = layout_of(jnp.zeros(shape), STORAGE).leaves[0]
    axes = tuple((name,) if n > 1 else () for name, n in zip(NAMES, parts, strict=False))
    return part_of(leaf, axes, dict(zip(NAMES, parts, strict=False)), STORAGE)


def pieces(x, parts):
    """The parts of an array, in order."""
    sizes = [size // n for size, n in zip(x.shape, parts, strict=True)]
    for index in itertools.product(*map(range, parts)):
        yield index, x[tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, sizes, strict=True))]


def check(shape, parts):
    """Whole tiles: each part's are the leaf's, and so are the numbers of their groups."""
    here, where = part(shape, parts), oracle_storage.place(shape)
    assert here.whole.shape == shape and here.tiles * math.prod(parts) == here.cut.tiles
    elements = jnp.arange(math.prod(shape)).reshape(shape) + 1  # 0 is padding
    order = tile_order(here).reshape(math.prod(parts), -1)
    assert sorted(order.reshape(-1)) == list(range(here.cut.tiles))
    for (index, x), tiles in zip(pieces(elements, parts), order, strict=True):
        got = np.asarray(to_tiles(x, here))
        np.testing.assert_array_equal(got, where.element[tiles] + 1)
        place = Place.of(here, int(np.dot(index, here.cut.steps)))
        group, valid = place.of_tiles(jnp.int32(0), here.tiles, here.ragged)
        inside = got[:, :1] > 0  # groups of padding alone have any number
        want = where.group[tiles]
        np.testing.assert_array_equal(np.where(inside, group, 0), np.where(inside, want, 0))
        if here.ragged:
            np.testing.assert_array_equal(np.asarray(valid) == 1, got > 0)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((256, 1024), (2, 4)),
        ((1024, 128), (4, 2)),
        ((256, 340), (4, 1)),  # the lanes end in padding
        ((60, 640), (1, 5)),  # the last band is cut short
        ((2, 128, 512), (1, 2, 2)),  # bands in runs
        ((4, 256, 64), (2, 2, 2)),  # lanes in runs, of two axes divided
        ((128, 8, 64), (2, 4, 1)),  # heads
        ((128, 192), (2, 1)),  # folded
        ((16, 2048), (4, 1)),  # flat
        ((1, 8, 4096), (1, 2, 1)),
        ((300, 70), (1, 1)),
    ],
)
def test_whole_tiles(shape, parts):
    assert part(shape, parts).cut.whole
    check(shape, parts)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((256, 1024), (16, 1)),  # half a band
        ((256, 1024), (1, 16)),  # half a tile of lanes
        ((128, 192), (4, 1)),  # folded: a band is a tile and a half
        ((16, 2048), (1, 2)),  # flat: rows are cut
        ((2, 2, 64, 512), (1, 2, 2, 1)),  # runs at unequal distances
    ],
)
def test_torn(shape, parts):
    here = part(shape, parts)
    assert not here.cut.whole and "no whole tiles" in here.reason
    assert here.shape == tuple(size // n for size, n in zip(shape, parts, strict=True))
    assert here.cut.tiles == math.prod(parts) * here.tiles
    # No two groups of any parts have one number.
    groups = set()
    for index in itertools.product(*map(range, parts)):
        place = Place.of(here, int(np.dot(index, here.cut.steps)))
        group, _ = place.of_tiles(jnp.int32(0), here.tiles, here.ragged)
        real = np.asarray(to_tiles(jnp.ones(here.shape), here))[:, :1] > 0
        mine = set(np.asarray(group)[real].tolist())
        assert len(mine) == real.sum() and not mine & groups
        groups |= mine


@given(
    st.lists(st.sampled_from([1, 2, 3, 8, 32, 64, 96, 128, 256]), min_size=1, max_size=4),
    st.lists(st.sampled_from([1, 1, 2, 4]), min_size=4, max_size=4),
)
def test_any(shape, parts):
    """Either whole tiles, which are right, or torn and so named."""
    shape, parts = tuple(shape), tuple(parts[: len(shape)])
    if math.prod(shape) > 2**18 or any(size % n for size, n in zip(shape, parts, strict=True)):
        return
    here = part(shape, parts)
    if here.cut.whole:
        check(shape, parts)
    else:
        assert "no whole tiles" in here.reason


def test_uneven():
    with pytest.raises(ValueError, match=r"axis 1 .*shape \(64, 100\).*divisor of 100"):
        part((64, 100), (1, 8))
