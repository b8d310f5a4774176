"""The memory benchmark: its models are what they are called, its figures add up."""

import json
import sys
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.memory import training as memory
from benchmarks.shapes import SETS, size

TINY = {
    "words": memory.Model(layers=2, width=64, heads=2, words=97, length=32),
    "images": memory.Model(layers=2, width=64, heads=2, words=10, length=4, patch=4),
}
NEVER_READ = 64  # bytes of arrays in the state that a step writes only: they are no arguments


def nbytes(*trees):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, model in TINY.items():
        monkeypatch.setitem(memory.MODELS, name, model)


@pytest.mark.parametrize("name", ["gpt2", "vit-b16"])
@pytest.mark.parametrize("unrolled", [False, True])
def test_shapes(name, unrolled):
    """Those of `benchmarks.shapes`."""
    leaves = jax.tree.leaves(memory.params_of(memory.MODELS[name], unrolled, jnp.float32))
    assert sum(x.size for x in leaves) == size(SETS[name])
    if unrolled:
        assert sorted(x.shape for x in leaves) == sorted(SETS[name].values())


@pytest.mark.parametrize(
    "name, layers", [("words", "scanned"), ("words", "unrolled"), ("images", "scanned")]
)
def test_step_trains(name, layers):
    """The program that is described is one that trains: every leaf moves, the loss falls."""
    row = memory.Row("cpu", name, 2, layers, "float32", "params", memory.BASE)
    step, shapes, (init, _) = memory.program_of(row)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.02 * random.standard_normal(x.shape, np.float32)), shapes[0]
    )
    first, state, step = params, init(params), jax.jit(step)
    classes = memory.MODELS[name].words
    batch = jax.tree.map(
        lambda x: (
            random.integers(0, classes, x.shape).astype(x.dtype)
            if x.dtype == jnp.int32
            else random.standard_normal(x.shape, np.float32)
        ),
        shapes[2],
    )
    losses = []
    for _ in range(10):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    assert abs(losses[0] - np.log(classes)) < 0.5 and losses[-1] < losses[0] - 0.01
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), first, params)))


@pytest.mark.parametrize(
    "optimizer, first", [(memory.BASE, "params"), ("stquant.adamw 5", "state")]
)
def test_figures_add_up(optimizer, first):
    row = memory.Row("cpu", "words", 2, "scanned", "float32", first, optimizer)
    _, (params, state, batch), _ = memory.program_of(row)
    found = memory.measure(row)
    assert found["params"] == nbytes(params) and found["state"] == nbytes(state)
    assert found["arguments"] >= nbytes(params, state, batch) - NEVER_READ
    assert found["aliased"] >= nbytes(params, state) - NEVER_READ  # all that is donated
    want = found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]
    assert found["peak"] == want and found["temporaries"] > nbytes(params)


def test_other_optimizers():
    """They make a state, of the size that their names say; nothing is compiled."""
    sizes = {}
    for name in memory.OPTIMIZERS:
        if name != "flashoptim-jax":
            row = memory.Row("cpu", "gpt2", 1, "scanned", "float32", "params", name)
            _, (params, state, _), _ = memory.program_of(row)
            sizes[name] = nbytes(state) / nbytes(params)
    assert abs(sizes[memory.BASE] - 2) < 1e-3
    assert abs(sizes["optax.adamw, mu bfloat16"] - 1.5) < 1e-3
    for name in ("stquant.adamw 5", "stquant.adamw 4", "stquant.adamw 3", "fused_update 5"):
        assert int(name[-1]) / 16 - 0.01 < sizes[name] <= int(name[-1]) / 16
    assert 0.48 < sizes["quantize_state 8, leafwise"] <= 0.5


def test_what_cannot_be_measured_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashoptim_jax", None)
    row = memory.Row("cpu", "words", 1, "scanned", "float32", "params", "flashoptim-jax")
    assert "flashoptim_jax" in memory.attempt(row, False)["not_measured"]
    row = memory.Row("device", "words", 1, "scanned", "float32", "params", memory.BASE)
    if jax.default_backend() == "cpu":
        assert "memory_stats" in memory.attempt(row, True)["not_measured"]


def test_device_statistics(monkeypatch):
    """Steps run, where the state comes first, too; here on a CPU, which keeps no such figures."""
    before = {"bytes_in_use": 1, "peak_bytes_in_use": 2}
    device = Mock(device_kind="fake")
    device.memory_stats.side_effect = [None, before, before, {"peak_bytes_in_use": 3}]
    monkeypatch.setattr(jax, "devices", lambda: [device])
    row = memory.Row("cpu", "words", 1, "scanned", "float32", "state", memory.BASE)
    step, args, (init, _) = memory.program_of(row)
    step, ran = jax.jit(step), []

    def counted(*state):
        ran.append(jax.tree.map(jnp.shape, state))
        return step(*state)

    with pytest.raises(ValueError, match="fake: expected a device with memory_stats"):
        memory.device_statistics(counted, args, init, row.first)
    found = memory.device_statistics(counted, args, init, row.first)
    assert len(ran) == memory.STEPS and all(shapes == ran[0] for shapes in ran)
    assert found == {"device_in_use": 1, "device_peak_of_init": 2, "device_peak": 3}


def test_resumes(tmp_path, monkeypatch, capsys):
    """Rows that are there are not compiled again; those that are not come with a share realized."""
    calls = []

    def fake(row, limit, run):
        calls.append(row.optimizer)
        found = {"params": 100, "state": 200 if row.optimizer == memory.BASE else 50}
        found |= dict.fromkeys(("arguments", "aliased", "temporaries"), 10)
        return found | {"peak": found["state"] + 400, "peak_reported": None}

    monkeypatch.setattr(memory, "in_process", fake)
    options = ["--models", "words", "--optimizers", memory.BASE, "stquant.adamw 5"]
    file = tmp_path / "memory.json"
    monkeypatch.setattr(sys, "argv", ["memory", *options, "--json", str(file)])
    memory.main()
    memory.main()
    assert calls == [memory.BASE, "stquant.adamw 5"]
    base, found = json.loads(file.read_text())["results"].values()
    assert memory.realized(found, base) == 1.0
    assert "100.0" in capsys.readouterr().out and file.with_suffix(".png").exists()


def test_base_is_optax():
    init, _ = memory.OPTIMIZERS[memory.BASE](None, True)
    params = {"kernel": jnp.zeros((4, 4))}
    want = optax.adamw(memory.RATE).init(params)
    assert jax.tree.structure(init(params)) == jax.tree.structure(want)
