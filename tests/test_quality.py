"""What the quality benchmark trains with, and what it makes of losses."""

import math
from argparse import Namespace
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.codec import formats, gain
from benchmarks.quality import training as quality
from benchmarks.quality.contenders import (
    AGAINST,
    FINE,
    MATRIX,
    PEERS,
    QUESTIONS,
    exact,
    noisy,
    peer,
    refreshed,
)

PARAMS = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}


def gradients(step: int) -> dict:
    keys = jax.random.split(jax.random.key(step), len(PARAMS))
    return {
        name: jax.random.normal(key, x.shape)
        for key, (name, x) in zip(keys, PARAMS.items(), strict=True)
    }


def updates_of(contender, steps: int) -> list:
    tx = contender.make()
    update, state, out = jax.jit(tx.update), tx.init(PARAMS), []
    for step in range(steps):
        updates, state = update(gradients(step), state)
        out.append(updates)
    return out


def test_peer():
    """Large leaves as the reference format steps them, small ones exact; bits of both."""
    item = PEERS["bitsandbytes 8-bit"]
    got, adam = updates_of(peer(item), 3), updates_of(exact(), 3)
    state = item.init((64, 64))
    for step, updates in enumerate(got):
        want, state = item.step(state, gradients(step)["kernel"], jnp.float32(step + 1))
        np.testing.assert_allclose(updates["kernel"], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(updates["bias"], adam[step]["bias"], rtol=1e-4, atol=1e-6)
    bits = (4096 * item.bits((64, 64)) + 64 * 32) / (4096 + 64)
    assert peer(item).bits_of(None, PARAMS) == pytest.approx(bits)
    assert formats.PEERS[0].name == "fp32" and exact().bits_of(
        optax.scale_by_adam().init(PARAMS), PARAMS
    ) == pytest.approx(32, abs=0.01)


@pytest.mark.parametrize("kind", "mv")
@pytest.mark.parametrize("error", [0.1, 0.5])
def test_noisy(kind, error):
    """The update has the error it was asked for; that of v is a factor, so signs stay."""
    got, want = updates_of(noisy(kind, error), 20), updates_of(exact(), 20)
    pairs = [(a["kernel"], b["kernel"]) for a, b in zip(got, want, strict=True)]
    off = sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)
    assert off / sum(float(jnp.sum(b**2)) for _, b in pairs) == pytest.approx(error, rel=0.2)
    assert all(jnp.all(a * b >= 0) for a, b in pairs) == (kind == "v")


def test_refreshed():
    """After every second step Adam starts anew."""
    got = updates_of(refreshed(exact(), 2), 4)
    tx = optax.scale_by_adam()
    state = tx.init(PARAMS)
    for step in range(4):
        state = tx.init(PARAMS) if step == 2 else state
        want, state = tx.update(gradients(step), state)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got[step], want
        )


def test_names():
    """No format of a question has the name of another in the matrix."""
    names = [name for more in QUESTIONS.values() for name in more]
    assert len(set(names)) == len(names) and MATRIX.keys().isdisjoint(names)
    assert set(quality.CLOSE) <= MATRIX.keys()
    assert set(AGAINST) | set(AGAINST.values()) <= MATRIX.keys()


def test_interval():
    """As tables of Student's t have it: 2.776 for five differences."""
    mean, half = quality.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert quality.interval([0.5]) == (0.5, None)
    assert quality.interval([math.inf, 1.0]) == (math.inf, None)


def record() -> dict:
    rows = []
    for name, by_rate in {
        "fp32": {0.1: (2.0, 2.2, 2.1), 0.3: (1.0, 1.2, 1.1)},
        "Budget 5.0": {0.1: (0.9, 1.3, 1.1), 0.3: (None, 1.0, 1.0)},
        "Budget 3.5": {0.1: (1.5,)},
    }.items():
        for lr, values in by_rate.items():
            for seed, loss in enumerate(values):
                rows.append({"format": name, "lr": lr, "seed": seed, "val_loss": loss, "bits": 5.0})
    return {"results": rows}


def test_summary():
    """Each at its best rate, paired by seed; a rate that diverged once is not the best, and a
    format that lacks runs is left out."""
    fp32, budget = quality.summary(record())
    assert (fp32["format"], fp32["lr"], fp32["difference"], fp32["half"]) == ("fp32", 0.3, 0, 0)
    assert (budget["format"], budget["lr"]) == ("Budget 5.0", 0.1)
    assert budget["difference"] == pytest.approx(0)
    assert budget["half"] == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)


def test_half_done():
    """Where a rate has fewer seeds, a format counts with those that all rates have."""
    found = record()
    found["results"] = [
        row
        for row in found["results"]
        if not (row["format"] == "Budget 5.0" and row["seed"] == 2 and row["lr"] == 0.1)
    ]
    found["results"].append(
        {"format": "Budget 3.5", "lr": 0.3, "seed": 0, "val_loss": 1.25, "bits": 5.0}
    )
    _, budget, narrow = quality.summary(found)
    assert budget["losses"] == [0.9, 1.3]
    assert (narrow["lr"], narrow["difference"], narrow["half"]) == (0.3, 0.25, None)


def test_versus():
    """Ours and theirs each at its own best rate, and none where a run is missing."""
    theirs, ours = next(iter(AGAINST.items()))
    found = record()
    found["results"] = [row for row in found["results"] if row["format"] in ("fp32", ours)]
    for lr, values in {0.1: (1.0, 1.0, 1.3), 0.3: (3.0, 3.0, 3.0)}.items():
        for seed, loss in enumerate(values):
            row = {"format": theirs, "lr": lr, "seed": seed, "val_loss": loss, "bits": 8.0}
            found["results"].append(row)
    assert quality.versus(record()) == []
    (row,) = quality.versus(found)
    assert (row["format"], row["ours"], row["seeds"]) == (theirs, ours, 3)
    assert row["difference"] == pytest.approx(0)  # -0.1, 0.3, -0.2
    assert row["half"] == pytest.approx(4.303 * math.sqrt(0.07) / math.sqrt(3), rel=1e-3)


def test_by_rate():
    found = quality.by_rate(record())
    assert found["Budget 3.5"] == {0.1: (-0.5, None)}
    assert found["Budget 5.0"][0.1] == pytest.approx((-1, 0.248), abs=1e-3)  # -1.1, -0.9, -1
    assert found["Budget 5.0"][0.3] == (math.inf, None)


def test_plan():
    """Every format is tried at every rate; those that are compared have more seeds, each at its own
    best rate; questions are asked at that of float32. Resumed, the plan is the same."""
    best = dict(zip(MATRIX, quality.LEARNING_RATES * len(MATRIX), strict=False))
    args = Namespace(formats=None, seeds=2, more=3, questions=4)
    rows, runs = [], []
    for name, lr, seed in quality.plan("gpt", args, rows):
        runs.append((name, lr, seed))
        loss = 1.0 + (lr != best.get(name, lr)) + 0.1 * seed
        rows.append({"format": name, "lr": lr, "seed": seed, "val_loss": loss, "bits": 5.0})
    assert max(Counter(runs).values()) == 1
    assert runs == list(quality.plan("gpt", args, rows))

    matrix = {
        (name, lr, seed) for name in MATRIX for lr in quality.LEARNING_RATES for seed in (0, 1)
    }
    more = {(name, best[name], seed) for name in quality.CLOSE for seed in (2, 3, 4)}
    asked = {
        (name, best["fp32"], seed)
        for question, names in QUESTIONS.items()
        for name in names
        for seed in range(5 if question in FINE else 4)
    }
    assert set(runs) == matrix | more | asked
    assert set(quality.plan("vit", args, rows)) == matrix | more


def test_answers():
    found = record()
    name = next(iter(QUESTIONS["b1"]))
    row = {"format": name, "lr": 0.3, "seed": 0, "val_loss": 1.5, "bits": 5.0}
    found["results"] += [row, {**row, "lr": 0.1, "seed": 1}]
    assert quality.answers(found) == {
        "b1": [{"format": name, "difference": 0.5, "half": None, "seeds": 1}]
    }


def test_gain():
    """Of updates that are 0.9 of the exact ones, plus as much of something orthogonal."""
    step = lambda state, g, t: ({"x": jnp.stack([0.9 * g["x"][0], 0.9 * g["x"][0]])}, state)  # noqa: E731
    exact = {"x": np.tile([1.0, 0.0], (500, 1)).astype(np.float32)}
    for span in gain.spans(gain.sums(step, 0, exact, exact)):
        assert span["gain"] == pytest.approx(0.9) and span["error"] == pytest.approx(0.01 + 0.81)
