"""The programs beside the library: other formats' formulas, the benchmarks, the example."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.codec import formats
from tests import common

ROOT = Path(__file__).parent.parent
RANDOM = np.random.default_rng(0)
X = (RANDOM.standard_normal(1000) * np.exp(RANDOM.standard_normal(1000))).astype(np.float32)
NOISE = RANDOM.random(1000).astype(np.float32)


def blocks_of(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def decoded(codec, x):
    return np.asarray(codec.decode(codec.encode(jnp.asarray(x), jnp.asarray(NOISE))))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dynamic_map(bits, signed):
    """Dynamic exponent: all codes taken, 0 and 1 among the levels, negatives without -1."""
    levels = formats.dynamic_map(bits, signed)
    assert len(levels) == 2**bits == len(set(levels.tolist()))
    assert {0.0, 1.0} <= set(levels.tolist())
    assert (levels.min() < 0) == signed
    if signed:
        assert set(levels) - {1} == set(-levels) - {-1}


@pytest.mark.parametrize(
    ("levels", "block"),
    [(formats.NF4, 128), (formats.LINEAR_4BIT, 128), (formats.dynamic_map(8, True), 256)],
    ids=["nf4", "linear", "dynamic"],
)
def test_lookup(levels, block):
    """The nearest level, of the block's largest."""
    x = X if levels.min() < 0 else np.abs(X)
    got = decoded(formats.Lookup(levels, block), x)
    for part, want in zip(blocks_of(x, block), blocks_of(got, block), strict=True):
        scale = np.abs(part).max()
        nearest = np.abs(part[:, None] / scale - levels).argmin(1)
        close = np.isclose(scale * levels[nearest], want, rtol=1e-5)
        assert close.mean() > 0.99  # a tie may fall either way


def test_softsign():
    got = decoded(formats.Softsign(), X)
    for part, want in zip(blocks_of(X, 32), blocks_of(got, 32), strict=True):
        y = part / np.abs(part).max()
        z = np.round(127 * 2 * y / (1 + np.abs(y))) / 127
        scale = np.float16(np.abs(part).max())
        np.testing.assert_allclose(want, scale * z / (2 - np.abs(z)), rtol=0.02, atol=0.01 * scale)


def test_linear_root():
    v = X**2
    got = decoded(formats.LinearRoot(), v)
    for part, want in zip(blocks_of(v, 32), blocks_of(got, 32), strict=True):
        step = np.sqrt(part.max()) / 255
        assert np.all(np.abs(np.sqrt(want) - np.sqrt(part)) <= step * 0.51 + 1e-3 * np.sqrt(part))


@pytest.mark.parametrize("width", [2, 4])
def test_qema(width):
    """Powers of alpha, by which a tenth of the block is below the last; unbiased in the log."""
    v = X**2
    codec = formats.Qema(width)
    (size,) = {len(v) // len(codec.encode(jnp.asarray(v), jnp.asarray(NOISE))[1])}
    got = np.mean([
        np.log(np.asarray(codec.decode(codec.encode(jnp.asarray(v), jnp.full(1000, u)))))
        for u in (np.arange(64, dtype=np.float32) + 0.5) / 64
    ], axis=0)  # fmt: skip
    for part, want in zip(blocks_of(v, size), blocks_of(got, size), strict=True):
        inside = part > np.quantile(part, 0.2)
        inside &= part < part.max()
        steps = 2**width - 1
        delta = -np.log(np.quantile(part, 0.1) / part.max()) / steps
        low = np.log(part.max()) - delta / 2  # above it the top level clips
        inside &= np.log(part) < low
        np.testing.assert_allclose(want[inside], np.log(part[inside]), atol=0.1 * delta)


def test_bits():
    """A matrix of a million elements: codes and scales, per element of m and v."""
    bits = {item.name: item.bits((1024, 1024)) for item in formats.PEERS}
    assert bits["fp32"] == 32
    assert bits["bitsandbytes 8-bit"] == 8 + 32 / 256
    assert bits["torchao 4-bit"] == bits["NF4 + linear"] == 4 + 32 / 128
    assert bits["FlashOptim 8-bit"] == 8 + 16 / 32
    assert bits["SOLO 4/2"] == (4 + 32 / 128 + 2 + 64 / 128) / 2


@pytest.mark.parametrize("item", formats.PEERS, ids=lambda item: item.name)
def test_first_step(item):
    """From zero, the update of a constant gradient is 1 in every format, which stores it well."""
    g = jnp.full((2, 256), 1e-3)
    update, state = item.step(item.init(g.shape), g, 1)
    np.testing.assert_allclose(update, 1, rtol=1e-3)  # Qema's zero is 1e-12
    m, v = item.moments(state)
    np.testing.assert_allclose(m, 1e-4, rtol=0.01)
    np.testing.assert_allclose(v, 1e-9, rtol=0.01)


PROGRAMS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if path.name[0] != "_"]
PROGRAMS = [path for path in PROGRAMS if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_help(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.thorough
def test_train_gpt(tmp_path):
    """Two steps of a small model: losses alike, one program a run, every number in its place."""
    command = [sys.executable, str(ROOT / "examples" / "train_gpt.py"), "--steps", "2"]
    command += ["--bits", "5.0", "4.0", "--interval", "1", "--layers", "1", "--features", "64"]
    command += ["--length", "16", "--batch", "2", "--json", "run.json"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "TQDM_DISABLE": "1"} | common.QUICK
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["corpus_bytes"] > 10**6
    assert record["python"].split(".")[0] == "3"
    assert record["config"]["bits"] == [5.0, 4.0]
    theirs = record["optax.adamw"]
    ours = {bits: record[f"stquant.adamw {bits} bits"] for bits in (5.0, 4.0)}
    for x in (theirs, *ours.values()):
        assert {"val_loss", "state_bytes", "params", "seconds_per_step", "loss"} <= x.keys()
        assert len(x["loss"]) == 2
        assert x["compilations"] == 1
    for bits, x in ours.items():
        assert x["params"] == theirs["params"]
        assert x["loss"][0] == theirs["loss"][0]
        assert abs(x["val_loss"] - theirs["val_loss"]) < 0.1
        assert x["bits"] <= bits and x["state_bytes"] <= bits / 32 * theirs["state_bytes"]
        assert x["count"] == [2]
        assert np.shape(x["widths"]) == (1, len(x["slots"]))
    for plot in ("train_gpt.png", "train_gpt_widths.png"):
        assert (tmp_path / plot).stat().st_size > 1000
    for word in (record["python"], "optax.adamw", "stquant.adamw 4.0 bits", "ratio", "compiled"):
        assert word in run.stdout
