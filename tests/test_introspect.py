"""What `plan` promises is what `report` finds and what the state holds, to the byte."""

import sys
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stquant_jax as stquant
from tests import common

PARAMS = common.zeros(common.SHAPES | {"empty": (0, 3), "scalar": ()})
POLICIES = [stquant.Budget(5.0), stquant.Budget(8.0), stquant.Fixed(2, 0), stquant.Fixed(8, 8)]
STORAGES = [
    stquant.Storage(),
    stquant.Storage(row_alignment=8),
    stquant.Storage(min_size=0),
    stquant.Storage(min_size=12_000),
]


@pytest.mark.parametrize("precision", POLICIES, ids=str)
@pytest.mark.parametrize("storage", STORAGES, ids=["plain", "aligned", "all", "few"])
def test_bytes(precision, storage):
    tx = stquant.scale_by_adam_q(precision=precision, storage=storage)
    try:
        state = tx.init(PARAMS)
    except ValueError as error:
        assert "below the floor" in str(error)
        with pytest.raises(ValueError, match="below the floor"):
            stquant.plan(PARAMS, precision, storage)
        return
    planned = stquant.plan(PARAMS, precision, storage)
    now = stquant.report(state, PARAMS, precision, storage)
    assert replace(planned, small_bytes=0) == now
    assert planned.total_bytes == common.nbytes(state)
    parts = sum(leaf.bytes for leaf in planned.leaves)
    assert parts + planned.schedule_bytes + planned.free_bytes == planned.total_bytes
    elements = sum(x.size for x in jax.tree.leaves(PARAMS))
    assert planned.reference_bytes == 8 * elements + 4
    assert planned.bits == pytest.approx(32 * common.nbytes(state) / planned.reference_bytes)
    if bits := getattr(precision, "bits", None):  # of all leaves, or of those that are not small
        small = planned.small_bytes
        assert 32 * (planned.total_bytes - small) <= bits * (planned.reference_bytes - small)
        assert (planned.bits > bits) == bool(small)
        assert small == sum(x.bytes for x in planned.leaves if "min_size" in x.reason) or not small
        assert bool(small) == ("Small leaves come on top" in str(planned))


def test_shapes_suffice():
    """Neither needs the parameters' values; `plan` not even a device."""
    shapes = jax.eval_shape(lambda: PARAMS)
    precision = stquant.Fixed(5, 4)
    state = stquant.scale_by_adam_q(precision=precision).init(PARAMS)
    assert stquant.plan(shapes, precision) == stquant.plan(PARAMS, precision)
    assert stquant.report(state, shapes) == stquant.report(state, PARAMS)


def test_every_leaf_is_named():
    """With its format, why it has it, and its bits; exact ones above all."""
    report = stquant.plan(PARAMS, stquant.Fixed(5, 4))
    leaves = {leaf.path: leaf for leaf in report.leaves}
    assert list(leaves) == sorted(PARAMS)
    kinds = {name: leaf.kind for name, leaf in leaves.items()}
    assert kinds == {
        "bias": "exact",
        "embed": "folded",
        "empty": "exact",
        "ragged": "tiled",
        "scalar": "exact",
        "stack": "flat",
        "tile": "tiled",
    }
    for name, leaf in leaves.items():
        assert leaf.shape == PARAMS[name].shape
        assert leaf.reason
        widths = (32, 32) if leaf.kind == "exact" else (5, 4)
        assert (leaf.mu_width, leaf.nu_width) == widths
        elements = 2 * max(PARAMS[name].size, 1)
        assert leaf.bits == pytest.approx(8 * leaf.bytes / elements)
    assert "min_size=4096" in leaves["bias"].reason
    assert leaves["tile"].bytes == 4096 * (5 + 4) // 8 + 128 * 3 + 32
    assert leaves["bias"].bytes == 2 * 4 * 40


@pytest.mark.parametrize("render", [str, stquant.plan(PARAMS, POLICIES[1]).__class__.markdown])
def test_tables(render):
    report = stquant.plan(PARAMS, stquant.Budget(8.0))
    text = render(report)
    for leaf in report.leaves:
        assert leaf.path in text
    assert f"{report.total_bytes:,}" in text and "160x64" in text and "backend xla" in text


def test_markdown():
    """A table of eight columns: every leaf, the schedule, what is free, the total."""
    lines = stquant.plan(PARAMS, stquant.Fixed(5, 4)).markdown().splitlines()
    assert len(lines) == 2 + len(PARAMS) + 3
    assert {line.count("|") for line in lines} == {9}
    assert lines[1].replace(" ", "") == "|---" * 8 + "|"
    assert lines[2].startswith("| bias | 40 | exact | f32 | f32 | 320 | 32.00 |")


def test_report_follows_the_state():
    """It reads widths where they live."""
    tx = stquant.scale_by_adam_q(precision=stquant.Fixed(5, 4))
    state = tx.init(PARAMS)
    plan = state.precision.plan
    plan = plan._replace(widths=plan.widths.at[0].add(-1))
    narrow = state._replace(precision=state.precision._replace(plan=plan))
    report = stquant.report(narrow, PARAMS)
    assert [leaf.mu_width for leaf in report.leaves if leaf.kind != "exact"] == [4, 5, 5, 5]
    assert report.total_bytes == common.nbytes(state)
    assert report.free_bytes == 3 * 512  # a plane of embed's three tiles


def test_plot(tmp_path, monkeypatch):
    """Widths over time, or those of now; of this report's slots and of no others."""
    report = stquant.plan(PARAMS, stquant.Fixed(5, 4))
    widths = [5, 4] * 4
    steps = [{"count": 10 * i, "widths": np.array(widths) - i % 2} for i in range(4)]
    for name, history in (("now.png", None), ("one.png", steps[:1]), ("all.svg", steps)):
        report.plot(tmp_path / "new" / name, history)
        assert (tmp_path / "new" / name).stat().st_size > 1000
    drawn = (tmp_path / "new" / "all.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("embed", "tile", "mu", "nu", "step"))
    for history in ([], [{"count": 0, "widths": widths[2:]}], [*steps, steps[0] | {"widths": []}]):
        with pytest.raises(ValueError, match="expected at least one, and the 8 slots"):
            report.plot(tmp_path / "none.png", history)
    with pytest.raises(ValueError, match="no leaf is quantized"):
        stquant.plan({"bias": PARAMS["bias"]}, stquant.Fixed()).plot(tmp_path / "none.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"stquant-jax\[examples\]"):
        report.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_slots():
    """Two for every quantized leaf, in the order of the state."""
    leaves = ("embed", "ragged", "stack", "tile")
    want = tuple(f"{leaf}/{moment}" for leaf in leaves for moment in ("mu", "nu"))
    assert stquant.plan(PARAMS, stquant.Fixed(5, 4)).slots == want


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx, optax.scale(-1.0)),
    "steps": lambda tx: optax.MultiSteps(tx, 2),
    "masked": lambda tx: optax.masked(tx, True),
    "inject": lambda tx: optax.inject_hyperparams(lambda lr: optax.chain(tx, optax.scale(lr)))(0.1),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_inside_an_optimizer(wrap):
    """The state is found wherever it lies, and decoded where it lies."""
    precision = stquant.Fixed(5, 4)
    tx = stquant.scale_by_adam_q(precision=precision)
    state = wrap(tx).init(PARAMS)
    assert stquant.report(state, PARAMS) == stquant.report(tx.init(PARAMS), PARAMS)
    want = wrap(optax.scale_by_adam()).init(PARAMS)
    chex.assert_trees_all_equal(common.decode(state, PARAMS), want)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def test_optax_state():
    """`to_optax` has Optax's structure, whatever the dtype of the parameters in float32."""
    params = common.zeros(common.TILE | {"bias": (40,)}, jnp.bfloat16)
    state = stquant.scale_by_adam_q(precision=stquant.Fixed(5, 4)).init(params)
    moments, want = common.decode(state, params), optax.scale_by_adam().init(wide(params))
    chex.assert_trees_all_equal(moments, want)
    chex.assert_trees_all_equal_shapes_and_dtypes(moments, want)


def test_part_of_the_parameters():
    """Two groups by `multi_transform`: each state by its mask, and what all parameters take."""
    decays = jax.tree.map(lambda x: x.ndim > 1, PARAMS)
    labels = jax.tree.map(lambda decay: "decay" if decay else "none", decays)
    makers = {name: stquant.adamw(1e-3, weight_decay=0.1) for name in ("decay", "none")}
    tx = optax.multi_transform(makers, labels)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="not 2"):
        stquant.report(state, PARAMS)
    inner = state.inner_states["decay"]
    with pytest.raises(ValueError, match="params need .* pass mask="):
        stquant.report(inner, PARAMS)
    for mask in (decays, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)):
        found = stquant.report(inner, PARAMS, mask=mask)
        assert {leaf.path for leaf in found.leaves} == {k for k, x in decays.items() if x}
        planned = stquant.plan(PARAMS, mask=mask)
        assert replace(planned, others=0, small_bytes=0) == found
        assert planned.others == sum(x.size for x in PARAMS.values() if x.ndim < 2)
        exact = 8 * planned.others
        bits = 32 * (planned.total_bytes + exact) / (planned.reference_bytes + exact)
        assert f"all parameters take {bits:.3f} bits" in planned.notes[-1]
        named = stquant.metrics(inner, PARAMS, mask=mask)
        assert {name.split("/")[1] for name in named if name.startswith("widths/")} == {
            leaf.path for leaf in found.leaves if leaf.kind != "exact"
        }
