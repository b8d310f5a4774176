"""The examples `finetune_lora` and `custom_policy`, a few steps of small models."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import stquant_jax as stquant
from examples import finetune_lora
from examples.custom_policy import Stages
from tests import common

ROOT = Path(__file__).parent.parent
SMALL = ["--length", "16", "--batch", "2", "--features", "64"]


def start(folder, example, *options):
    command = [sys.executable, "-m", f"examples.{example}", *SMALL, *options]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "TQDM_DISABLE": "1", "COLUMNS": "160"}
    environment |= common.QUICK
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.thorough
def test_finetune_lora(tmp_path):
    """All adapters are packed, the base stays as it is and has no state."""
    options = ["--layers", "4", "--pretrain", "2", "--steps", "2", "--json", "run.json"]
    run = start(tmp_path, "finetune_lora", *options)
    assert run.returncode == 0, run.stderr
    assert "base: saved as finetune_lora_base" in run.stdout
    record = json.loads((tmp_path / "run.json").read_text())
    before = record["others"]["no adapters"]
    theirs, ours = (record["runs"][name] for name in ("optax.adamw", "stquant.adamw 5.0 bits"))
    for x in (theirs, ours):
        assert len(x["loss"]) == 2 and x["of the base"] == 0 == x["base moved"]
        assert abs(x["reference"] - before["reference"]) < 0.1
    assert theirs["loss"][0] == ours["loss"][0]
    assert ours["state bytes"] - 4 <= 5 / 32 * theirs["state bytes"]  # 4: the schedule's own count
    layouts = record["layouts"]
    assert layouts["stacked"]["packed"] == layouts["stacked"]["leaves"] == 8
    assert layouts["stacked"]["bytes"] < min(x["bytes"] for x in list(layouts.values())[1:])
    assert (tmp_path / "finetune_lora.png").stat().st_size > 1000


def test_base(tmp_path, monkeypatch, capsys):
    """A base is trained once for the same options and text, and nothing else is overwritten."""
    trained = []

    def fit(cfg, name, loss_of, params, tx, text, steps):
        trained.append(name)
        return {"kernel": params["kernel"] + len(trained)}, None, {}

    monkeypatch.setattr(finetune_lora, "fit", fit)
    params, text = {"kernel": jnp.zeros((2, 3))}, np.arange(9, dtype=np.uint8)

    def base(**options):
        cfg = finetune_lora.Config(base=str(tmp_path / "base"), **options)
        return float(finetune_lora.train_base(cfg, None, params, text)["kernel"][0, 0])

    assert (base(), base(steps=7, rank=4), len(trained)) == (1, 1, 1)
    assert "trained before with the same options" in capsys.readouterr().out
    assert (base(seed=1, layers=3), base(seed=1, layers=3)) == (2, 2)
    assert "differs in layers, seed; a new one will replace it" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="there is something else"):
        finetune_lora.train_base(finetune_lora.Config(base=str(tmp_path / "other")), None, {}, text)


@pytest.mark.thorough
def test_custom_policy(tmp_path):
    """Both policies hold the budget, and the stages come when they should."""
    options = ["--layers", "1", "--steps", "16", "--interval", "2", "--bits", "6.0"]
    run = start(tmp_path, "custom_policy", *options, "--json", "run.json")
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    theirs = record["runs"]["optax.adamw"]
    for name in ("Budget", "Stages"):
        x = record["runs"][f"stquant.adamw, {name}"]
        assert x["bits"] <= 6.0 and x["state_bytes"] <= 6 / 32 * theirs["state_bytes"]
        assert abs(x["val_loss"] - theirs["val_loss"]) < 0.1
        assert (tmp_path / f"custom_policy_{name.lower()}.png").stat().st_size > 1000
    stages = record["runs"]["stquant.adamw, Stages"]
    slots = {name.removesuffix("/mu"): i for i, name in enumerate(stages["slots"][::2])}
    for count, widths in zip(stages["count"], stages["widths"], strict=True):
        pairs = np.reshape(widths, (-1, 2)).tolist()
        ends = [pairs[slots[name]] for name in ("tokens.embedding", "head.kernel")]
        block = [pair for name, pair in zip(slots, pairs, strict=True) if "blocks.0" in name]
        assert (ends == [[8, 8]] * 2) == (count < 4)
        assert (block == [[5, 4]] * len(block)) == (4 <= count < 8)


PARAMS = {"first": jnp.zeros((128, 64)), "second": jnp.zeros((128, 64))}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "expected 0"),
        (((2, {}),), "expected 0"),
        (((0, {}), (3, {})), "multiples of interval=2"),
        (((0, {"first": "exact"}),), "not 'exact'"),
        (((0, {"third": 5}),), "is found in none of"),
        (((0, {"first": 9}),), "expected a width from 2 to 8"),
    ],
)
def test_stages_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        stquant.plan(PARAMS, Stages(6.0, stages, interval=2))
