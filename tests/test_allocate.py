"""Allocation against brute force: the exact optimum where it promises one, and always a plan that
fits; the order in which a budget is filled before anything is measured.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stquant_jax.precision import Slots
from stquant_jax.precision.allocate import allocate
from stquant_jax.precision.capacity import _hull, fill, refit
from stquant_jax.precision.slots import MU_WIDTHS, NU_WIDTHS
from stquant_jax.precision.statistics import MU_ERROR, NU_NOISE, NU_SPREAD

WIDEST = 8


# One program for each tuple of tiles: rows are traced.
@partial(jax.jit, static_argnums=1)
def _allocate(cost, tiles, rows):
    return allocate(cost, np.array(tiles), rows)


def allocated(cost, tiles, rows):
    widths = _allocate(jnp.asarray(cost, jnp.float32), tuple(map(int, tiles)), rows)
    return np.asarray(widths)


def total(cost, widths):
    return np.take_along_axis(np.asarray(cost), np.asarray(widths)[:, None], axis=1).sum()


def best(cost, tiles, rows):
    """The least total cost of all that fits, by dynamic programming over rows: exact."""
    least = np.zeros(rows + 1)  # at most so many rows
    for slot, size in zip(np.asarray(cost, np.float64), tiles, strict=True):
        options = np.full((len(slot), rows + 1), np.inf)
        for width in np.flatnonzero(np.isfinite(slot)):
            if width * size <= rows:
                options[width, width * size :] = slot[width] + least[: rows + 1 - width * size]
        least = options.min(axis=0)
    return least[rows]


def brute_force(cost, tiles, rows):
    """The same by trying everything, of few slots."""
    plans = itertools.product(*(np.flatnonzero(np.isfinite(slot)) for slot in cost))
    return min(total(cost, w) for w in map(np.array, plans) if np.sum(w * tiles) <= rows)


def costs(random, slots, kind):
    """float32[slots, 9]: errors by width, as steep as training's or any other."""
    if kind == "convex":  # falling steps, in whole numbers: sums are exact, ties are ties
        steps = -np.sort(-random.integers(0, 50, (slots, WIDEST)), axis=1)
        cost = np.concatenate([np.cumsum(steps[:, ::-1], 1)[:, ::-1], np.zeros((slots, 1))], 1)
    elif kind == "error":  # of the rate of a quantizer, over twelve orders of magnitude
        cost = 10 ** random.uniform(-6, 6, (slots, 1)) * 4.0 ** -np.arange(WIDEST + 1)
    else:
        cost = random.integers(0, 1000, (slots, WIDEST + 1))
    return cost.astype(np.float32)


def masked(random, cost):
    """Some widths are not allowed; at least one of each slot is."""
    closed = random.random(cost.shape) < 0.4
    closed[np.arange(len(cost)), random.integers(WIDEST + 1, size=len(cost))] = False
    return np.where(closed, np.inf, cost)


def floor(cost, tiles):
    return int(np.sum(np.argmax(np.isfinite(cost), axis=1) * tiles))


SEEDS = st.integers(0, 2**32 - 1)


def test_the_oracles_agree():
    random = np.random.default_rng(0)
    for kind in ("convex", "error", "any"):
        cost = masked(random, costs(random, 4, kind))
        tiles = random.integers(1, 9, 4)
        low = floor(cost, tiles)
        for rows in random.integers(low, low + 60, 5):
            assert np.isclose(best(cost, tiles, rows), brute_force(cost, tiles, rows))


@settings(max_examples=300)
@given(SEEDS, st.sampled_from([1, 2, 6]), st.sampled_from(["convex", "error"]), st.floats(0, 1))
def test_convex_and_allocate(seed, slots, kind, part):
    """Slots of one size with convex costs: the optimum, ties included."""
    cost = costs(np.random.default_rng(seed), slots, kind)
    tiles = np.full(slots, 3)
    rows = int(part * WIDEST * tiles.sum())
    widths = allocated(cost, tiles, rows)
    assert np.sum(widths * tiles) <= rows
    np.testing.assert_allclose(total(cost, widths), best(cost, tiles, rows), rtol=1e-5)


TILES = [(1, 1, 1, 1, 1), (5, 1, 3, 2, 8), (100, 7, 1, 30, 2), (4,)]


@settings(max_examples=300)
@given(
    SEEDS,
    st.sampled_from(TILES),
    st.sampled_from(["convex", "error", "any"]),
    st.booleans(),
    st.floats(0, 1),
)
def test_any_instance(seed, tiles, kind, mask, part):
    """It fits and is on widths that are allowed. Its cost is above the optimum by less than one
    step of one slot: the gap of the Lagrangian bound."""
    random = np.random.default_rng(seed)
    cost = costs(random, len(tiles), kind)
    cost = masked(random, cost) if mask else cost
    low = floor(cost, tiles)
    rows = low + int(part * (WIDEST * sum(tiles) - low))
    widths = allocated(cost, tiles, rows)
    assert np.sum(widths * tiles) <= rows
    here = total(cost, widths)
    assert np.isfinite(here)
    optimum = best(cost, tiles, rows)
    finite = np.where(np.isfinite(cost), cost, -np.inf)
    step = np.max(finite.max(1) - np.where(np.isfinite(cost), cost, np.inf).min(1))
    assert optimum - 1e-4 * abs(optimum) <= here <= optimum * (1 + 1e-4) + step
    # What is left over is of no use to any slot.
    free = rows - np.sum(widths * tiles)
    for slot, size in enumerate(tiles):
        wider = np.arange(WIDEST + 1) - widths[slot]
        fits = (wider > 0) & (wider * size <= free)
        assert not np.any(cost[slot, fits] < cost[slot, widths[slot]])


@settings(max_examples=200)
@given(SEEDS, st.sampled_from(TILES), st.sampled_from(["error", "any"]), st.floats(0, 1))
def test_optimal_for_the_rows_of_a_price(seed, tiles, kind, part):
    """At a capacity that some price uses up, the optimum, convex or not (Everett, 1963)."""
    random = np.random.default_rng(seed)
    cost = masked(random, costs(random, len(tiles), kind))
    price = np.exp(random.uniform(-10, 10)) * np.max(cost[np.isfinite(cost)])
    chosen = np.argmin(cost + price * np.arange(WIDEST + 1) * np.array(tiles)[:, None], axis=1)
    rows = int(np.sum(chosen * tiles))
    widths = allocated(cost, tiles, rows)
    np.testing.assert_allclose(total(cost, widths), best(cost, tiles, rows), rtol=1e-4)


def test_one_slot():
    cost = costs(np.random.default_rng(0), 1, "error")
    for rows in range(0, 33):
        assert allocated(cost, (4,), rows) == [min(rows // 4, WIDEST)]


def test_ties():
    """All alike: nothing is left over that one more step could use."""
    cost = np.tile(2.0 ** -np.arange(WIDEST + 1), (6, 1))
    for rows in range(0, 48):
        assert np.sum(allocated(cost, (1,) * 6, rows)) == rows


def test_degenerate_costs():
    """Nothing to gain, nothing to measure, or one slot that is all that counts."""
    nothing = np.zeros((3, WIDEST + 1))
    assert np.sum(allocated(nothing, (2, 3, 4), 20) * [2, 3, 4]) <= 20
    single = np.full((3, WIDEST + 1), np.inf)
    single[range(3), (2, 0, 5)] = 1.0
    np.testing.assert_array_equal(allocated(single, (2, 3, 4), 24), [2, 0, 5])
    ratio = np.stack([np.geomspace(1, 1e-4, 9), np.geomspace(1e-12, 1e-16, 9)])
    np.testing.assert_array_equal(allocated(ratio, (1, 1), 10), [8, 2])
    np.testing.assert_array_equal(allocated(1e-20 * ratio, (1, 1), 10), [8, 2])
    np.testing.assert_array_equal(allocated(1e20 * ratio, (1, 1), 10), [8, 2])


def test_traced_under_jit_once():
    """Costs are data: another instance of the same sizes compiles nothing."""
    run = jax.jit(partial(allocate, tiles=np.array([3, 1]), rows=20))
    for seed in range(3):
        run(jnp.asarray(costs(np.random.default_rng(seed), 2, "error")))
    assert run._cache_size() == 1


# --- without measurements ---


def slots_of(random, leaves=6, pins=()):
    tiles = np.repeat(random.integers(1, 200, leaves), 2)
    return Slots(tiles, tuple(f"leaf{i // 2}" for i in range(2 * leaves)), pins)


def assert_valid(slots, rows, widths):
    assert np.sum(slots.tiles * widths) <= rows
    assert np.all(slots.allowed[np.arange(len(widths)), widths])


PINS = [(), (("leaf1$", (5, 4)),), (("leaf0$", (8, 0)), ("leaf3$", (2, 8)))]


@given(SEEDS, st.sampled_from(PINS), st.floats(0, 1))
def test_fill(seed, pins, part):
    """Fits, and what is left over widens no slot all the way."""
    slots = slots_of(np.random.default_rng(seed), pins=pins)
    low, high = (int(np.sum(slots.tiles * w)) for w in (slots.narrowest, slots.widest))
    rows = low + int(part * (high - low))
    widths = fill(slots, rows)
    assert_valid(slots, rows, widths)
    free = rows - np.sum(slots.tiles * widths)
    assert np.all(free < 8 * slots.tiles[widths < slots.widest])
    np.testing.assert_array_equal(fill(slots, low), slots.narrowest)
    np.testing.assert_array_equal(fill(slots, high), slots.widest)


@given(st.integers(1, 50), st.integers(1, 8))
def test_fill_is_monotone_in_rows(size, leaves):
    """Of slots of one size, more rows leave less error, as steps are ranked: by the convex hull."""
    nu_error = 1 / (1 / np.array(NU_NOISE) + 1 / NU_SPREAD)
    hull = _hull({width: nu_error[width] for width in NU_WIDTHS})
    nu_error = np.interp(np.arange(9), hull, nu_error[hull])
    slots = Slots(np.full(2 * leaves, size), tuple("a" * 2 * leaves))
    low, high = (int(np.sum(slots.tiles * w)) for w in (slots.narrowest, slots.widest))
    before = np.inf
    for rows in range(low, high + 1, size):
        widths = fill(slots, rows)
        error = np.sum(np.array(MU_ERROR)[widths[::2]]) + np.sum(nu_error[widths[1::2]])
        assert error <= before + 1e-12
        before = error


@given(SEEDS, st.sampled_from(PINS), st.floats(0, 1), st.floats(0, 1))
def test_refit(seed, pins, part, other):
    """From any widths to any number of rows: it fits, and more rows make no slot narrower."""
    random = np.random.default_rng(seed)
    slots = slots_of(random, pins=pins)
    drawn = np.array([random.choice((MU_WIDTHS, NU_WIDTHS)[slot % 2]) for slot in range(12)])
    widths = slots.pinned(drawn)
    used = int(np.sum(slots.tiles * widths))
    low, high = (int(np.sum(slots.tiles * w)) for w in (slots.narrowest, slots.widest))
    more, less = used + int(part * (high - used)), low + int(other * (used - low))
    wider, narrower = refit(slots, more, widths), refit(slots, less, widths)
    assert_valid(slots, more, wider)
    assert_valid(slots, less, narrower)
    assert np.all(wider >= widths)
    np.testing.assert_array_equal(refit(slots, low, widths), slots.narrowest)
    np.testing.assert_array_equal(refit(slots, high, widths), slots.widest)


@pytest.mark.parametrize("rows", [24, 40, 64])
def test_refit_of_a_fill(rows):
    """Back at the same number of rows, the same widths."""
    slots = Slots(np.full(8, 1), tuple("aabbccdd"))
    widths = fill(slots, rows)
    np.testing.assert_array_equal(refit(slots, rows, widths), widths)
