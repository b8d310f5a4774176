"""The state after N steps against the oracle, which starts each step from the library's own codes.

In float32 a value that lies within rounding of the border between two codes may fall on the other
side. So nearly all codes must be equal, and none more than one apart.
"""

import numpy as np
import pytest

from tests import common, oracle
from tests import oracle_storage as storage

WIDTHS = [(2, 0), (3, 1), (4, 2), (5, 3), (5, 4), (6, 5), (7, 6), (8, 7), (8, 8)]
QUANTIZED = {name: shape for name, shape in sorted(common.SHAPES.items()) if name != "bias"}
PLACES = {name: storage.place(shape) for name, shape in QUANTIZED.items()}
CHECKED = (1, 2, 3, 31, 32, 40)  # the round-robin row is the count modulo 32


def gradients(step):
    """Gaussian, with columns of zeros, rows that wake at step 3, two bad elements at step 32."""
    g = common.gaussian(seed=step)
    for x in g.values():
        x[..., 5] = 0
        if step < 3:
            x[: len(x) // 4] = 0
    if step == 32:
        g["ragged"][11, 200] = np.inf
        g["tile"][100, 3] = np.nan
    return g


def slots(state, places=PLACES):
    """First row, width and tiles of every slot: leaf by leaf, mu before nu, one after the other."""
    tiles = np.repeat([len(place.element) for place in places.values()], 2)
    widths = np.asarray(state.precision.plan.widths)
    return list(zip(np.cumsum(widths * tiles) - widths * tiles, widths, tiles, strict=True))


def read(state, places=PLACES):
    """The codes of every quantized leaf, as the oracle reads the arena."""
    arena, table, tile = np.asarray(state.arena), iter(slots(state, places)), 0
    leaves = {}
    for name, place in places.items():
        part = slice(tile, tile := tile + len(place.element))
        leaves[name] = oracle.Codes(
            *(storage.read_slot(arena, *next(table)) for _ in range(2)),
            *(np.asarray(s)[part, None].astype(int) for s in (state.mu_scale, state.nu_scale)),
            np.asarray(state.nu_row).reshape(-1, 32, 1)[part].astype(int),
        )
    return leaves


def assert_close(got, want, where, share=0.999, few=2):
    """Codes are equal but for a few that are one apart."""
    got, want = (np.broadcast_to(x, where.shape)[where] for x in (got, want))
    assert np.sum(got != want) <= few + (1 - share) * got.size
    assert np.max(np.abs(got - want), initial=0) <= 1


def assert_leaf(update, got, want_update, want, place):
    inside = place.element >= 0
    rows, groups = inside.any(-1, keepdims=True), inside.any(-2, keepdims=True)
    living = inside & (want.nu_scale > 0) & (want.nu_scale < oracle.BASE_NOT_FINITE)
    assert_close(got.nu_row, want.nu_row, rows)
    # A group's codes count from its largest element: where that one's is another, all are.
    assert_close(got.nu, want.nu, living, few=2 * storage.GROUP)
    # The update shrinks toward its row, the scale makes up for the codes, and mu is coded relative
    # to nu as stored: they are compared where nu fell alike. One ulp of a base of 50 octaves is
    # 1/500 of the scale's step.
    alike = ((got.nu_row == want.nu_row) | ~rows).all(-2, keepdims=True) & groups
    update, want_update = (x[inside & alike] for x in (update, want_update))
    np.testing.assert_allclose(update, want_update, rtol=1e-4, atol=1e-6)
    alike &= ((got.nu == want.nu) | ~living).all(-2, keepdims=True)
    assert_close(got.nu_scale, want.nu_scale, alike, 0.99)
    alike &= got.nu_scale == want.nu_scale
    assert_close(got.mu, want.mu, living & alike)
    assert_close(got.mu_scale, want.mu_scale, alike, 0.99)


def assert_step(before, g, updates, state, adam, count, places=PLACES, skip=()):
    """One step of any backend, all leaves, is what the definitions make of the state before."""
    old, new = read(before, places), read(state, places)
    plan = before.precision.plan
    for i, (name, place) in enumerate(places.items()):
        if name in skip:
            continue
        x, update = (storage.to_tiles(np.asarray(y[name], float), place) for y in (g, updates))
        (mu, nu), nu_slot = map(int, plan.widths[2 * i : 2 * i + 2]), 2 * i + 1
        window, shrinkage = (float(y[nu_slot]) for y in (plan.windows, plan.shrinkage))
        slot = oracle.Slot(mu, nu, window, shrinkage, seed=0, leaf=i)
        want = oracle.step(x, old[name], place, adam, slot, count)
        assert_leaf(update, new[name], *want, place)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("mu", "nu"), WIDTHS)
def test_steps(mu, nu, nesterov):
    window = {0: 2, 1: 1, 2: 4, 5: 6, 8: 8}.get(nu, 3)
    adam = oracle.Adam(b1=0.8 if mu == 4 else 0.9, b2=0.99 if nu == 3 else 0.999, nesterov=nesterov)
    state = common.init(common.zeros(), mu, nu, window)
    for count in range(1, max(CHECKED) + 1):
        g, before = gradients(count), state
        updates, state = common.update(g, state, adam.b1, adam.b2, nesterov=nesterov)
        if count not in CHECKED:
            continue
        assert_step(before, g, updates, state, adam, count)


def test_arena_bits():
    """The oracle packs the same codes to the same bits, and leaves the rest of the arena alone."""
    state = common.init(common.zeros(), 5, 3)
    for count in range(1, 4):
        _, state = common.update(gradients(count), state)
    arena, table = np.zeros(state.arena.shape, np.uint32), iter(slots(state))
    for codes in read(state).values():
        for x in (codes.mu, codes.nu):
            first, width, _ = next(table)
            storage.write_slot(arena, first, width, x)
    assert arena.any()
    np.testing.assert_array_equal(state.arena, arena)


@pytest.mark.parametrize(("mu", "nu"), WIDTHS)
def test_moments(mu, nu):
    """`to_optax` decodes what the definitions say."""
    state = common.init(common.zeros(), mu, nu, 3)
    for count in (2, 3, 32):
        _, state = common.update(gradients(count), state)
    moments = common.decode(state, common.zeros())
    for name, codes in read(state).items():
        place, shape = PLACES[name], QUANTIZED[name]
        sigma = oracle.decode_nu(codes.nu, codes.nu_scale, codes.nu_row, nu, 3)
        m = oracle.decode_mu(codes.mu, codes.mu_scale, sigma, mu)
        np.testing.assert_allclose(
            moments.nu[name], storage.from_tiles(sigma**2, place, shape), 1e-5
        )
        np.testing.assert_allclose(moments.mu[name], storage.from_tiles(m, place, shape), 1e-5)
