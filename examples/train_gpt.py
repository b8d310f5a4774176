"""Train a byte-level GPT: with fp32 `optax.adamw`, then with `stquant.adamw` at 5 and at 3.5 bits.

    python examples/train_gpt.py --steps 500 --bits 5.0 3.5 --json train_gpt.json

Takes about three minutes on two cores. Expect a validation loss near 1.70 nats per byte and states
of 0.156 (5/32) and 0.109 (3.5/32) the bytes. `--seeds 3` adds fp32 runs: the noise between seeds.
`train_gpt_widths.png` shows how the narrowest run moved its bits between layers. `--preset gpt2`
is GPT-2 small, for a GPU; `--words 50257` reads words, not bytes, by `pip install tokenizers`.

The text is the standard library of the Python that runs this file, so nothing is downloaded. All
runs start from the same weights and see the same bytes; only the optimizer differs.
"""

import argparse
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


POLICIES = "budget", "fixed", "stquant"
# (bits of m, of v) -> b1: the authors' own, and what their rule gives from 0.9 at 5 bits
SOLO_BITS = {(4, 2): 0.8, (2, 2): stquant.solo_momentum(2, reference_bits=5)}


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = flag(500, "training steps of each run")
    bits: tuple[float, ...] = flag(
        (5.0, 3.5), "all-in bits per element of optimizer state, a run for each", nargs="+"
    )
    policy: str = flag("budget", "who moves the bits; fixed: nobody", choices=POLICIES)
    interval: int = flag(50, "steps between two moves")
    solo: bool = flag(False, "also train with SOLO at 4/2 and 2/2 bits", action="store_true")
    lr: float = flag(3e-3, "peak learning rate")
    weight_decay: float = flag(0.1, "decoupled weight decay")
    batch: int = flag(8, "sequences per step")
    length: int = flag(128, "bytes per sequence")
    layers: int = flag(5, "transformer blocks")
    features: int = flag(128, "width of the residual stream")
    heads: int = flag(4, "attention heads")
    words: int = flag(256, "vocabulary: bytes, or pairs of them merged by `tokenizers`")
    dtype: str = flag("float32", "of the arithmetic", choices=("float32", "bfloat16"))
    seed: int = flag(0, "seed of the weights and of the order of the data")
    seeds: int = flag(1, "fp32 runs, each from its own seed, to show the noise between seeds")


# What --preset changes. GPT-2 small, for a GPU: 86 million parameters with bytes, 163 with 50257
# words, as the head has a matrix of its own here.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "gpt2": {"layers": 12, "features": 768, "heads": 12, "length": 1024, "batch": 16}
    | {"dtype": "bfloat16", "lr": 6e-4, "steps": 3000, "interval": 100},
}


# --- data: the standard library, byte by byte ---

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
EXCLUDED |= {"encodings", "pydoc_data"}  # tables, not prose


def load_corpus(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of all sources under `root`: (15 of 16 files to train on, the others to validate)."""
    sources = {path.relative_to(root): path for path in root.rglob("*.py")}
    parts: tuple[list[bytes], list[bytes]] = [], []
    for name in sorted(sources):
        if EXCLUDED.isdisjoint(name.parent.parts):
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 16
            parts[held_out].append(sources[name].read_bytes())
    train, valid = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
    if not (train.size and valid.size):
        raise SystemExit(
            f"no Python sources under {root}: this Python ships its standard library without them; "
            "run with another one, e.g. `make demo PYTHON=/path/to/python3`"
        )
    return train, valid


def in_words(corpus: tuple[np.ndarray, np.ndarray], words: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes as they are; or the words of a byte-pair encoding that is made of the first part."""
    if words == 256:
        return corpus
    try:
        from tokenizers import ByteLevelBPETokenizer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"--words {words} needs `pip install tokenizers`: {error}") from error
    texts = [part.tobytes().decode("utf-8", "replace") for part in corpus]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[0].splitlines(keepends=True), vocab_size=words)
    if tokenizer.get_vocab_size() != words:
        raise SystemExit(f"--words {words}: the text gives {tokenizer.get_vocab_size()}")
    kind = np.uint16 if words <= 2**16 else np.int32
    lines = (tokenizer.encode_batch(text.splitlines(keepends=True)) for text in texts)
    train, valid = (np.concatenate([np.array(line.ids, kind) for line in part]) for part in lines)
    return train, valid


# --- model: GPT-2 with rotary positions ---


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of x[batch, length, head, feature] (arXiv:2104.09864)."""
    speeds = 1e4 ** -jnp.linspace(0, 1, x.shape[3] // 2)
    angles = jnp.arange(x.shape[1])[:, None, None] * speeds
    a, b = jnp.split(x, 2, axis=3)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=3).astype(x.dtype)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d = cfg.features
        small = nnx.initializers.normal(0.02 / (2 * cfg.layers) ** 0.5)
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=cfg.dtype, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, use_bias=False, dtype=cfg.dtype, rngs=rngs)
        self.heads = cfg.heads
        self.norm1 = norm(d)
        self.qkv = linear(d, 3 * d)
        self.out = linear(d, d, kernel_init=small)
        self.norm2 = norm(d)
        self.up = linear(d, 4 * d)
        self.down = linear(4 * d, d, kernel_init=small)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, d // self.heads)
        q, k, v = jnp.unstack(qkv, axis=2)
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(cfg.words, cfg.features, dtype=cfg.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(cfg, rngs) for _ in range(cfg.layers)])
        self.norm = nnx.LayerNorm(cfg.features, use_bias=False, dtype=cfg.dtype, rngs=rngs)
        self.head = nnx.Linear(cfg.features, cfg.words, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(graph: nnx.GraphDef, params: nnx.State, text: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per byte, of `text` uint8[batch, length + 1]."""
    logits = nnx.merge(graph, params)(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


# --- training ---

CHUNK = 10  # steps per dispatch at most, and between two lines of telemetry
VALIDATION = 512  # sequences


def windows(text: np.ndarray | jax.Array, starts: Any, length: int) -> Any:
    return text[starts[:, None] + np.arange(length + 1)]


def sample(cfg: Any, text: jax.Array, key: jax.Array) -> jax.Array:
    """A batch to train on, [batch, length + 1]."""
    starts = jax.random.randint(key, (cfg.batch,), 0, text.size - cfg.length)
    return windows(text, starts, cfg.length)


def validation(cfg: Any, held_out: np.ndarray) -> np.ndarray:
    """The same windows for every run, spread over all of the text."""
    starts = np.linspace(0, held_out.size - cfg.length - 1, VALIDATION).astype(int)
    return windows(held_out, starts, cfg.length)


def validate(cfg: Config, graph: nnx.GraphDef, params: nnx.State, valid: jax.Array) -> jax.Array:
    """Mean loss of many sequences, as many at a time as in training."""
    parts = valid.reshape(-1, math.gcd(len(valid), cfg.batch), *valid.shape[1:])
    return jax.lax.map(functools.partial(loss_of, graph, params), parts).mean()


def policy_for(cfg: Config, bits: float) -> stquant.Policy:
    if cfg.policy == "stquant":
        return stquant.STQuant(bits=bits, interval=cfg.interval)
    return stquant.Budget(bits, interval=None if cfg.policy == "fixed" else cfg.interval)


def train(
    cfg: Config,
    name: str,
    corpus: tuple[np.ndarray, np.ndarray],
    seed: int,
    adamw: Callable[..., optax.GradientTransformation] = optax.adamw,
    precision: stquant.Policy | None = None,
    heatmap: Path | None = None,
) -> dict[str, Any]:
    """One run, of stquant with a policy: losses, bytes of optimizer state, widths over time."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.lr, cfg.steps // 10, cfg.steps)
    options = {"precision": precision} if precision else {}
    optimizer = adamw(schedule, weight_decay=cfg.weight_decay, **options)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    graph, params = nnx.split(GPT(cfg, nnx.Rngs(seed)))
    opt_state = tx.init(params)
    text, held_out = corpus

    def step(carry, key, text):
        params, opt_state = carry
        batch = sample(cfg, text, key)
        loss, grads = jax.value_and_grad(functools.partial(loss_of, graph))(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def train_chunk(carry, keys, text):
        carry, losses = jax.lax.scan(functools.partial(step, text=text), carry, keys)
        return carry, losses, stquant.metrics(carry[1]) if precision else {}

    carry, text = (params, opt_state), jnp.asarray(text)
    keys = jax.random.split(jax.random.key(seed), cfg.steps)
    chunk = math.gcd(cfg.steps, CHUNK)  # all of one length: one program
    losses, seconds, history = [], [], []
    with tqdm(total=cfg.steps, desc=name, unit="step") as bar:
        for first in range(0, cfg.steps, chunk):
            begin = time.perf_counter()
            carry, new, told = train_chunk(carry, keys[first : first + chunk], text)
            losses += np.asarray(new).tolist()  # waits for the device
            seconds.append((time.perf_counter() - begin) / chunk)
            history.append(jax.device_get(told))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update(chunk)
    params, opt_state = carry

    valid = validation(cfg, held_out)
    run = {
        "val_loss": float(jax.jit(functools.partial(validate, cfg, graph))(params, valid)),
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(opt_state)),
        "params": sum(x.size for x in jax.tree.leaves(params)),
        "seconds_per_step": statistics.median(seconds[1:] or seconds),  # the first one compiles
        "compilations": train_chunk._cache_size(),  # pyright: ignore[reportAttributeAccessIssue]
        "loss": losses,
    }
    if precision:
        report = stquant.report(opt_state, params, precision)
        run |= {"bits": report.bits, "slots": report.slots}
        run |= {key: [told[key].tolist() for told in history] for key in ("count", "widths")}
        if heatmap:
            report.plot(heatmap, history)
    return run


# --- the runs side by side ---


def show_table(cfg: Config, runs: dict[str, dict[str, Any]]) -> None:
    fp32 = runs["optax.adamw"]
    table = Table(title=f"{fp32['params']:,} parameters, {cfg.steps} steps, policy {cfg.policy}")
    table.add_column("optimizer", no_wrap=True)
    for heading in ("loss", "change", "bytes", "ratio", "s/step"):
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run['val_loss']:.4f}",
            f"{run['val_loss'] - fp32['val_loss']:+.4f}",
            f"{run['state_bytes']:,}",
            f"{run['state_bytes'] / fp32['state_bytes']:.4f}",
            f"{run['seconds_per_step']:.3f}",
        )
    Console().print(table)
    compiled = ", ".join(str(run["compilations"]) for run in runs.values())
    print(f"training steps compiled: {compiled} times")


def show_noise(runs: dict[str, dict[str, Any]], by_seed: list[float]) -> None:
    """Are the differences between the optimizers below that between two seeds of fp32?"""
    noise = statistics.mean(abs(a - b) for a, b in itertools.combinations(by_seed, 2))
    for name, run in runs.items():
        if "bits" in run:
            difference = abs(run["val_loss"] - runs["optax.adamw"]["val_loss"])
            verdict = "smaller" if difference < noise else "NOT smaller"
            print(f"{name}: {verdict} than the mean difference of two fp32 seeds, {noise:.4f}")


def save_plot(file: Path, runs: dict[str, dict[str, Any]], unit: str = "byte") -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        span = max(1, len(run["loss"]) // 20)  # running mean
        smooth = np.convolve(run["loss"], np.full(span, 1 / span), "valid")
        axes.plot(np.arange(span, span + smooth.size), smooth, label=name, alpha=0.8)
    axes.set(xlabel="step", ylabel=f"training loss, nats per {unit}")
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def parse() -> tuple[Config, Path, Path, Path | None]:
    parser = argparse.ArgumentParser(
        description="Train a byte-level GPT with optax.adamw, then with stquant.adamw.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        default: Any = field.default
        name = "--" + field.name.replace("_", "-")
        kind = {"type": type(default[0] if isinstance(default, tuple) else default)}
        kind = {} if "action" in field.metadata else kind
        parser.add_argument(name, default=default, **kind, **field.metadata)
    plot, heatmap = Path("train_gpt.png"), Path("train_gpt_widths.png")
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="other defaults")
    parser.add_argument("--plot", type=Path, default=plot, help="file for all loss curves")
    parser.add_argument("--heatmap", type=Path, default=heatmap, help="for the narrowest's widths")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.set_defaults(**PRESETS[parser.parse_known_args()[0].preset])
    flags = vars(parser.parse_args())
    del flags["preset"]
    files = [flags.pop(name) for name in ("plot", "heatmap", "json")]
    return Config(**flags), *files


def main() -> None:
    cfg, plot_file, heatmap_file, json_file = parse()
    corpus = load_corpus(Path(sysconfig.get_path("stdlib")))
    about = {"python": platform.python_version(), "corpus_bytes": sum(map(len, corpus))}
    print(f"standard library of Python {about['python']}: {about['corpus_bytes']:,} bytes")
    corpus = in_words(corpus, cfg.words)

    runs = {"optax.adamw": train(cfg, "optax.adamw", corpus, cfg.seed)}
    for bits in cfg.bits:
        name, precision = f"stquant.adamw {bits} bits", policy_for(cfg, bits)
        heatmap = heatmap_file if bits == min(cfg.bits) else None
        runs[name] = train(cfg, name, corpus, cfg.seed, stquant.adamw, precision, heatmap)
    for bits in SOLO_BITS if cfg.solo else ():
        name, b1 = "stquant.solo_adamw {}/{}".format(*bits), SOLO_BITS[bits]
        solo = functools.partial(stquant.solo_adamw, b1=b1, bits=bits)
        runs[name] = train(cfg, name, corpus, cfg.seed, solo)
    by_seed = [runs["optax.adamw"]["val_loss"]]
    for seed in range(cfg.seed + 1, cfg.seed + cfg.seeds):
        by_seed.append(train(cfg, f"optax.adamw, seed {seed}", corpus, seed)["val_loss"])

    show_table(cfg, runs)
    if cfg.seeds > 1:
        show_noise(runs, by_seed)
    save_plot(plot_file, runs, unit="byte" if cfg.words == 256 else "word")
    print(f"loss curves: {plot_file}, widths of the narrowest: {heatmap_file}")
    if json_file:
        about |= {"config": dataclasses.asdict(cfg), "val_loss_by_seed": by_seed}
        about |= {"jax": jax.__version__, "optax": optax.__version__, "cores": os.cpu_count()}
        about |= {"device": jax.devices()[0].device_kind, "date": str(datetime.date.today())}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(about | runs))


if __name__ == "__main__":
    main()
