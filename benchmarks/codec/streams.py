"""Gradient streams: every gradient of a real training run, step by step.

A codec of optimizer state can only be judged in the closed loop, on the gradients that training
produces, in their order. This module trains two small models with `optax.adam`, records all their
gradients as float32 and keeps them as `.npz`; a third stream is drawn from a formula.

============= ======================================================================================
``gpt``       byte-level GPT, 2 layers of width 64, on the text of Python's standard library
``vit``       vision transformer, 2 layers of width 64, on scikit-learn's 8x8 digits, patches of 2x2
``synthetic`` ``g[t, i, j] = r_i c_j z[t, i, j]``, r and c log-normal, z Gaussian: scales that vary
              along both axes, so that no choice of groups gathers elements of one scale
============= ======================================================================================

Run ``python -m benchmarks.codec.streams`` to capture all of them and to see what they hold. Steps
are axis 0 of every array: leaf path -> float32[steps, *shape].
"""

import argparse
import sys
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

NAMES = ("gpt", "vit", "synthetic")
CACHE = Path(__file__).parents[1] / ".cache"
STEPS = 500
CHUNK = 50  # steps per call of the compiled training loop
LEARNING_RATE = 1e-3

WIDTH, DEPTH, HEADS = 64, 2, 4
CONTEXT, BATCH = 64, 16


class Block(nnx.Module):
    """Pre-norm transformer block: ``x += attention(norm(x)); x += mlp(norm(x))``."""

    def __init__(self, rngs: nnx.Rngs, causal: bool):
        self.causal = causal
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        heads = [a.reshape(*a.shape[:-1], HEADS, WIDTH // HEADS) for a in (q, k, v)]
        mixed = jax.nn.dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """Next-byte model: int[B, T] -> logits float[B, T, 256]."""

    def __init__(self, rngs: nnx.Rngs):
        self.token = nnx.Embed(256, WIDTH, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, causal=True) for _ in range(DEPTH)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.token(tokens) + self.position.embedding[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ViT(nnx.Module):
    """Digit classifier: float[B, 8, 8] -> logits float[B, 10], mean over the 16 patches."""

    def __init__(self, rngs: nnx.Rngs):
        self.patch = nnx.Linear(4, WIDTH, rngs=rngs)
        self.position = nnx.Embed(16, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, causal=False) for _ in range(DEPTH)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images):
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = self.patch(patches) + self.position.embedding[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def corpus() -> np.ndarray:
    """The text of the running Python's standard library: *.py in sorted order, as bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "encodings", "pydoc_data", "idlelib"}
    files = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    if not files:
        raise FileNotFoundError(f"no *.py under {root}: this Python has no library sources")
    return np.frombuffer(b"".join(p.read_bytes() for p in files), np.uint8)


def _gpt(key):
    text = jnp.asarray(corpus())

    def sample(key):
        start = jax.random.randint(key, (BATCH, 1), 0, len(text) - CONTEXT)
        window = text[start + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
        return window[:, :-1], window[:, 1:]

    return GPT(nnx.Rngs(params=key)), sample


def _vit(key):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = jnp.asarray(digits.images / 8 - 1, jnp.float32)
    labels = jnp.asarray(digits.target)

    def sample(key):
        chosen = jax.random.randint(key, (64,), 0, len(images))
        return images[chosen], labels[chosen]

    return ViT(nnx.Rngs(params=key)), sample


def _train(model, sample, key, steps: int, label: str) -> dict[str, np.ndarray]:
    """Trains with Adam at a constant rate; the gradients of all steps by leaf path."""
    graph, params = nnx.split(model, nnx.Param)
    tx = optax.adam(LEARNING_RATE, b1=0.9, b2=0.999)

    def loss(params, batch):
        logits = nnx.merge(graph, params)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, sample(key))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (value, grads)

    chunk = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    keys = jax.random.split(key, steps)
    carry, out = (params, tx.init(params)), {}
    with tqdm(total=steps, desc=label, file=sys.stderr) as bar:
        for start in range(0, steps, CHUNK):
            carry, (values, grads) = chunk(carry, keys[start : start + CHUNK])
            for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(grads)):
                name = ".".join(str(entry.key) for entry in path)
                out.setdefault(name, []).append(np.asarray(leaf, np.float32))
            bar.update(len(values))
            bar.set_postfix(loss=f"{values.mean():.3f}")
    return {name: np.concatenate(parts) for name, parts in out.items()}


def _synthetic(steps: int, seed: int) -> dict[str, np.ndarray]:
    """Independent Gaussian gradients whose scale is a product of a row's and a column's."""
    rng = np.random.default_rng(seed)
    out = {}
    for rows, cols in ((256, 128), (64, 256), (128, 160)):
        scale = np.exp(rng.normal(size=(rows, 1)) + rng.normal(size=(1, cols))) * 1e-3
        noise = rng.standard_normal((steps, rows, cols), np.float32)
        out[f"{rows}x{cols}"] = noise * scale.astype(np.float32)
    return out


def capture(name: str, steps: int = STEPS, seed: int = 0) -> dict[str, np.ndarray]:
    """Records a stream anew; the same `seed` on the same machine gives the same arrays."""
    if name == "synthetic":
        return _synthetic(steps, seed)
    if name not in NAMES:
        raise ValueError(f"stream {name!r} is unknown, expected one of {', '.join(NAMES)}")
    init, data = jax.random.split(jax.random.key(seed))
    model, sample = {"gpt": _gpt, "vit": _vit}[name](init)
    return _train(model, sample, data, steps, f"capture {name}")


def load(
    name: str, *, steps: int = STEPS, seed: int = 0, cache: Path = CACHE
) -> dict[str, np.ndarray]:
    """A stream by name, from `cache` where it was captured before: leaf path -> [steps, *shape].

    Args:
        name: one of `NAMES`.
        steps: length of the run, a multiple of 50.
        seed: of the initial parameters and of the order of the data.
        cache: folder for the files; it is made when it does not exist.
    """
    # The text changes with the Python version, the arithmetic with jax's: both are in the name.
    version = f"py{sys.version_info.major}{sys.version_info.minor}-jax{jax.__version__}"
    path = Path(cache) / f"{name}-{version}-steps{steps}-seed{seed}.npz"
    if not path.exists():
        stream = capture(name, steps, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")  # an interrupted run leaves no broken file
        np.savez(partial, **stream)
        partial.rename(path)
    with np.load(path) as stored:
        return {path: stored[path] for path in stored.files}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what measures on streams."""
    add = parser.add_argument
    add("--cache", type=Path, default=CACHE, help="folder of the captured streams")
    add("--min-size", type=int, default=4096, help="leave smaller leaves out")
    add("--seed", type=int, default=0, help="of the captured training runs")


def main():
    parser = argparse.ArgumentParser(description="Capture gradient streams and describe them.")
    parser.add_argument("--streams", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    for name in args.streams:
        stream = load(name, seed=args.seed, cache=args.cache)
        table = Table("leaf", "shape", "rms, first 50 steps", "rms, last 50 steps", title=name)
        for leaf, g in stream.items():
            rms = [f"{np.sqrt(np.mean(np.square(part))):.2e}" for part in (g[:50], g[-50:])]
            table.add_row(leaf, str(g.shape[1:]), *rms)
        elements = sum(g[0].size for g in stream.values())
        table.caption = f"{elements} elements, {sum(g.nbytes for g in stream.values()) >> 20} MiB"
        Console().print(table)


if __name__ == "__main__":
    main()
