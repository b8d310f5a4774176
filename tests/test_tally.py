"""Exact sums: against whole numbers of Python's, in any order, on any number of devices."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stquant_jax.precision import Sums, tally
from stquant_jax.precision.tally import Tally, add, cleared, nothing_tallied, total

TILES = (1, 70, 33, 2)  # of each leaf: less than a block, more than two, odd ends
COUNT, KINDS = sum(TILES), len(Sums._fields)
DECAYS = (np.float32(0.9), np.float32(0.999))
ODD = np.float32(
    [0, -0.0, np.nan, -np.nan, np.inf, 1e-45, 1e-38, 2.0**-80, 2.0**-81, 2.0**-57 - 2.0**-81]
    + [2.0**-65, np.nextafter(np.float32(2.0**-64), 0), 1 / 3, 1, 65535, 65536, 16777215]
    + [2.0**24, 16777218, 1e30, 3.4e38]
)
CAP = 2 ** (16 * 8)


@partial(jax.jit, static_argnames="tiles")
def added(old, values, tiles=TILES, counted=None):
    return add(old, tally.by_leaf(jnp.asarray(values), tiles), DECAYS, counted)


def of(*steps, tiles=TILES):
    """The tally of these steps, float32[statistics, tiles] each."""
    result = nothing_tallied(len(tiles))
    for values in steps:
        result = added(result, values, tiles)
    return result


def joined(*tallies):
    """Of devices that have a part each."""
    return tallies[0]._replace(digits=jnp.concatenate([x.digits for x in tallies]))


def units(x):
    """What counts of a value: a whole number of 2**-80."""
    x = float(x)
    return 0 if x != x else int(Fraction(min(x, 2.0**24)) * 2**80)


def whole(digits):
    """uint16[statistics, leaves, 8] as Python's integers."""
    weights = [2 ** (16 * k) for k in range(8)]
    return [
        [sum(w * int(d) for w, d in zip(weights, leaf, strict=True)) for leaf in kind]
        for kind in np.asarray(digits)
    ]


def by_leaf(values, tiles=TILES):
    """Sums of a step, Python's integers [statistics][leaves]."""
    ends = np.cumsum(tiles)[:-1]
    return [[sum(map(units, part)) for part in np.split(kind, ends)] for kind in values]


def nearest(integer, steps):
    return Fraction(integer, 2**80 * steps)


@st.composite
def steps(draw, count=2):
    """Values of many magnitudes, or odd ones, or both."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    odd = draw(st.sampled_from([0.0, 0.2, 1.0]))
    octaves = draw(st.sampled_from([2.0, 20.0, 60.0]))
    shape = count, KINDS, COUNT
    with np.errstate(over="ignore"):
        values = np.float32(np.exp2(octaves * random.standard_normal(shape)))
    drawn = draw(st.lists(st.floats(0, width=32), min_size=1, max_size=8))
    special = np.concatenate([ODD, np.float32(drawn)])
    return np.where(random.random(shape) < odd, random.choice(special, shape), values)


@given(steps())
def test_sums_are_those_of_whole_numbers(values):
    result = of(*values)
    want = [
        [a + b for a, b in zip(*kinds, strict=True)]
        for kinds in zip(*map(by_leaf, values), strict=True)
    ]
    assert whole(result.digits[0]) == want
    for kind, exact in zip(total(result), want, strict=True):
        for x, integer in zip(np.asarray(kind), exact, strict=True):
            mean = nearest(integer, len(values))
            assert abs(Fraction(float(x)) - mean) <= mean * Fraction(2) ** -22


@given(steps(), st.integers(0, 2**32 - 1))
def test_no_order_and_no_division_of_labour(values, seed):
    """Tiles of a leaf in another order, steps too; tiles spread over devices at random."""
    random = np.random.default_rng(seed)
    want = of(*values)
    leaves = np.split(np.arange(COUNT), np.cumsum(TILES)[:-1])
    order = np.concatenate([random.permutation(leaf) for leaf in leaves])
    shuffled = of(*values[::-1, :, order])
    np.testing.assert_array_equal(shuffled.digits, want.digits)

    device = random.integers(3, size=COUNT)
    parts = [of(*np.where(device == i, values, 0)) for i in range(3)]
    for kind, x in zip(total(joined(*parts)), total(want), strict=True):
        np.testing.assert_array_equal(kind, x)


@given(steps(count=1), st.sampled_from([1, 7, 24]))
def test_chunk_by_chunk(values, chunk):
    """A leaf's digits do not depend on how many of its tiles are added at once."""
    (values,) = values
    digits = tally.no_sums(0)[..., :1].sum(-1, dtype=jnp.uint32)
    for start in range(0, COUNT, chunk):
        digits = tally.joined(digits, values[:, start : start + chunk])
    want = tally.by_leaf(jnp.asarray(values), (COUNT,))[..., 0]
    np.testing.assert_array_equal(digits, want)


def test_leaves_of_which_a_device_has_nothing():
    """Two devices with other numbers of tiles: of one leaf the first one has none."""
    random = np.random.default_rng(0)
    values = np.float32(np.exp2(9 * random.standard_normal((KINDS, 40))))
    want = of(values, tiles=(5, 35))
    first, second = (
        of(values[:, 5:15], tiles=(0, 10)),
        of(np.delete(values, np.s_[5:15], axis=1), tiles=(5, 25)),
    )
    for x, y in zip(total(joined(first, second)), total(want), strict=True):
        np.testing.assert_array_equal(x, y)


def test_devices_meet_in_the_total():
    """Over an axis of a mesh as over the leading axis of digits."""
    random = np.random.default_rng(0)
    parts = [of(np.float32(random.random((KINDS, COUNT)))) for _ in range(4)]
    want = total(joined(*parts))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    met = jax.vmap(lambda part: total(part, ("data",)), axis_name="data")(stacked)
    for x, y in zip(met, want, strict=True):
        np.testing.assert_array_equal(x, np.broadcast_to(y, (4, len(TILES))))


def test_each_leaf_is_counted_once():
    """What a replica has too is not added."""
    values = np.ones((KINDS, COUNT), np.float32)
    counted = jnp.array([True, False, True, False])
    result = total(added(nothing_tallied(len(TILES)), values, counted=counted))
    np.testing.assert_array_equal(result.energy, np.where(counted, TILES, 0))


@pytest.mark.parametrize("addends", [5, 2**16 - 1])
def test_many_tiles(addends, monkeypatch):
    """More than can be added up between two carries, all of their digits as large as can be."""
    monkeypatch.setattr(tally, "_ADDENDS", addends)
    tiles = (3, 2 * addends + 7, 0, addends, 1)
    values = np.full((KINDS, sum(tiles)), 2.0**24 - 1, np.float32)
    values[1] = 2.0**-80 * (2.0**24 - 1)
    values[2] = np.nextafter(np.float32(2.0**-40), 0)
    result = add(nothing_tallied(len(tiles)), tally.by_leaf(values, tiles), DECAYS)
    one = [units(kind[0]) for kind in values]
    assert whole(result.digits[0]) == [[x * n for n in tiles] for x in one]


def test_the_highest_digit_stops():
    """A sum beyond 2**48 neither wraps nor tells how it was divided."""
    full = nothing_tallied(1)
    nearly = jnp.full_like(full.digits, 0xFFFF).at[..., -1].set(0xFFFE)
    values = np.full((KINDS, 3), 2.0**24, np.float32)
    old = full._replace(digits=nearly)
    want = int(whole(nearly[0])[0][0])
    for _ in range(2**10):
        old, want = added(old, values, (3,)), want + 3 * 2**104
        here = whole(old.digits[0])[0][0]
        assert here % (CAP >> 16) == want % (CAP >> 16)
        assert here >> 112 == min(want >> 112, 0xFFFF)
    halves = joined(full._replace(digits=nearly), full._replace(digits=nearly))
    one = full._replace(digits=nearly.at[..., 0].set(0xFFFE).at[..., -1].set(0xFFFF))
    for x, y in zip(total(halves), total(one), strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.all(np.isfinite(x)) and np.all(x <= 2.0**48)


def test_a_mean_over_steps():
    values = np.ones((KINDS, COUNT), np.float32)
    result = of(values, 2 * values, 6 * values)
    assert int(result.steps) == 3 and result.decays.tolist() == [*DECAYS]
    np.testing.assert_array_equal(total(result).nu, 3 * np.array(TILES))
    empty = cleared(result)
    assert int(empty.steps) == 0 and not empty.digits.any()
    assert isinstance(empty, Tally) and empty.decays.tolist() == [*DECAYS]
    assert not np.any(np.stack(total(empty)))
