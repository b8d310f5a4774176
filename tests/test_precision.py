"""Policies: the bytes asked for are the bytes of the state, and they are all used."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stquant_jax as stquant
from benchmarks import _io, shapes
from stquant_jax.precision import Slots
from stquant_jax.precision.policy import storable
from stquant_jax.precision.statistics import MU_ERROR, NU_NOISE, NU_SPREAD

TREES = {
    "one matrix": {"w": (512, 512)},
    "transformer": {
        "embed": (256, 128),
        "qkv": (128, 384),
        "out": (128, 128),
        "up": (128, 512),
        "down": (512, 128),
        "norm": (128,),
        "bias": (512,),
    },
    "ragged": {"conv": (3, 3, 60, 70), "dense": (1000, 130), "head": (257, 129), "bias": (1000,)},
}
BITS = (2.5, 3.0, 4.0, 5.0, 6.4, 8.0)


def shapes_of(tree):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in tree.items()}


def state_of(tree, precision, **storage):
    """Shapes of the state: nothing is allocated."""
    storage = stquant.Storage(**storage)
    tx = stquant.scale_by_adam_q(precision=precision, storage=storage)
    return jax.eval_shape(tx.init, shapes_of(tree))


def nbytes(state):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def reference_bytes(tree):
    """Of `optax.scale_by_adam`: a count and two float32 moments."""
    return 4 + 8 * sum(int(np.prod(shape)) for shape in tree.values())


def widths_of(tree, precision):
    """{leaf: (mu, nu)} of the quantized leaves."""
    leaves = stquant.plan(shapes_of(tree), precision).leaves
    return {leaf.path: (leaf.mu_width, leaf.nu_width) for leaf in leaves if leaf.kind != "exact"}


def smallest(tree, bits=0.1, **storage):
    """The budget that the error names."""
    with pytest.raises(ValueError, match=re.escape(f"Budget(bits={bits})")) as error:
        state_of(tree, stquant.Budget(bits), **storage)
    return float(re.search(r"parameters is ([\d.]+) bits", str(error.value))[1])


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("alignment", [1, 8])
def test_budget_is_kept(tree, bits, alignment):
    """Every byte counts: planes, scales, exact leaves, schedule, padding."""
    try:
        state = state_of(tree, stquant.Budget(bits), row_alignment=alignment)
    except ValueError:
        assert bits < smallest(tree, row_alignment=alignment)
        return
    assert nbytes(state) <= bits / 32 * reference_bytes(tree)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("bits", [4.0, 5.0, 6.4])
def test_budget_is_used(tree, bits):
    """What is left over widens nothing, or every slot is at its widest."""
    plan = stquant.plan(shapes_of(tree), stquant.Budget(bits))
    widths = widths_of(tree, stquant.Budget(bits))
    tiles = [-(-int(np.prod(tree[name])) // 4096) for name in widths]  # at least
    # The steps of nu skip a width, 0 to 2.
    assert plan.free_bytes < 2 * 512 * max(tiles) + 512
    assert all(2 <= mu <= 8 and 0 <= nu <= 8 for mu, nu in widths.values())


def test_plan_near_five_bits():
    tree = TREES["one matrix"]
    assert widths_of(tree, stquant.Budget(5.0)) == {"w": (5, 4)}
    assert widths_of(tree, stquant.Budget(32)) == {"w": (8, 8)}
    assert widths_of(tree, stquant.Budget(smallest(tree))) == {"w": (2, 0)}


def test_prior_errors_are_those_measured():
    """Geometric means over the GPT and ViT streams of benchmarks/results/codec.json."""
    rows = _io.read_json(_io.RESULTS / "codec.json")["results"]
    rows = [row for row in rows if not row.get("window")]  # at the default ones

    def measured(mu, nu, name="error"):
        found = [row for row in rows if (row.get("mu"), row.get("nu")) == (mu, nu)]
        real = [row[name] for row in found if row["stream"] in ("gpt", "vit")]
        assert len(real) == 2
        return np.exp(np.mean(np.log(real)))

    spread = measured(8, 0, "error_v")
    assert NU_SPREAD == pytest.approx(spread, rel=0.02)
    mu = [measured(width, 0) - spread for width in range(2, 9)]
    assert MU_ERROR[2:] == pytest.approx(mu, rel=0.1)
    nu = [1 / (1 / measured(8, width, "error_v") - 1 / spread) for width in range(2, 9)]
    assert NU_NOISE[2:] == pytest.approx(nu, rel=0.15)


def test_more_bits_less_error():
    """By the constants that rank the plans, which fall with the width."""
    nu_error = 1 / (1 / np.array(NU_NOISE) + 1 / NU_SPREAD)
    for errors in (np.array(MU_ERROR)[2:], nu_error[2:], NU_NOISE[2:]):
        assert list(errors) == sorted(errors, reverse=True)
    cost = []
    for bits in np.arange(2.5, 9, 0.25):
        mu, nu = widths_of(TREES["one matrix"], stquant.Budget(float(bits)))["w"]
        cost.append(MU_ERROR[mu] + nu_error[nu])
    assert cost == sorted(cost, reverse=True)


PARAMETERS = {"gpt2": 124_439_808, "vit-b16": 86_567_656, "llama-7b": 6_738_415_616}


@pytest.mark.parametrize("bits", [2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0])
@pytest.mark.parametrize("name", PARAMETERS)
def test_budget_is_kept_and_used_by_models(name, bits):
    """Of their size, from shapes alone: at most bits/32 of Optax's bytes, and nearly all of it."""
    tree = shapes.SETS[name]
    assert shapes.size(tree) == PARAMETERS[name]
    share = nbytes(state_of(tree, stquant.Budget(bits))) / reference_bytes(tree)
    assert share <= bits / 32
    assert share > 0.999 * bits / 32


@given(
    st.lists(
        st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5
    )
)
def test_floor(shapes):
    """The error names the smallest budget that fits, and it does fit, small leaves apart."""
    tree = {str(i): shape for i, shape in enumerate(shapes)}
    small = {name for name, shape in tree.items() if np.prod(shape) < stquant.Storage().min_size}
    large = {name: shape for name, shape in tree.items() if name not in small}
    if not large:
        assert nbytes(state_of(tree, stquant.Budget(0.1))) < reference_bytes(tree) + 4096
        return
    bits = smallest(tree)
    held, reference = nbytes(state_of(tree, stquant.Budget(bits))), reference_bytes(tree)
    apart = reference - reference_bytes(large)
    assert held <= max(bits / 32 * reference, bits / 32 * (reference - apart) + apart)
    if bits > 0.002:
        smallest(tree, round(bits - 0.002, 4))


@pytest.mark.parametrize("mu", [2, 5, 8])
@pytest.mark.parametrize("nu", [0, 1, 8])
@pytest.mark.parametrize("window", [None, 1, 8])
def test_fixed(mu, nu, window):
    """The widths named, in every slot, in an arena of just their rows."""
    tree = TREES["transformer"]
    tx = stquant.scale_by_adam_q(precision=stquant.Fixed(mu, nu, window))
    state = tx.init({name: jnp.zeros(shape) for name, shape in tree.items()})
    widths = np.asarray(state.precision.plan.widths).reshape(-1, 2)
    assert np.all(widths == [mu, nu])
    assert state.arena.shape == ((mu + nu) * state.mu_scale.shape[0], 128)
    windows = np.asarray(state.precision.plan.windows).reshape(-1, 2)
    assert np.all(windows[:, 0] == 0) and len(set(windows[:, 1])) == 1
    if window:
        assert windows[0, 1] == window


def test_policies_are_values():
    """Frozen and hashable, equal when alike: they can be static arguments."""
    assert stquant.Budget(5.0) == stquant.Budget(5.0) != stquant.Budget(4.0)
    assert len({stquant.Fixed(5, 4), stquant.Fixed(5, 4), stquant.Fixed(5, 4, 3)}) == 2
    with pytest.raises(AttributeError):
        stquant.Budget(5.0).bits = 4.0


# --- policies of one's own ---

SLOTS = Slots(np.array([4, 4, 8, 8]), ("one", "one", "other", "other"))
NU = SLOTS.moment == 1


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"widths": 0, "windows": 1, "shrinkage": 1.0}, True),
        ({"widths": 5}, False),  # more than there are rows
        ({"widths": 9}, False),
        ({"widths": -1}, False),
        ({"windows": 0}, False),
        ({"windows": 9}, False),
        ({"shrinkage": 1.5}, False),
        ({"shrinkage": float("nan")}, False),
    ],
    ids=str,
)
def test_storable(change, fits):
    fixed = stquant.Fixed(5, 4)
    plan = fixed.init(SLOTS, 0).plan
    told = {name: jnp.where(NU, x, getattr(plan, name)) for name, x in change.items()}
    assert storable(plan._replace(**told), SLOTS, fixed.rows(SLOTS, 0, 0)) == fits


@dataclasses.dataclass(frozen=True)
class Greedy(stquant.Fixed):
    """At every step it wants all codes of nu one bit wider."""

    interval: int | None = 1

    def decide(self, slots, rows, state, decays, count):
        widths = state.plan.widths + jnp.asarray(slots.moment, jnp.int32)
        return state._replace(plan=state.plan._replace(widths=widths))


@pytest.mark.thorough
def test_a_plan_that_cannot_be_stored_shows_in_every_update():
    params = {"one": jnp.ones((128, 128)), "bias": jnp.ones(8)}
    tx = stquant.scale_by_adam_q(precision=Greedy(5, 4))
    before = tx.init(params)
    update = jax.jit(tx.update)
    _, state = update(params, before)
    updates, state = update(params, state)
    chex.assert_trees_all_equal(state.precision.plan, before.precision.plan)
    assert np.all(np.isnan(updates["one"])) and np.all(np.isfinite(updates["bias"]))
