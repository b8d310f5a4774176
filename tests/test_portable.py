"""Checkpoints: Orbax's round trips, and what is refused because it is not what was saved."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import stquant_jax as stquant
from tests import common
from tests.meshes import FSDP

PARAMS = common.gaussian()
TX = optax.chain(optax.clip_by_global_norm(1.0), stquant.adamw(1e-3))


@pytest.fixture(scope="module")
def state():
    return jax.jit(TX.update)(PARAMS, TX.init(PARAMS), PARAMS)[1]


@pytest.fixture(scope="module")
def portable(state):
    return jax.device_get(stquant.to_portable(state, PARAMS))


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.thorough
def test_as_it_is(state, tmp_path):
    """On the mesh that it was made on a state needs nothing of ours, empty arrays included."""
    nothing_exact = {"kernel": jnp.ones((128, 128))}
    sharded = stquant.scale_by_adam_q(sharding=FSDP.sharding)
    wide = FSDP.put({"wide": np.ones((256, 1024), np.float32)})
    for i, x in enumerate((state, TX.init(nothing_exact), sharded.init(wide))):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(i), x)
            checkpointer.wait_until_finished()
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, x)
            again = checkpointer.restore(tmp_path / str(i), like)
        assert_same(again, x)
        assert [a.sharding for a in jax.tree.leaves(again)] == [
            b.sharding for b in jax.tree.leaves(x)
        ]


@pytest.mark.thorough
def test_boxes_in_names(portable):
    """Version 0.1 called the leaves of Flax's variables by their boxes, too."""
    clip, (own, *rest) = portable
    leaves = {f"{name}.value": x for name, x in own["leaves"].items()}
    boxed = stquant.from_portable((clip, (own | {"leaves": leaves}, *rest)), PARAMS)
    assert_same(boxed, stquant.from_portable(portable, PARAMS))


def test_portable(state, tmp_path):
    """Saved, and restored into shapes that nothing was computed for."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", stquant.to_portable(state, PARAMS))
        checkpointer.wait_until_finished()
        target = stquant.to_portable(jax.eval_shape(TX.init, PARAMS), PARAMS)
        found = checkpointer.restore(tmp_path / "saved", target)
    again = stquant.from_portable(found, PARAMS)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    step = jax.jit(TX.update)
    assert_same(step(PARAMS, again, PARAMS)[0], step(PARAMS, state, PARAMS)[0])


def test_truncated(state, tmp_path):
    """A file that lost its end is Orbax's to refuse."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", stquant.to_portable(state, PARAMS))
        checkpointer.wait_until_finished()
        target = stquant.to_portable(jax.eval_shape(TX.init, PARAMS), PARAMS)
        for path in (tmp_path / "saved").rglob("d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError):
            checkpointer.restore(tmp_path / "saved", target)


def node(portable):
    """The dictionary in an optimizer's portable state."""
    (found,) = (
        x
        for x in jax.tree.leaves(portable, is_leaf=lambda x: isinstance(x, dict))
        if isinstance(x, dict)
    )
    return found


def flipped(x, index, bit):
    x = x.copy()
    x.reshape(-1).view(np.uint8)[index] ^= 1 << bit
    return x


LEAF = "leaves", "embed"
CHANGES = {
    "a code": ((*LEAF, "mu"), lambda x: flipped(x, 5, 0), "'embed'.*not what was saved"),
    "a wide code": ((*LEAF, "nu"), lambda x: flipped(x, 9, 7), "1 of its codes do not fit"),
    "a scale": ((*LEAF, "nu_scale"), lambda x: flipped(x, 3, 1), "'embed'.*not what was saved"),
    "a row": ((*LEAF, "nu_row"), lambda x: flipped(x, 3, 1), "'embed'.*not what was saved"),
    "exact": (("leaves", "bias", "nu"), lambda x: flipped(x, 2, 6), "'bias'.*not what was saved"),
    "shape": ((*LEAF, "mu"), lambda x: x[:-1], r"\['embed'\]\['mu'\] is uint8\[159, 64\]"),
    "dtype": ((*LEAF, "mu"), lambda x: x.astype(np.int32), "int32.*expected uint8"),
    "missing": ((*LEAF, "mu"), None, "missing"),
    "leaf": ((*LEAF,), None, "embed.*missing"),
    "version": (("stquant_version",), lambda x: x + 1, "version 2: expected 1"),
    "widths": (("plan", "widths"), lambda x: np.full_like(x, 9), "2 to 8 bits for mu"),
    "room": (("plan", "widths"), lambda x: np.full_like(x, 8), "rows of an arena"),
    "count": (("count",), lambda x: -x - 5, "number of updates"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_corrupted(portable, change):
    """Every message names what is wrong; nothing is returned."""
    path, change, message = CHANGES[change]
    bad = copy.deepcopy(portable)
    *parents, last = path
    at = node(bad)
    for name in parents:
        at = at[name]
    if change is None:
        del at[last]
    else:
        at[last] = change(np.asarray(at[last]))
    with pytest.raises(ValueError, match=message):
        stquant.from_portable(bad, PARAMS)


def test_foreign(state, portable):
    """Of another model, another policy, another budget; no portable state at all."""
    other = PARAMS | {"embed": PARAMS["embed"].T}
    for params, precision, message in (
        (other, stquant.Budget(), "embed"),
        ({"embed": PARAMS["embed"]}, stquant.Budget(8.0), "expected nothing of that name"),
        (PARAMS, stquant.STQuant(), "memory"),
        (PARAMS, stquant.Budget(4.0), "Budget.*expected the budget that it was saved with"),
        (PARAMS, stquant.Budget(pins={"tile": "exact"}), "tile"),
    ):
        with pytest.raises(ValueError, match=message):
            stquant.from_portable(portable, params, precision)
    with pytest.raises(ValueError, match="expected what to_portable returned"):
        stquant.from_portable(state, PARAMS)
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda s: stquant.to_portable(s, PARAMS))(state)


@pytest.mark.thorough
def test_larger_budget(portable):
    """Moves to any budget that holds the plan; `resize` makes use of the rest."""
    state = stquant.from_portable(portable, PARAMS, stquant.Budget(6.0))
    assert stquant.report(state, PARAMS, stquant.Budget(6.0)).free_bytes > 0
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), stquant.adamw(1e-3, precision=stquant.Budget(6.0))
    )
    updates, _ = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert np.all(np.isfinite(updates["embed"]))
