"""Train a vision transformer: with fp32 `optax.adamw`, then with `stquant.adamw` at 5 and 3.5 bits.

    pip install '.[benchmarks]'  # scikit-learn, which brings the images
    python examples/train_vit.py --steps 1000 --bits 5.0 3.5 --json train_vit.json

Takes about three minutes on two cores. Expect over 95% of the held-out digits right, and states
of 5/32 and 3.5/32 the bytes. `train_vit.png` shows the losses.

The images are scikit-learn's handwritten digits, 1797 of 8x8 pixels, so nothing is downloaded.
Every sixth is held out; its writer is not, so this is no test of handwriting never seen before.
`--data` takes other images, in the layout of Keras's mnist.npz:

    python examples/train_vit.py --data mnist.npz --patch 4

All runs start from the same weights and see the same images; only the optimizer differs.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import os
import platform
import statistics
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant


def flag(default: Any, help: str, **options: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = flag(1000, "training steps of each run")
    bits: tuple[float, ...] = flag(
        (5.0, 3.5), "all-in bits per element of optimizer state, a run for each", nargs="+"
    )
    interval: int = flag(50, "steps between two moves of bits")
    lr: float = flag(1e-3, "peak learning rate")
    weight_decay: float = flag(0.1, "decoupled weight decay")
    batch: int = flag(64, "images per step")
    shift: int = flag(1, "pixels by which training images move at most, each way")
    patch: int = flag(2, "side of a patch, in pixels")
    layers: int = flag(2, "transformer blocks")
    features: int = flag(128, "width of the residual stream")
    heads: int = flag(4, "attention heads")
    seed: int = flag(0, "seed of the weights and of the order of the data")


Batch = tuple[Any, Any]  # images uint8[batch, height, width, channels], labels int32[batch]

# --- data: handwritten digits, or an .npz ---

HELD_OUT = 6  # one in so many digits validates
VALIDATION = 2048  # images at most, evenly spaced: they are one batch
KEYS = "x_train", "y_train", "x_test", "y_test"


def load_data(file: Path | None = None) -> tuple[Batch, Batch]:
    """Images and labels: all to train on, and at most `VALIDATION` others. Default: digits."""
    return load_npz(file) if file else load_digits()


def load_digits() -> tuple[Batch, Batch]:
    from sklearn import datasets  # not needed with --data

    digits: Any = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # were 0 to 16
    labels = digits.target.astype(np.int32)
    held_out = np.arange(len(labels)) % HELD_OUT == HELD_OUT - 1
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def load_npz(file: Path) -> tuple[Batch, Batch]:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"--data {file}: no such file, or not an .npz")
    with np.load(file) as arrays:
        missing = [key for key in KEYS if key not in arrays]
        if missing:
            raise ValueError(f"--data {file}: it lacks {missing}; it must hold {list(KEYS)}")
        x, y, x_test, y_test = (arrays[key] for key in KEYS)
    for images, labels, part in ((x, y, "train"), (x_test, y_test, "test")):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
            raise ValueError(
                f"--data {file}: x_{part} is {images.dtype}{list(images.shape)}; "
                "it must be uint8[n, height, width] or uint8[n, height, width, channels]"
            )
        if labels.dtype.kind not in "iu" or labels.size != len(images) or labels.min() < 0:
            raise ValueError(
                f"--data {file}: y_{part} is {labels.dtype}{list(labels.shape)}; "
                f"it must be {len(images)} integers from 0, one for each image of x_{part}"
            )
    if x.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"--data {file}: images of x_train are {list(x.shape[1:])}, "
            f"of x_test {list(x_test.shape[1:])}; they must be alike"
        )
    if y_test.max() > y.max():
        raise ValueError(f"--data {file}: y_test has {y_test.max()}, y_train at most {y.max()}")
    some = np.linspace(0, len(x_test) - 1, min(len(x_test), VALIDATION)).astype(int)
    pairs = (x, y), (x_test[some], y_test.reshape(-1)[some])
    train, valid = ((x.reshape(*x.shape[:3], -1), y.reshape(-1).astype(np.int32)) for x, y in pairs)
    return train, valid


def sample(cfg: Config, train: Batch, key: jax.Array) -> Batch:
    """Random images, each moved at random by up to `cfg.shift` pixels; what moves in is black."""
    images, labels = train
    which_key, shift_key = jax.random.split(key)
    which = jax.random.randint(which_key, (cfg.batch,), 0, len(labels))
    starts = jax.random.randint(shift_key, (cfg.batch, 2), 0, 2 * cfg.shift + 1)
    edge = (cfg.shift, cfg.shift)

    def move(image: jax.Array, start: jax.Array) -> jax.Array:
        padded = jnp.pad(image, (edge, edge, (0, 0)))
        return jax.lax.dynamic_slice(padded, (*start, 0), image.shape)

    return jax.vmap(move)(images[which], starts), labels[which]


# --- model: a plain ViT, with fixed positions and the mean of all patches (arXiv:2205.01580) ---


def waves(count: int, features: int) -> np.ndarray:
    """Sines and cosines of positions 0 to count - 1: float32[count, features]."""
    speeds = 10 ** -np.linspace(0, 1, features // 2)  # there are few positions
    angles = np.arange(count)[:, None] * speeds
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def check(cfg: Config, shape: tuple[int, ...]) -> None:
    if cfg.patch < 1 or shape[0] % cfg.patch or shape[1] % cfg.patch:
        raise ValueError(
            f"patch={cfg.patch} must divide the images' {shape[0]} x {shape[1]} pixels"
        )
    if cfg.features % 4 or cfg.features % cfg.heads:
        raise ValueError(f"features={cfg.features} must be a multiple of 4 and heads={cfg.heads}")
    if cfg.shift < 0:
        raise ValueError(f"shift={cfg.shift} must be 0 or more pixels")


class Block(nnx.Module):
    def __init__(self, d: int, heads: int, layers: int, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02 / (2 * layers) ** 0.5)
        self.heads = heads
        self.norm1 = nnx.LayerNorm(d, use_bias=False, rngs=rngs)
        self.qkv = nnx.Linear(d, 3 * d, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(d, d, use_bias=False, kernel_init=small, rngs=rngs)
        self.norm2 = nnx.LayerNorm(d, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(d, 4 * d, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * d, d, use_bias=False, kernel_init=small, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, d // self.heads)
        q, k, v = jnp.unstack(qkv, axis=2)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Patches(nnx.Module):
    """Images -> a vector of each patch: [batch, height / patch * width / patch, features]."""

    def __init__(self, patch: int, channels: int, features: int, rngs: nnx.Rngs):
        self.patch = patch
        self.linear = nnx.Linear(patch**2 * channels, features, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        x = images.reshape(batch, rows, p, columns, p, channels).transpose(0, 1, 3, 2, 4, 5)
        x = self.linear(x.reshape(batch, rows, columns, -1))
        down, right = jnp.split(x, 2, axis=3)  # half of the features tell the row
        half = down.shape[3]
        down, right = down + waves(rows, half)[:, None], right + waves(columns, half)
        return jnp.concatenate([down, right], axis=3).reshape(batch, rows * columns, -1)


class ViT(nnx.Module):
    def __init__(
        self,
        cfg: Config,
        rngs: nnx.Rngs,
        shape: tuple[int, ...] = (8, 8, 1),
        classes: int = 10,
    ):
        check(cfg, shape)
        size = cfg.features, cfg.heads, cfg.layers
        self.patches = Patches(cfg.patch, shape[2], cfg.features, rngs)
        self.blocks = nnx.List([Block(*size, rngs) for _ in range(cfg.layers)])
        self.norm = nnx.LayerNorm(cfg.features, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(cfg.features, classes, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patches(images.astype(jnp.float32) / 127.5 - 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def loss_of(graph: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
    """Mean cross-entropy, nats per image."""
    images, labels = batch
    logits = nnx.merge(graph, params)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy_of(graph: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
    images, labels = batch
    return (nnx.merge(graph, params)(images).argmax(1) == labels).mean()


# --- training ---

CHUNK = 10  # steps per dispatch at most


class Task(NamedTuple):
    """What is learned: a model, made anew for every run, and functions of its batches."""

    model: Callable[[], nnx.Module]
    sample: Callable[[Any, Any, jax.Array], Any]
    loss_of: Callable[[nnx.GraphDef, nnx.State, Any], jax.Array]
    accuracy_of: Callable[[nnx.GraphDef, nnx.State, Any], jax.Array]


def train(
    cfg: Any,
    name: str,
    task: Task,
    data: tuple[Any, Any],
    adamw: Callable[..., optax.GradientTransformation] = optax.adamw,
    precision: stquant.Policy | None = None,
) -> dict[str, Any]:
    """One run, of stquant with a policy: losses, accuracy, bytes of optimizer state."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.lr, cfg.steps // 10, cfg.steps)
    options = {"precision": precision} if precision else {}
    optimizer = adamw(schedule, weight_decay=cfg.weight_decay, **options)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    train_set, valid = data
    graph, params = nnx.split(task.model())

    def step(carry, key, train_set):
        params, opt_state = carry
        batch = task.sample(cfg, train_set, key)
        loss, grads = jax.value_and_grad(functools.partial(task.loss_of, graph))(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def train_chunk(carry, keys, train_set):
        return jax.lax.scan(functools.partial(step, train_set=train_set), carry, keys)

    carry, train_set = (params, tx.init(params)), jax.tree.map(jnp.asarray, train_set)
    keys = jax.random.split(jax.random.key(cfg.seed), cfg.steps)
    chunk = math.gcd(cfg.steps, CHUNK)  # all of one length: one program
    losses, seconds = [], []
    with tqdm(total=cfg.steps, desc=name, unit="step") as bar:
        for first in range(0, cfg.steps, chunk):
            begin = time.perf_counter()
            carry, new = train_chunk(carry, keys[first : first + chunk], train_set)
            losses += np.asarray(new).tolist()  # waits for the device
            seconds.append((time.perf_counter() - begin) / chunk)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update(chunk)
    params, opt_state = carry

    @jax.jit
    def validate(params, batch):
        return task.loss_of(graph, params, batch), task.accuracy_of(graph, params, batch)

    val_loss, accuracy = (float(x) for x in validate(params, valid))
    run = {
        "val_loss": val_loss,
        "accuracy": accuracy,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(opt_state)),
        "params": sum(x.size for x in jax.tree.leaves(params)),
        "seconds_per_step": statistics.median(seconds[1:] or seconds),  # the first one compiles
        "compilations": train_chunk._cache_size(),  # pyright: ignore[reportAttributeAccessIssue]
        "loss": losses,
    }
    if precision:
        run["bits"] = stquant.report(opt_state, params, precision).bits
    return run


# --- the runs side by side ---


def show_table(steps: int, runs: dict[str, dict[str, Any]]) -> None:
    fp32 = runs["optax.adamw"]
    table = Table("optimizer", title=f"{fp32['params']:,} parameters, {steps} steps")
    for heading in ("loss", "accuracy", "bytes", "ratio", "s/step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run['val_loss']:.4f}",
            f"{run['accuracy']:.2%}",
            f"{run['state_bytes']:,}",
            f"{run['state_bytes'] / fp32['state_bytes']:.4f}",
            f"{run['seconds_per_step']:.3f}",
        )
    Console().print(table)


def save_plot(file: Path, runs: dict[str, dict[str, Any]], unit: str) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        span = max(1, len(run["loss"]) // 20)  # running mean
        smooth = np.convolve(run["loss"], np.full(span, 1 / span), "valid")
        axes.plot(np.arange(span, span + smooth.size), smooth, label=name, alpha=0.8)
    axes.set(xlabel="step", ylabel=f"training loss, nats per {unit}", yscale="log")
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def parse() -> tuple[Config, Path | None, Path, Path | None]:
    parser = argparse.ArgumentParser(
        description="Train a vision transformer with optax.adamw, then with stquant.adamw.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        default: Any = field.default
        kind = type(default[0] if isinstance(default, tuple) else default)
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=default, type=kind, **field.metadata)
    parser.add_argument("--data", type=Path, help=f".npz with {', '.join(KEYS)}")
    plot = Path("train_vit.png")
    parser.add_argument("--plot", type=Path, default=plot, help="file for all loss curves")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    flags = vars(parser.parse_args())
    files = [flags.pop(name) for name in ("data", "plot", "json")]
    return Config(**flags), *files


def main() -> None:
    cfg, data_file, plot_file, json_file = parse()
    try:
        data = load_data(data_file)
        check(cfg, data[0][0].shape[1:])
    except ValueError as error:
        raise SystemExit(str(error)) from error
    (images, labels), (_, held_out) = data
    about = {"images": list(images.shape), "held_out": len(held_out)}
    print("{} images of {} x {} x {} to train on,".format(*images.shape), len(held_out), "held out")

    classes = int(labels.max()) + 1
    model = lambda: ViT(cfg, nnx.Rngs(cfg.seed), images.shape[1:], classes)  # noqa: E731
    task = Task(model, sample, loss_of, accuracy_of)
    runs = {"optax.adamw": train(cfg, "optax.adamw", task, data)}
    for bits in cfg.bits:
        name, precision = f"stquant.adamw {bits} bits", stquant.Budget(bits, interval=cfg.interval)
        runs[name] = train(cfg, name, task, data, stquant.adamw, precision)

    show_table(cfg.steps, runs)
    save_plot(plot_file, runs, "image")
    print(f"loss curves: {plot_file}")
    if json_file:
        about |= {"config": dataclasses.asdict(cfg), "python": platform.python_version()}
        about |= {"jax": jax.__version__, "optax": optax.__version__, "cores": os.cpu_count()}
        about |= {"device": jax.devices()[0].device_kind, "date": str(datetime.date.today())}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(about | runs))


if __name__ == "__main__":
    main()
