"""From plan to plan in place: what moves or grows stays as it was, bit for bit, what shrinks keeps
each group's energy and length, and no second arena is made on the way.
"""

import re
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stquant_jax as stquant
from benchmarks.shapes import blocks
from stquant_jax import codecs
from stquant_jax.backends.repack import repack
from stquant_jax.engine.planning import layout_for
from stquant_jax.precision import Fixed, Plan
from stquant_jax.storage import arena as rows
from tests import common, oracle
from tests import oracle_storage as storage
from tests.test_oracle import PLACES, assert_close, gradients, read, slots

MU, NU = range(2, 9), range(9)
WINDOWS = (1, 2, 3, 4, 6, 8)
STORAGE = stquant.Storage()
LAYOUT = layout_for(common.zeros(), Fixed(), STORAGE)


def packed_of(state):
    return rows.Packed(state.arena, state.mu_scale, state.nu_scale, state.nu_row)


def plan_of(widths, windows):
    """A plan from widths [slots] and windows [leaves] or a number."""
    widths = np.asarray(widths, np.int32)
    table = np.zeros_like(widths)
    table[1::2] = windows
    return Plan(jnp.asarray(widths), jnp.asarray(table), jnp.zeros(widths.shape, jnp.float32))


@jax.jit
def _repack(state, plan):
    packed = repack(LAYOUT, STORAGE, state.count, packed_of(state), state.precision.plan, plan)
    precision = state.precision._replace(plan=plan)
    return state._replace(**packed._asdict(), precision=precision)


def to_plan(state, widths, windows):
    return _repack(state, plan_of(widths, windows))


def trained(mu=5, nu=4, window=3):
    """A few steps in, with columns of zeros and two groups that are not finite."""
    state = common.init(common.zeros(), mu, nu, window)
    for count in (3, 4, 32):
        _, state = common.update(gradients(count), state)
    return state


def moments(state):
    return jax.tree.leaves(common.decode(state, common.zeros())[1:])


def assert_same_values(before, after):
    for x, y in zip(moments(before), moments(after), strict=True):
        np.testing.assert_array_equal(x, y)


# --- growing and moving ---


@pytest.mark.parametrize(("mu", "nu"), [(2, 0), (3, 1), (4, 2), (5, 3), (6, 5), (7, 6), (7, 7)])
def test_growing_changes_no_value(mu, nu):
    """To every wider pair of widths, in all leaves at once and in one leaf alone, bit for bit."""
    before = trained(mu, nu)
    narrow = np.tile([mu, nu], len(PLACES))
    for wider in [(w, nu) for w in range(mu, 9)] + [(8, w) for w in range(nu, 9)]:
        everywhere = np.tile(wider, len(PLACES))
        for leaf in (None, 0, 1, len(PLACES) - 1):
            one = np.arange(len(narrow)) // 2 == leaf
            widths = np.where(one, everywhere, narrow) if leaf is not None else everywhere
            after = to_plan(before, widths, 3)
            assert_same_values(before, after)
            for old, span, new, other in zip(*parts(before), *parts(after), strict=True):
                if span[1] == other[1]:  # not only alike in value: the same planes
                    np.testing.assert_array_equal(old, new)


def parts(state):
    """The rows of every slot, and where they are: (first row, width, tiles)."""
    arena, spans = np.asarray(state.arena), slots(state)
    return [arena[first : first + width * tiles] for first, width, tiles in spans], spans


def test_growing_is_by_definition():
    """The codes are those of the same levels, as the oracle lists them."""
    for (mu, nu), (wide, wider) in (((2, 0), (3, 2)), ((3, 2), (4, 3)), ((4, 3), (8, 8))):
        before = trained(mu, nu)
        after = to_plan(before, np.tile([wide, wider], len(PLACES)), 3)
        for old, new in zip(read(before).values(), read(after).values(), strict=True):
            np.testing.assert_array_equal(new.mu, oracle.grow_mu(old.mu, mu, wide))
            np.testing.assert_array_equal(new.nu, oracle.grow_nu(old.nu, nu, wider))
            for x, y in zip(old[2:], new[2:], strict=True):
                np.testing.assert_array_equal(x, y)


def test_the_same_plan_changes_nothing():
    before = trained()
    after = _repack(before, before.precision.plan)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)


def test_second_moment_grows_and_returns():
    """Nothing is lost on the way, nor is anything of the scale: only mu rounds anew."""
    before = trained(5, 3)
    wide = to_plan(before, np.tile([5, 7], len(PLACES)), 3)
    after = to_plan(wide, np.tile([5, 3], len(PLACES)), 3)
    for x, y in zip(read(before).values(), read(after).values(), strict=True):
        living = (x.nu_scale > 0) & (x.nu_scale < oracle.BASE_NOT_FINITE)
        np.testing.assert_array_equal(x.nu * living, y.nu * living)
        for one, other in ((x.mu, y.mu), *zip(x[2:], y[2:], strict=True)):
            np.testing.assert_array_equal(one, other)


move_rows = jax.jit(rows.move_rows)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_move_rows(count, first, to):
    """Overlapping or not, up or down, in blocks of 64 and one by one."""
    first, to = (x % (301 - count) for x in (first, to))
    before = np.arange(300 * 128, dtype=np.uint32).reshape(300, 128)
    want = before.copy()
    want[to : to + count] = before[first : first + count]
    np.testing.assert_array_equal(move_rows(before, first, to, count), want)


# --- shrinking, and other windows ---

FROM_TO = [  # (mu, nu, window) before and after
    ((8, 8, 3), (7, 6, 3)),
    ((6, 5, 3), (5, 4, 3)),
    ((5, 4, 3), (4, 4, 4)),  # another window alone, of nu
    ((5, 4, 3), (4, 6, 2)),  # wider, in a narrower window
    ((5, 3, 3), (4, 2, 2)),
    ((4, 2, 4), (3, 0, 2)),
    ((3, 0, 2), (2, 4, 3)),  # the first codes
    ((8, 8, 6), (2, 0, 2)),
]


def alike(got, want, where):
    """Codes that are equal in their whole group."""
    return ((got == want) | ~where).all(-2, keepdims=True)


@pytest.mark.parametrize(("old", "new"), FROM_TO)
def test_shrinking_is_by_definition(old, new):
    before = trained(*old)
    after = to_plan(before, np.tile(new[:2], len(PLACES)), new[2])
    leaves = zip(read(before).values(), read(after).values(), PLACES.values(), strict=True)
    for i, (x, y, place) in enumerate(leaves):
        assert_recoded(x, y, place, old, new, i, int(before.count))


def assert_recoded(x, y, place, old, new, leaf, count):
    """Codes of a leaf, in formats (mu, nu, window)."""
    inside = place.element >= 0
    groups = inside.any(-2, keepdims=True)
    random = storage.noise(STORAGE.seed ^ oracle.SALT, leaf, count, place.group)
    np.testing.assert_array_equal(x.nu_row, y.nu_row)

    narrow = min(old[1], new[1])
    nu, nu_scale = x.nu, x.nu_scale
    if narrow < old[1] or (old[2] != new[2] and narrow):
        codes, scale = oracle.regroup_nu(
            nu, nu_scale, x.nu_row, inside, old[1:], (narrow, new[2]), random
        )
        living = inside & (nu_scale > 0) & (nu_scale < oracle.BASE_NOT_FINITE)
        got = y.nu >> (new[1] - narrow)
        assert_close(got, codes, living)
        assert_close(y.nu_scale, scale, alike(got, codes, inside) & groups, 0.99)
        np.testing.assert_array_equal(oracle.grow_nu(got, narrow, new[1]), y.nu)
    else:
        np.testing.assert_array_equal(y.nu, oracle.grow_nu(nu, old[1], new[1]))
        np.testing.assert_array_equal(y.nu_scale, nu_scale)

    if new[0] >= old[0]:
        np.testing.assert_array_equal(y.mu, oracle.grow_mu(x.mu, old[0], new[0]))
        np.testing.assert_array_equal(y.mu_scale, x.mu_scale)
        return
    alive = (x.mu_scale > 0) & (x.mu_scale < oracle.MU_NOT_FINITE)
    np.testing.assert_array_equal(y.mu_scale[~alive], x.mu_scale[~alive])
    e = np.where(alive & inside, oracle.decode_mu(x.mu, x.mu_scale, 1.0, old[0]), 0)
    codes, _ = oracle.encode_mu(e, inside, alive, new[0], random)
    # Levels of one width often lie just on a border between cells of another.
    cells = np.abs(oracle.mu_cells(e, new[0]))
    cells += 0.0 if new[0] < 4 else 0.5
    border = (np.abs(cells - np.round(cells)) < 1e-4) & ((new[0] >= 4) | (cells > 0.5))
    border |= (new[0] < 4) & (np.abs(cells - 0.5) < 1e-4)
    assert_close(y.mu, codes, alive & inside & ~border)
    assert np.max(np.abs(y.mu - codes)[np.broadcast_to(alive & inside, e.shape)], initial=0) <= 1
    last = len(oracle.mu_levels(new[0])) - 1
    scale = oracle.mu_scale(e, np.minimum(y.mu, last), inside, new[0], random)
    assert_close(y.mu_scale, scale, alive & groups, 0.99)


@pytest.mark.parametrize(("old", "new"), FROM_TO)
def test_shrinking_keeps_energy_and_length(old, new):
    """To the step of a group's scale, and on average."""
    before = trained(*old)
    after = to_plan(before, np.tile(new[:2], len(PLACES)), new[2])
    leaves = zip(read(before).values(), read(after).values(), PLACES.values(), strict=True)
    for x, y, place in leaves:
        inside = place.element >= 0
        energies, lengths = [], []
        for codes, (mu, nu, window) in ((x, old), (y, new)):
            sigma = oracle.decode_nu(codes.nu, codes.nu_scale, codes.nu_row, nu, window)
            e = oracle.decode_mu(codes.mu, codes.mu_scale, 1.0, mu)
            energies.append(np.sum(np.where(inside, sigma**2, 0), -2))
            lengths.append(np.sum(np.where(inside, e**2, 0), -2))
        np.testing.assert_array_equal(energies[0] > 0, energies[1] > 0)
        np.testing.assert_array_equal(np.isnan(energies[0]), np.isnan(energies[1]))
        for (a, b), step in ((energies, 2 / 512), (lengths, 2 / 5)):
            sound = np.isfinite(a) & (a > 0)
            octaves = np.log2(b[sound] / a[sound])
            assert np.max(np.abs(octaves), initial=0) <= step + 1e-4
            assert abs(np.mean(octaves)) < 3 * step / np.sqrt(len(octaves)) + 1e-3


@jax.jit
def recode_second(codes, scale, row, old, new, dither, coin):
    lattices = [codecs.lattice(width, window, 0.0) for width, window in (old, new)]
    valid = jnp.ones(codes.shape, jnp.float32)
    return codecs.recode_second(codes, scale, row, valid, *lattices, dither, coin)


LATTICES = [  # (width, window) before and after
    ((8, 3), (7, 3)),
    ((6, 3), (3, 3)),
    ((4, 3), (2, 4)),
    ((5, 4), (5, 6)),
    ((4, 2), (4, 3)),
    ((8, 2), (2, 8)),
]


@pytest.mark.parametrize(("old", "new"), LATTICES)
def test_second_moment_is_unbiased(old, new):
    """In log sigma, over many draws: elements' distances from one another, all of them inside."""
    draws, random = 2**14, np.random.default_rng(0)
    code = random.integers(0, 2 ** old[0], (1, 32, 1))
    code[0, :2, 0] = 0, 1
    deltas = [window / 2**width for width, window in (old, new)]
    code = np.minimum(code, int((2 ** new[0] - 2) * deltas[1] / deltas[0]))
    codes = np.repeat(code, draws, -1).astype(np.uint32)
    dither = random.random(codes.shape, np.float32)
    scale = np.full((1, 1, draws), 30_000, np.uint32)
    row = np.zeros((1, 32, 1), np.float32)
    fresh, _ = recode_second(codes, scale, row, old, new, dither, dither[:, :1])
    fresh = np.asarray(fresh, float)[0]
    assert np.all(fresh < 2 ** new[0])
    error = (fresh - fresh[:1]) * deltas[1] - (codes[0] - codes[0, :1]) * deltas[0]
    assert np.max(np.abs(error)) < 2 * deltas[1]
    assert np.max(np.abs(error.mean(-1))) < 6 * deltas[1] * np.sqrt(0.5 / draws)


# --- many plans, one after the other ---

# Tiled, flat with a ragged end, folded: eight tiles in all.
SMALL = {"a": (128, 32), "b": (60, 100), "c": (64, 64), "d": (50, 90), "e": (128, 64)}
SMALL_LAYOUT = layout_for(common.zeros(SMALL), Fixed(), STORAGE)
SMALL_PLACES = [storage.place(shape) for shape in SMALL.values()]
TILES = np.repeat([len(place.element) for place in SMALL_PLACES], 2)
CAPACITY = int(5 * TILES.sum()) + 1
PLANS = 25


@jax.jit
def run_plans(packed, plans, counts):
    """What is stored under each plan, from the first on, one after the other."""

    def move(carry, x):
        packed, old = carry
        new, count = x
        packed = repack(SMALL_LAYOUT, STORAGE, count, packed, old, new)
        return (packed, new), packed

    first, rest = (
        jax.tree.map(lambda x, part=part: x[part], plans) for part in (0, slice(1, None))
    )
    return jax.lax.scan(move, (packed, first), (rest, counts))[1]


def random_plans(random):
    """Widths [plans, slots] that fit and windows [plans, leaves]: a few slots move at a time."""
    widths, windows = [np.tile([2, 0], len(SMALL))], [np.full(len(SMALL), 3)]
    allowed = [np.array(w) for w in (MU, NU)]
    for _ in range(PLANS + 1):
        chance = random.choice([0.1, 0.3, 1.0], p=[0.5, 0.4, 0.1])
        drawn = np.array([random.choice(allowed[slot % 2]) for slot in range(len(TILES))])
        new = np.where(random.random(len(TILES)) < chance, drawn, widths[-1])
        while np.sum(new * TILES) > CAPACITY:  # one slot after the other makes room
            slot = random.integers(len(TILES))
            new[slot] = random.choice(allowed[slot % 2][allowed[slot % 2] <= new[slot]])
        drawn = random.choice(WINDOWS, len(SMALL))
        windows.append(np.where(random.random(len(SMALL)) < 0.1, drawn, windows[-1]))
        widths.append(new)
    return np.array(widths[1:]), np.array(windows[1:])


def random_contents(random, widths):
    """An arena full of codes that an encoding may leave; scales of living and other groups."""
    arena = random.integers(0, 2**32, (CAPACITY, 128), dtype=np.uint32)
    ends = np.cumsum(widths * TILES)
    for slot, (end, width, tiles) in enumerate(zip(ends, widths, TILES, strict=True)):
        last = 2**width - 1 - (slot % 2 == 0 and width >= 4)  # the code that no level has
        codes = random.integers(0, last + 1, (tiles, 32, 128))
        storage.write_slot(arena, end - width * tiles, width, codes)
    tiles = TILES[::2].sum()
    mu_scale = random.integers(60, 200, (tiles, 128))
    nu_scale = random.integers(20_000, 40_000, (tiles, 128))
    kind = random.random((tiles, 128))
    mu_scale = np.where(kind < 0.02, 0, np.where(kind > 0.99, 255, mu_scale))
    nu_scale = np.where(kind < 0.01, 0, np.where(kind > 0.99, 2**16 - 1, nu_scale))
    nu_row = random.integers(0, 100, tiles * 32)
    types = (np.uint32, np.uint8, np.uint16, np.uint8)
    parts = (arena, mu_scale, nu_scale, nu_row)
    return rows.Packed(*(x.astype(dtype) for x, dtype in zip(parts, types, strict=True)))


def assert_follows(before, after, plan, new_plan, count):
    """One step, against the oracle, slot by slot: raw planes where nothing is coded anew."""
    (widths, windows), (new_widths, new_windows) = plan, new_plan
    firsts = [np.cumsum(w * TILES) - w * TILES for w in (widths, new_widths)]
    np.testing.assert_array_equal(before.nu_row, after.nu_row)
    tile = 0
    for leaf, place in enumerate(SMALL_PLACES):
        tiles = len(place.element)
        part = slice(tile, tile := tile + tiles)
        formats = [
            (w[2 * leaf], w[2 * leaf + 1], window[leaf])
            for w, window in ((widths, windows), (new_widths, new_windows))
        ]
        if formats[0] == formats[1] or formats[0][1] == formats[1][1] == 0 == (
            formats[0][0] - formats[1][0]
        ):
            for slot in (2 * leaf, 2 * leaf + 1):
                x, y = (
                    packed.arena[first[slot] : first[slot] + widths[slot] * tiles]
                    for packed, first in zip((before, after), firsts, strict=True)
                )
                assert np.array_equal(x, y)
            assert np.array_equal(before.mu_scale[part], after.mu_scale[part])
            assert np.array_equal(before.nu_scale[part], after.nu_scale[part])
            continue
        x, y = (
            oracle.Codes(
                *(
                    storage.read_slot(packed.arena, first[slot], w[slot], tiles)
                    for slot in (2 * leaf, 2 * leaf + 1)
                ),
                *(s[part, None].astype(int) for s in (packed.mu_scale, packed.nu_scale)),
                packed.nu_row.reshape(-1, 32, 1)[part].astype(int),
            )
            for packed, first, w in zip((before, after), firsts, (widths, new_widths), strict=True)
        )
        assert_recoded(x, y, place, *formats, leaf, count)


@hypothesis.settings(max_examples=400, derandomize=True)
@given(st.integers(0, 2**32 - 1))
@pytest.mark.thorough
def test_ten_thousand_plans(seed):
    """Every slot after each of 25 random plans in a row, 400 times from new contents."""
    random = np.random.default_rng(seed)
    widths, windows = random_plans(random)
    packed = random_contents(random, widths[0])
    plans = [plan_of(*pair) for pair in zip(widths, windows, strict=True)]
    plans = jax.tree.map(lambda *x: np.stack(x), *plans)
    counts = random.integers(1, 10**6, PLANS).astype(np.int32)
    after = jax.tree.map(np.asarray, run_plans(packed, plans, counts))
    for i in range(PLANS):
        here = jax.tree.map(lambda x, i=i: x[i], after)
        pairs = ((widths[j], windows[j]) for j in (i, i + 1))
        assert_follows(packed, here, *pairs, int(counts[i]))
        packed = here


# --- memory ---

BLOCK = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in blocks(1).items()}


def arena_copies(compiled, arena):
    """Lines of the program that copy a whole arena."""
    shape = re.escape(f"u32[{arena.shape[0]},128]")
    return re.findall(rf"= {shape}\S* copy\(", compiled.as_text())


def shapes_of_block(policy):
    tx = stquant.scale_by_adam_q(precision=policy)
    return tx, jax.eval_shape(tx.init, BLOCK), layout_for(BLOCK, policy, STORAGE)


@pytest.mark.parametrize("branch", [False, True])
def test_repack_is_in_place(branch):
    """No copy of the arena, little beside it: alone, and as a branch of a `lax.cond`."""
    _, state, layout = shapes_of_block(stquant.Budget(5.0))

    @partial(jax.jit, donate_argnums=0)
    def move(packed, old, new, count):
        change = partial(repack, layout, STORAGE, count, old=old, new=new)
        if not branch:
            return change(packed)
        return jax.lax.cond(count % 2 == 0, change, lambda packed: packed, packed)

    packed, plan = packed_of(state), state.precision.plan
    compiled = move.lower(packed, plan, plan, state.count).compile()
    assert not arena_copies(compiled, state.arena)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in packed)
    assert memory.temp_size_in_bytes < 2**20


@pytest.mark.thorough
def test_update_with_a_policy_is_in_place():
    """Inside a `lax.scan` over whole updates, a policy costs less than 1 MiB and no copy."""
    temporary = {}
    for interval in (2, None):
        tx, state, _ = shapes_of_block(stquant.Budget(5.0, interval=interval))

        @partial(jax.jit, donate_argnums=0)
        def train(state, grads, tx=tx):
            return jax.lax.scan(
                lambda state, _: (tx.update(grads, state)[1], None), state, length=4
            )[0]

        compiled = train.lower(state, BLOCK).compile()
        assert not arena_copies(compiled, state.arena)
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= state.arena.size * 4
        temporary[interval] = memory.temp_size_in_bytes
    assert temporary[2] - temporary[None] < 2**20
