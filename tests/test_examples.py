"""The examples with images: two steps of each, what they show the model, what they refuse."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples import train_clip, train_vit
from tests import common

ROOT = Path(__file__).parent.parent
SMALL = "--steps 2 --bits 5.0 --interval 1 --layers 1 --features 64 --batch 4".split()


def small(module):
    return dataclasses.replace(module.Config(), layers=1, features=64, batch=64)


def command(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *arguments, *SMALL],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "TQDM_DISABLE": "1"} | common.QUICK,
        capture_output=True,
        text=True,
        check=False,
    )


def check(run, folder):
    """Losses alike, one program a run, every number in its place."""
    assert run.returncode == 0, run.stderr
    record = json.loads((folder / "run.json").read_text())
    theirs, ours = record["optax.adamw"], record["stquant.adamw 5.0 bits"]
    for x in (theirs, ours):
        assert len(x["loss"]) == 2
        assert x["compilations"] == 1
        assert 0 <= x["accuracy"] <= 1
        assert np.isfinite(x["val_loss"])
    assert ours["params"] == theirs["params"]
    assert ours["loss"][0] == theirs["loss"][0]
    assert abs(ours["val_loss"] - theirs["val_loss"]) < 0.1
    assert ours["bits"] <= 5 and ours["state_bytes"] <= 5 / 32 * theirs["state_bytes"]
    assert (folder / "losses.png").stat().st_size > 1000
    assert "accuracy" in run.stdout and "stquant.adamw" in run.stdout


@pytest.mark.thorough
def test_train_vit(tmp_path):
    program = ROOT / "examples" / "train_vit.py"
    check(command(program, "--json", "run.json", "--plot", "losses.png", cwd=tmp_path), tmp_path)


@pytest.mark.thorough
def test_train_clip(tmp_path):
    files = "--json", tmp_path / "run.json", "--plot", tmp_path / "losses.png"
    check(command("-m", "examples.train_clip", *files), tmp_path)


@pytest.mark.parametrize("module", [train_vit, train_clip], ids=["vit", "clip"])
def test_held_out(module):
    """No image that validates is trained on."""
    digits, others = train_vit.load_data()
    trained, held_out = ({image.tobytes() for image in images} for images, _ in (digits, others))
    assert len(trained) + len(held_out) == 1797 and not trained & held_out
    train, valid = module.load_data()
    for got, want in zip(train, digits, strict=True):
        np.testing.assert_array_equal(got, want)
    images = valid[0] if module is train_vit else (digit for digit, *_ in drawn(valid))
    assert {image.tobytes() for image in images} <= held_out


# --- the ViT's images ---


def test_shifts():
    """Each sample is an image of the data, moved by at most `shift` pixels, with its label."""
    cfg = small(train_vit)
    (images, labels), _ = train_vit.load_data()
    few = images[:10], labels[:10]
    batch = jax.jit(train_vit.sample, static_argnums=0)(cfg, few, jax.random.key(1))
    padded = np.pad(few[0], ((0, 0), (1, 1), (1, 1), (0, 0)))
    moved = {
        (padded[i, y : y + 8, x : x + 8].tobytes(), int(few[1][i]))
        for i in range(10) for y in range(3) for x in range(3)
    }  # fmt: skip
    got = {
        (image.tobytes(), int(label)) for image, label in zip(*jax.device_get(batch), strict=True)
    }
    assert got <= moved
    assert len(got) > 20


def arrays(**changes):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (9, 6, 4, 3), np.uint8)
    labels = np.arange(9, dtype=np.uint8)[:, None] % 3  # a column, as CIFAR's
    whole = dict(zip(train_vit.KEYS, (images, labels, images[:3], labels[:3]), strict=True))
    return {key: value for key, value in (whole | changes).items() if value is not None}


def test_npz(tmp_path):
    file = tmp_path / "images.npz"
    np.savez(file, **arrays())
    train, valid = train_vit.load_data(file)
    assert train[0].shape == (9, 6, 4, 3) and valid[0].shape == (3, 6, 4, 3)
    np.testing.assert_array_equal(train[1], np.arange(9) % 3)
    cfg = small(train_vit)
    graph, params = nnx.split(train_vit.ViT(cfg, nnx.Rngs(0), (6, 4, 3), classes=3))
    assert abs(train_vit.loss_of(graph, params, valid) - np.log(3)) < 1.5
    np.savez(file, **{key: x[..., 0] for key, x in arrays().items()})
    assert train_vit.load_data(file)[0][0].shape == (9, 6, 4, 1)  # grey


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"lacks \['y_test'\].*must hold"),
        ({"x_train": np.zeros((9, 6, 4))}, r"x_train is float64\[9, 6, 4\].*must be uint8"),
        ({"x_test": np.zeros((3, 24), np.uint8)}, r"x_test is uint8\[3, 24\].*must be uint8"),
        ({"y_train": np.zeros(8, int)}, r"y_train is int64\[8\].*must be 9 integers"),
        ({"x_test": np.zeros((3, 4, 4, 3), np.uint8)}, r"\[6, 4, 3\].*x_test \[4, 4, 3\]"),
        ({"y_test": np.full(3, 7)}, "y_test has 7, y_train at most 2"),
    ],
    ids=["key", "floats", "flat", "labels", "sizes", "classes"],
)
def test_bad_npz(tmp_path, changes, message):
    file = tmp_path / "images.npz"
    np.savez(file, **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        train_vit.load_data(file)


def test_no_npz(tmp_path):
    (tmp_path / "images.npz").write_text("no archive")
    for file in (tmp_path / "images.npz", tmp_path / "nothing.npz"):
        with pytest.raises(ValueError, match="no such file, or not an .npz"):
            train_vit.load_data(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"patch": 3}, "patch=3 must divide"), ({"heads": 5}, "features=64.*heads=5"),
     ({"shift": -1}, "shift=-1")],
)  # fmt: skip
def test_bad_sizes(change, message):
    cfg = dataclasses.replace(small(train_vit), **change)
    with pytest.raises(ValueError, match=message):
        train_vit.ViT(cfg, nnx.Rngs(0))


# --- CLIP's scenes ---


def drawn(batch):
    """Of each quadrant that is not black: (pixels, brightness, colour, scene, quadrant)."""
    for scene, image in enumerate(np.asarray(batch[0])):
        for quadrant in range(4):
            row, column = divmod(quadrant, 2)
            part = image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            if not part.any():
                continue
            colour = tuple((part.max((0, 1)) > 0).astype(int).tolist())
            (name,) = (name for name, value in train_clip.COLOURS.items() if value == colour)
            brightness = "bright" if part.max() > 0.5 else "dim"
            pixels = part.max(2) / train_clip.BRIGHTNESS[brightness]
            digit = np.round(255 * pixels).astype(np.uint8)[..., None]
            yield digit, brightness, name, scene, quadrant


def test_scenes():
    """The caption tells what is in the image."""
    digits, _ = train_vit.load_data()
    pairs = zip(*digits, strict=True)
    label_of = {image.tobytes(): train_clip.DIGITS[label] for image, label in pairs}
    batch = train_clip.sample(
        small(train_clip), jax.tree.map(jnp.asarray, digits), jax.random.key(2)
    )
    seen = {}
    for pixels, *words, scene, quadrant in drawn(batch):
        seen.setdefault(scene, []).append((quadrant, [*words, label_of[pixels.tobytes()]]))
    assert len(seen) == 64
    for scene, (one, two) in seen.items():
        place = "left-of" if two[0] - one[0] == 1 else "above"
        assert (one[0], two[0]) in train_clip.PLACES[place]
        want = " ".join([*one[1], place, *two[1]])
        assert train_clip.caption(np.asarray(batch[1][scene])) == want


def test_equal_captions():
    """Of two scenes with one caption each is as right for the other, in the loss and accuracy."""
    cfg = small(train_clip)
    graph, params = nnx.split(train_clip.CLIP(cfg, nnx.Rngs(0)))
    _, (images, captions) = train_clip.load_data()
    captions = captions[[0, 1, 0, 2, 3, 0]]
    batch = images[: len(captions)], captions
    names = [train_clip.caption(words) for words in captions]
    logits = np.asarray(nnx.merge(graph, params)(*batch), np.float64)
    losses, hits = [], []
    for table in (logits, logits.T):
        for row, name in zip(table, names, strict=True):
            right = [i for i, other in enumerate(names) if other == name]
            losses.append(np.log(np.exp(row).sum()) - row[right].mean())
            hits.append(row.argmax() in right)
    np.testing.assert_allclose(train_clip.loss_of(graph, params, batch), np.mean(losses), rtol=1e-4)
    assert abs(train_clip.accuracy_of(graph, params, batch) - np.mean(hits)) < 1e-6


def test_temperature():
    """Logits of unit vectors are cosines times a scale that stops at 100."""
    model = train_clip.CLIP(small(train_clip), nnx.Rngs(0))
    _, (images, captions) = train_clip.load_data()
    cosines = model(images[:4], captions[:4]) * 0.07
    assert jnp.abs(cosines).max() <= 1 + 1e-5
    model.log_scale[...] = jnp.float32(9.0)
    np.testing.assert_allclose(model(images[:4], captions[:4]), 100 * cosines, rtol=1e-3, atol=1e-3)


def test_clip_sizes():
    cfg = dataclasses.replace(small(train_clip), heads=5)
    with pytest.raises(ValueError, match="features=64.*heads=5"):
        train_clip.CLIP(cfg, nnx.Rngs(0))
