"""Train a small CLIP, images and text: with fp32 `optax.adamw`, then `stquant.adamw` at 5 and 3.5.

    pip install '.[benchmarks]'  # scikit-learn, which brings the digits
    python -m examples.train_clip --steps 500 --bits 5.0 3.5 --json train_clip.json

Takes about three minutes on two cores. Expect states of 5/32 and 3.5/32 the bytes, and that most of
256 held-out scenes find their own caption. `train_clip.png` shows the losses.

A scene is two of scikit-learn's handwritten digits on a canvas, each of one of seven colours, dim
or bright; its caption says so: "dim red seven above bright blue three". There are 39,200 captions.
Two scenes of a batch seldom have the same one, and if they have, either caption is right for both,
in the loss as in the accuracy. Every sixth digit is held out, and only those validate.

All runs start from the same weights and see the same scenes; only the optimizer differs.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stquant_jax as stquant
from examples.train_vit import (
    Block,
    Patches,
    Task,
    flag,
    load_digits,
    save_plot,
    show_table,
    train,
    waves,
)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = flag(500, "training steps of each run")
    bits: tuple[float, ...] = flag(
        (5.0, 3.5), "all-in bits per element of optimizer state, a run for each", nargs="+"
    )
    interval: int = flag(50, "steps between two moves of bits")
    lr: float = flag(3e-3, "peak learning rate")
    weight_decay: float = flag(0.1, "decoupled weight decay")
    batch: int = flag(128, "pairs of image and caption per step")
    layers: int = flag(2, "transformer blocks of each tower")
    features: int = flag(96, "width of the residual streams, and of what is compared")
    heads: int = flag(4, "attention heads")
    seed: int = flag(0, "seed of the weights and of the order of the data")


Batch = tuple[Any, Any]

# --- data: scenes of two digits, and their captions ---

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
COLOURS |= {"magenta": (1, 0, 1), "cyan": (0, 1, 1), "white": (1, 1, 1)}
BRIGHTNESS = {"dim": 0.5, "bright": 1.0}
DIGITS = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
# Quadrants of the first and of the second digit, numbered as one reads.
PLACES = {"left-of": ((0, 1), (2, 3)), "above": ((0, 2), (1, 3))}
WORDS = *DIGITS, *COLOURS, *BRIGHTNESS, *PLACES
ZERO, RED, DIM, LEFT = (WORDS.index(word) for word in ("zero", "red", "dim", "left-of"))
VOCABULARY = 64  # rows of the embedding: the words, rounded up as is usual
LENGTH = 7  # words of a caption
SIDE = 8  # pixels of a digit
VALIDATION = 256  # scenes


def load_data() -> tuple[Batch, Batch]:
    """Digits uint8[n, 8, 8, 1] and labels to make scenes of, and a batch of scenes of others."""
    train, held_out = load_digits()
    valid = jax.jit(compose, static_argnums=0)(VALIDATION, held_out, jax.random.key(0))
    images, captions = jax.device_get(valid)
    return train, (images, captions)


def compose(count: int, digits: Batch, key: jax.Array) -> Batch:
    """Random scenes: images float32[count, 16, 16, 3] of 0 to 1, captions int32[count, 7]."""
    images, labels = digits
    keys = jax.random.split(key, 5)
    which = jax.random.randint(keys[0], (count, 2), 0, len(labels))
    colour = jax.random.randint(keys[1], (count, 2), 0, len(COLOURS))
    bright = jax.random.randint(keys[2], (count, 2), 0, len(BRIGHTNESS))
    place = jax.random.randint(keys[3], (count,), 0, len(PLACES))
    where = jax.random.randint(keys[4], (count,), 0, 2)
    ink = jnp.asarray(list(COLOURS.values()))[colour]
    ink = ink * jnp.asarray(list(BRIGHTNESS.values()))[bright][..., None]
    drawn = images[which] / 255 * ink[:, :, None, None]
    quadrants = jnp.asarray(list(PLACES.values()))[place, where]
    canvas = jnp.zeros((count, 4, SIDE, SIDE, 3))
    canvas = canvas.at[jnp.arange(count)[:, None], quadrants].set(drawn)
    canvas = canvas.reshape(count, 2, 2, SIDE, SIDE, 3).transpose(0, 1, 3, 2, 4, 5)
    words = jnp.stack([DIM + bright, RED + colour, ZERO + labels[which]], axis=2)
    words = [words[:, 0], LEFT + place[:, None], words[:, 1]]
    return canvas.reshape(count, 2 * SIDE, 2 * SIDE, 3), jnp.concatenate(words, axis=1)


def sample(cfg: Config, train: Batch, key: jax.Array) -> Batch:
    return compose(cfg.batch, train, key)


def caption(words: np.ndarray) -> str:
    return " ".join(WORDS[word] for word in words)


# --- model: two towers, whose unit vectors are compared (arXiv:2103.00020) ---

PATCH = 4  # pixels


class Tower(nnx.Module):
    """Tokens [batch, length, features], their positions in them -> unit vectors."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d = cfg.features
        self.blocks = nnx.List([Block(d, cfg.heads, cfg.layers, rngs) for _ in range(cfg.layers)])
        self.norm = nnx.LayerNorm(d, use_bias=False, rngs=rngs)
        self.project = nnx.Linear(d, d, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        x = self.project(self.norm(x).mean(axis=1))
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


class CLIP(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d = cfg.features
        if d % 4 or d % cfg.heads:
            raise ValueError(f"features={d} must be a multiple of 4 and of heads={cfg.heads}")
        self.patches = Patches(PATCH, 3, d, rngs)
        self.words = nnx.Embed(
            VOCABULARY, d, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        self.image_tower = Tower(cfg, rngs)
        self.text_tower = Tower(cfg, rngs)
        self.log_scale = nnx.Param(jnp.log(1 / 0.07))  # of the logits: the inverse temperature

    def __call__(self, images: jax.Array, captions: jax.Array) -> jax.Array:
        """Logits [image, caption]."""
        x = self.image_tower(self.patches(2 * images - 1))
        y = self.text_tower(self.words(captions) + waves(LENGTH, self.words.features))
        return jnp.minimum(jnp.exp(self.log_scale[...]), 100) * x @ y.T


def alike(captions: jax.Array) -> jax.Array:
    """bool[n, n]: which captions are equal, always those on the diagonal."""
    return (jnp.asarray(captions)[:, None] == captions).all(axis=2)


def loss_of(graph: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
    """Mean of both directions' cross-entropy, nats per pair."""
    images, captions = batch
    logits = nnx.merge(graph, params)(images, captions)
    right = alike(captions)
    right = right / right.sum(axis=1)
    both = [optax.softmax_cross_entropy(x, right).mean() for x in (logits, logits.T)]
    return (both[0] + both[1]) / 2


def accuracy_of(graph: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
    """How often the nearest caption is the image's, and the other way round; mean of both."""
    images, captions = batch
    logits, right = nnx.merge(graph, params)(images, captions), alike(captions)
    rows = jnp.arange(len(captions))
    return jnp.stack([right[rows, x.argmax(1)] for x in (logits, logits.T)]).mean()


# --- the runs side by side ---


def parse() -> tuple[Config, Path, Path | None]:
    parser = argparse.ArgumentParser(
        description="Train a small CLIP with optax.adamw, then with stquant.adamw.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        default: Any = field.default
        kind = type(default[0] if isinstance(default, tuple) else default)
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=default, type=kind, **field.metadata)
    plot = Path("train_clip.png")
    parser.add_argument("--plot", type=Path, default=plot, help="file for all loss curves")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    flags = vars(parser.parse_args())
    files = [flags.pop(name) for name in ("plot", "json")]
    return Config(**flags), *files


def main() -> None:
    cfg, plot_file, json_file = parse()
    data = load_data()
    (images, _), (scenes, captions) = data
    about = {"digits": len(images), "validation_scenes": len(scenes)}
    print(f"{len(images)} digits to train on; of the others {len(scenes)} scenes, such as")
    print(f'"{caption(captions[0])}"')

    task = Task(lambda: CLIP(cfg, nnx.Rngs(cfg.seed)), sample, loss_of, accuracy_of)
    runs = {"optax.adamw": train(cfg, "optax.adamw", task, data)}
    for bits in cfg.bits:
        name, precision = f"stquant.adamw {bits} bits", stquant.Budget(bits, interval=cfg.interval)
        runs[name] = train(cfg, name, task, data, stquant.adamw, precision)

    show_table(cfg.steps, runs)
    save_plot(plot_file, runs, "pair")
    print(f"loss curves: {plot_file}")
    if json_file:
        about |= {"config": dataclasses.asdict(cfg), "python": platform.python_version()}
        about |= {"jax": jax.__version__, "optax": optax.__version__, "cores": os.cpu_count()}
        about |= {"device": jax.devices()[0].device_kind, "date": str(datetime.date.today())}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(about | runs))


if __name__ == "__main__":
    main()
