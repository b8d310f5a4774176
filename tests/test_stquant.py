"""`STQuant`: plans that fit, one step at a time, at rest on constant statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stquant_jax as stquant
from stquant_jax.precision import Slots, Sums
from stquant_jax.precision.policy import DEFAULT_WINDOW
from stquant_jax.precision.stquant import PUBLISHED, STQuant, _adjacent
from tests.common import nbytes

LEAVES = 5
PINS = (("^2$", (4, 0)),)


def slots_of(tiles, pins=PINS):
    paths = tuple(str(i) for i in range(len(tiles)) for _ in range(2))
    return Slots(np.repeat(tiles, 2), paths, pins)


def sums_of(rms, cv, update, second_moment, elements=128.0):
    """Sums with given statistics: float[leaves] each."""
    rms, cv, update, second_moment = (
        np.broadcast_to(np.float32(x), np.shape(rms)) for x in (rms, cv, update, second_moment)
    )
    mean = rms / np.sqrt(1 + cv**2)
    fields = {name: np.ones_like(rms) for name in Sums._fields}
    return Sums(
        **fields
        | {
            "elements": np.full_like(rms, elements),
            "energy": elements * update**2,
            "gradient": elements * mean,
            "gradient2": elements * rms**2,
            "nu": elements * second_moment**2,
        }
    )


def random_sums(random, leaves=LEAVES, spread=1.0):
    return sums_of(*np.exp(spread * random.standard_normal((4, leaves))))


def with_sums(state, sums):
    """A state that observed these, for long."""
    observed = state.observed
    observed = observed._replace(averages=jnp.stack(sums), weight=jnp.ones_like(observed.weight))
    return state._replace(observed=observed)


DECAYS = (jnp.float32(0.9), jnp.float32(0.999))


def decide(policy, slots, rows, state, sums):
    return policy.decide(slots, rows, with_sums(state, sums), DECAYS, jnp.int32(1000))


def run(policy, slots, rows, sums, decisions):
    """Widths after each decision on the same statistics."""
    step = jax.jit(lambda state: decide(policy, slots, rows, state, sums))
    state, widths = policy.init(slots, rows), []
    for _ in range(decisions):
        state = step(state)
        widths.append(np.asarray(state.plan.widths))
    return state, np.stack(widths)


@settings(max_examples=15)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 40), min_size=LEAVES, max_size=LEAVES),
    st.floats(2.0, 8.0),
    st.floats(0.1, 3.0),
)
def test_plans_fit(seed, tiles, average, spread):
    """Whatever is measured: allowed widths, one step at a time, pins, windows, capacity."""
    random = np.random.default_rng(seed)
    slots = slots_of(tiles)
    rows = int(average * sum(slots.tiles) / 2) + int(np.sum(slots.tiles * slots.narrowest))
    policy = STQuant(patience=1)
    state = policy.init(slots, rows)
    lower, higher = _adjacent(slots.allowed)
    assert np.sum(slots.tiles * state.plan.widths) <= rows
    every = np.arange(len(slots.tiles))
    with jax.disable_jit():
        for _ in range(4):
            old = np.asarray(state.plan.widths)
            new = decide(policy, slots, rows, state, random_sums(random, spread=spread))
            assert jax.tree.structure(new) == jax.tree.structure(state)
            state, before = new, state
            widths = np.asarray(state.plan.widths)
            assert np.sum(slots.tiles * widths) <= rows
            assert np.all(slots.allowed[every, widths])
            assert np.all((widths >= lower[every, old]) & (widths <= higher[every, old]))
            assert widths[4:6].tolist() == [4, 0]
            # growing is lossless only in the same window
            grown = (widths > old) & (old > 0)
            windows, then = np.asarray(state.plan.windows), np.asarray(before.plan.windows)
            assert np.all(windows[grown] == then[grown]) and np.all(windows[::2] == 0)
            shrunk = (widths < old) & (slots.moment == 1)
            assert np.all(windows[shrunk] == np.array(DEFAULT_WINDOW)[widths[shrunk]])


@settings(max_examples=8)
@given(st.integers(0, 10_000), st.sampled_from([3.0, 4.5, 6.0]), st.sampled_from([0.5, 0.6, 1.0]))
def test_at_rest_on_constant_statistics(seed, average, threshold):
    random = np.random.default_rng(seed)
    slots = slots_of(random.integers(1, 40, LEAVES))
    rows = int(average * sum(slots.tiles))
    policy = STQuant(up=threshold, down=threshold, patience=1)
    _, widths = run(policy, slots, rows, random_sums(random, spread=1.5), 24)
    assert np.all(widths[-8:] == widths[-1])
    # no slot went back and forth: each moved one way
    steps = np.diff(widths, axis=0)
    assert not np.any(np.any(steps > 0, axis=0) & np.any(steps < 0, axis=0))


def test_equal_statistics_change_nothing():
    slots = slots_of([4] * LEAVES, pins=())
    policy = STQuant()
    rows = int(np.sum(slots.tiles * np.where(slots.moment == 0, 5, 4)))
    _, widths = run(policy, slots, rows, sums_of(np.ones(LEAVES), 1.0, 1.0, 1.0), 6)
    assert np.all(widths == [5, 4] * LEAVES)


def test_bits_go_where_the_error_is():
    """From the leaf of small updates to that of large ones, as many as the score says."""
    slots = slots_of([4, 4], pins=())
    rows = int(np.sum(slots.tiles * np.where(slots.moment == 0, 5, 4)))
    sums = sums_of(np.ones(2), 1.0, np.array([4.0, 0.25]), 1.0)
    factors = {"update": (1.0, 0.0)}
    _, widths = run(STQuant(factors=factors), slots, rows, sums, 12)
    assert widths[-1].tolist() == [7, 4, 3, 4]
    _, published = run(STQuant(factors=PUBLISHED), slots, rows, sums, 12)
    assert np.all(published[-1] == [5, 4, 5, 4])  # they do not look at the update


def test_the_least_sensitive_yield():
    """Two slots ask for bits, one can have them; one of the others makes room."""
    slots = slots_of([1, 1, 1, 1], pins=())
    policy = STQuant(factors={"update": (1.0, 0.0)}, patience=1)
    rows = 4 * (5 + 4)
    state = policy.init(slots, rows)
    start = state.plan.widths.tolist()
    assert start == [5, 4] * 4
    sums = sums_of(np.ones(4), 1.0, np.exp2(np.float32([1.5, 1.0, -0.8, -1.7])), 1.0)
    state = decide(policy, slots, rows, state, sums)
    assert (np.asarray(state.plan.widths) - start).tolist() == [1, 0, 1, 0, -1, 0, -1, 0]
    # without one that gives, nobody gets: the arena is full
    sums = sums_of(np.ones(4), 1.0, np.exp2(np.float32([0.9, 0.8, -0.3, -0.3])), 1.0)
    state = decide(policy, slots, rows, policy.init(slots, rows), sums)
    assert state.plan.widths.tolist() == start
    # room for one alone: it is for the one that asks for most
    state = decide(policy, slots, rows + 1, policy.init(slots, rows), sums)
    assert state.plan.widths.tolist() == [6, *start[1:]]


def test_nobody_yields_in_vain():
    """What the small slot would give is too little for the large one that asks."""
    large = slots_of([4, 1], pins=())
    sums = sums_of(np.ones(2), 1.0, np.array([2.0, 0.1]), 1.0)
    one = STQuant(factors={"update": (2.0, 0.0)}, patience=1)
    full = one.init(large, 5 * 9)
    new = decide(one, large, 5 * 9, full, sums)
    assert new.plan.widths.tolist() == full.plan.widths.tolist() == [5, 4, 5, 4]
    assert np.any(new.memory.streak > 0) and np.any(new.memory.streak < 0)


def test_bits_are_kept_where_nobody_takes_them():
    slots = slots_of([10, 1], pins=())
    policy = STQuant(factors={"update": (1.0, 1.0)}, patience=1)
    rows = 11 * 16  # all at their widest
    _, widths = run(policy, slots, rows, sums_of(np.ones(2), 1.0, np.array([1.0, 1e-3]), 1.0), 4)
    assert np.all(widths == 8)


def test_patience():
    """A verdict counts when it comes twice in a row."""
    slots = slots_of([1, 1], pins=())
    policy = STQuant(factors={"update": (1.0, 0.0)}, patience=2, decay=0.5)
    up, even = (sums_of(np.ones(2), 1.0, np.float32(u), 1.0) for u in ([4, 0.25], [1, 1]))
    state, seen = policy.init(slots, 18), []
    for sums in (up, even, up, up):
        state = decide(policy, slots, 18, state, sums)
        seen.append(state.plan.widths.tolist())
    assert seen == [[5, 4, 5, 4]] * 3 + [[6, 4, 4, 4]]


def test_what_cannot_be_told_changes_nothing():
    """Leaves without gradients, or with ones that are not finite, stay; so does the trend."""
    slots = slots_of([1, 1, 1], pins=())
    policy = STQuant(patience=1)
    state = policy.init(slots, 27)
    for nothing in (0.0, np.nan, np.inf):
        sums = Sums(*(np.full(3, nothing, np.float32) for _ in Sums._fields))
        new = decide(policy, slots, 27, state, sums)
        np.testing.assert_array_equal(new.plan.widths, state.plan.widths)
        assert all(np.all(x == 0) for x in jax.tree.leaves(new.memory))
    sums = random_sums(np.random.default_rng(0), 3)
    sums = Sums(*(np.float32([np.nan, *x[1:]]) for x in sums))
    new = decide(policy, slots, 27, state, sums)
    assert np.all(np.isfinite(new.memory.octaves)) and float(new.memory.weight) > 0


def test_in_training():
    """Two leaves whose updates differ: bits move, bytes do not, and nothing compiles again."""
    shapes = {"shaking": (128, 128), "steady": (128, 128)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    tx = stquant.scale_by_adam_q(precision=STQuant(4.0, interval=10))
    step = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(params)
    first = np.asarray(state.precision.widths)
    size = nbytes(state)
    assert size <= 4.0 / 32 * (4 + 8 * sum(x.size for x in params.values()))
    random = np.random.default_rng(0)
    direction = np.float32(random.standard_normal((128, 128)))
    for i in range(40):
        noise = 0.1 * np.float32(random.standard_normal((128, 128)))
        grads = {"shaking": (-1) ** i * direction, "steady": direction}
        updates, state = step({name: g + noise for name, g in grads.items()}, state)
    assert step._cache_size() == 1 and nbytes(state) == size
    widths = np.asarray(state.precision.widths)
    assert np.sum(widths) <= np.sum(first)
    assert widths[0] < widths[2] and widths[0] < first[0]  # mu follows the size of the update
    assert np.mean(np.sign(updates["steady"]) == np.sign(direction)) > 0.95
    assert np.mean(updates["shaking"] ** 2) < 0.1


def test_stays_a_value():
    assert STQuant(factors=PUBLISHED) == STQuant(factors=tuple(PUBLISHED.items())) != STQuant()
    assert len({STQuant(), STQuant(5.0), STQuant(4.0)}) == 2


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("bits", 0, "above 0 and at most 32"),
        ("interval", 0, "at least 1, or None"),
        ("factors", {"speed": (1, 1)}, "rms, cv, second_moment, update"),
        ("factors", {"rms": 1.0}, "bits of \\(mu, nu\\) per octave"),
        ("factors", {}, "a mapping"),
        ("up", 0.4, "at least 0.5"),
        ("down", "0.6", "at least 0.5"),
        ("patience", 0, "at least 1"),
        ("decay", 1.0, "from 0 to below 1"),
    ],
)
def test_errors(field, value, accepted):
    with pytest.raises(ValueError, match=f"STQuant\\({field}=.*{accepted}"):
        STQuant(**{field: value})


def test_below_the_floor():
    tx = stquant.scale_by_adam_q(precision=STQuant(0.5))
    with pytest.raises(ValueError, match=r"STQuant\(bits=0.5\) is below the floor"):
        tx.init({"w": jnp.zeros((128, 128))})
