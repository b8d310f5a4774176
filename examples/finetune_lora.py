"""Fine-tune low-rank adapters of a frozen GPT: with `optax.adamw`, then with `stquant.adamw`.

    python -m examples.finetune_lora --rank 16 --bits 5.0 --json finetune_lora.json

Takes some minutes on two cores, a third of it to train the base: the byte-level GPT of
`examples/train_gpt.py`, on the sources of Python's standard library. Orbax saves the base, and the
next run with the same options goes on from there. The adapters learn another kind of text that
every Python ships, the language reference as `help` shows it, so nothing is downloaded. Expect its
loss to fall by more than half a nat per byte, and no byte of optimizer state for the base.

Most of the memory LoRA saves already; stquant takes 5/32 of what is left, and the table says how
little that is. Leaves of fewer than 4096 elements stay in float32 unless `Storage(min_size=...)`
says otherwise, and a smaller leaf that is packed still takes a whole tile of 4096. One layer's A of
128 x 16 is half a tile. So the adapters of all layers are stacked to [layers, in, rank], as they
are where layers run under `lax.scan`: here two whole tiles. The first table has the alternatives.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
import re
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks._io import environment, write_json
from examples import train_gpt as gpt
from examples.train_gpt import flag


@dataclasses.dataclass(frozen=True)
class Config:
    pretrain: int = flag(400, "training steps of the base")
    steps: int = flag(300, "training steps of the adapters, with each optimizer")
    rank: int = flag(16, "of the adapters")
    bits: float = flag(5.0, "all-in bits per element of the adapters' optimizer state")
    interval: int = flag(50, "steps between two moves of bits")
    lr: float = flag(3e-3, "peak learning rate")
    batch: int = flag(8, "sequences per step")
    length: int = flag(128, "bytes per sequence")
    layers: int = flag(4, "transformer blocks")
    features: int = flag(128, "width of the residual stream")
    seed: int = flag(0, "seed of the weights and of the order of the data")
    base: str = flag("finetune_lora_base", "folder for the base's checkpoint")

    def __post_init__(self):
        for name in ("pretrain", "steps", "rank"):
            if getattr(self, name) < 1:
                raise SystemExit(f"--{name} {getattr(self, name)}: expected a number of at least 1")


# --- adapters: for each kind of linear layer A[layers, in, rank] and B[layers, rank, out] ---


def init_lora(cfg: Config, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """B is zero, so that training starts from the base as it is."""
    d, n, r = cfg.features, cfg.layers, cfg.rank
    sides = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    keys = iter(jax.random.split(key, len(sides)))
    return {
        name: {
            "a": jax.random.normal(next(keys), (n, inner, r)) / inner**0.5,
            "b": jnp.zeros((n, r, outer)),
        }
        for name, (inner, outer) in sides.items()
    }


def adapted(params: dict[str, Any]) -> Any:
    """The base's weights, with A B added to the kernels of the linear layers."""

    def add(path: Any, weight: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        found = re.match(r"blocks\.(\d+)\.(\w+)\.kernel", name)
        if found is None:
            return weight
        layer, lora = int(found[1]), params["lora"][found[2]]
        return weight + lora["a"][layer] @ lora["b"][layer]

    return jax.tree_util.tree_map_with_path(add, params["base"])


def adapters_only(adamw: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.masked` alone would move the base by its raw gradients."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    labels = {"base": "frozen", "lora": "trained"}
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


# --- the adapters' text, and the base ---


def load_reference() -> tuple[np.ndarray, np.ndarray]:
    """Python's language reference: (7 of 8 topics to train on, the others to validate).

    Topics quote each other: paragraphs of those that are held out are no part of the others.
    """
    train, valid = {}, {}
    for name in sorted(topics):
        part = valid if hashlib.sha256(name.encode()).digest()[0] < 32 else train
        part |= dict.fromkeys(paragraph.strip() for paragraph in topics[name].split("\n\n"))
    train = [paragraph for paragraph in train if paragraph not in valid]
    first, second = (np.frombuffer("\n\n".join(x).encode(), np.uint8) for x in (train, valid))
    return first, second


OF_BASE = "layers", "features", "pretrain", "lr", "batch", "length", "seed"


def train_base(cfg: Config, loss_of: Callable, params: Any, text: np.ndarray) -> Any:
    """From the checkpoint, if the base was trained as it would be now."""
    options = {name: getattr(cfg, name) for name in OF_BASE}
    options["text"] = hashlib.sha256(text.tobytes()).hexdigest()
    folder, args = Path(cfg.base).absolute(), ocp.args
    if folder.exists() and not (folder / "options").exists():
        raise SystemExit(f"--base {cfg.base}: there is something else, expected another name")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        if folder.exists():
            what = args.Composite(options=args.JsonRestore())
            found = checkpointer.restore(folder, what)["options"]
            if found == options:
                print(f"base: {cfg.base}, trained before with the same options")
                what = args.Composite(weights=args.StandardRestore(params))
                return checkpointer.restore(folder, what)["weights"]
            differ = ", ".join(name for name in options if found.get(name) != options[name])
            print(f"base: {cfg.base} differs in {differ}; a new one will replace it")
        tx = optax.adamw(schedule(cfg, cfg.pretrain), weight_decay=0.1)
        tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
        params = fit(cfg, "base", loss_of, params, tx, text, cfg.pretrain)[0]
        what = {"options": args.JsonSave(options), "weights": args.StandardSave(params)}
        checkpointer.save(folder, args.Composite(**what), force=True)
    print(f"base: saved as {cfg.base}")
    return params


# --- training, of the base and of adapters alike ---


def schedule(cfg: Config, steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, cfg.lr, steps // 10, steps)


def fit(
    cfg: Config,
    name: str,
    loss_of: Callable,
    params: Any,
    tx: optax.GradientTransformation,
    text: np.ndarray,
    steps: int,
) -> tuple[Any, Any, dict[str, Any]]:
    """Parameters, the optimizer's state, and how it went."""

    def step(carry, key, text):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, gpt.sample(cfg, text, key))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def train_chunk(carry, keys, text):
        return jax.lax.scan(functools.partial(step, text=text), carry, keys)

    carry, on_device = (params, tx.init(params)), jnp.asarray(text)
    keys = jax.random.split(jax.random.key(cfg.seed), steps)
    chunk = math.gcd(steps, gpt.CHUNK)  # all of one length: one program
    losses, seconds = [], []
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for first in range(0, steps, chunk):
            begin = time.perf_counter()
            carry, new = train_chunk(carry, keys[first : first + chunk], on_device)
            losses += np.asarray(new).tolist()  # waits for the device
            seconds.append((time.perf_counter() - begin) / chunk)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update(chunk)
    params, state = carry
    return params, state, {"s/step": statistics.median(seconds[1:] or seconds), "loss": losses}


# --- what it takes, and what it gives ---


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compare_layouts(lora: Any, layers: int) -> dict[str, dict[str, Any]]:
    """What codes of the same widths take, with the adapters stacked over layers and not."""
    alone = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), lora)] * layers
    choices = {"stacked": (lora, 4096), "by layer": (alone, 4096)}
    choices["by layer, min_size=1024"] = alone, 1024
    layouts = {}
    for name, (tree, least) in choices.items():
        plan = stquant.plan(tree, stquant.Fixed(mu=5, nu=4), stquant.Storage(min_size=least))
        packed = sum(leaf.kind != "exact" for leaf in plan.leaves)
        layouts[name] = {"leaves": len(plan.leaves), "packed": packed}
        layouts[name] |= {"bytes": plan.total_bytes, "bits per element": plan.bits}
    return layouts


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    headings = dict.fromkeys(key for row in rows.values() for key in row if key != "loss")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        cells = [row.get(heading, "") for heading in headings]
        table.add_row(
            name, *(format(x, ".3f" if isinstance(x, float) else "," if x else "") for x in cells)
        )
    Console().print(table)


def parse() -> tuple[Config, Path, Path | None]:
    parser = argparse.ArgumentParser(
        description="Fine-tune low-rank adapters of a frozen GPT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        options = {"default": field.default, "type": type(field.default), **field.metadata}
        parser.add_argument(f"--{field.name}", **options)
    plot = Path("finetune_lora.png")
    parser.add_argument("--plot", type=Path, default=plot, help="file for the loss curves")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    flags = vars(parser.parse_args())
    files = flags.pop("plot"), flags.pop("json")
    return Config(**flags), *files


def main() -> None:
    cfg, plot_file, json_file = parse()
    sources, unseen = gpt.load_corpus(Path(sysconfig.get_path("stdlib")))
    reference, held_out = load_reference()
    model = gpt.Config(layers=cfg.layers, features=cfg.features)
    graph, params = nnx.split(gpt.GPT(model, nnx.Rngs(cfg.seed)))
    base = train_base(cfg, functools.partial(gpt.loss_of, graph), params, sources)
    params = {"base": base, "lora": init_lora(cfg, jax.random.key(cfg.seed))}

    def loss_of(params: Any, text: jax.Array) -> jax.Array:
        return gpt.loss_of(graph, adapted(params), text)

    def evaluate(params: Any) -> dict[str, Any]:
        losses = {}
        for name, text in (("reference", held_out), ("sources", unseen)):
            losses[name] = float(jax.jit(loss_of)(params, gpt.validation(cfg, text)))
        return losses

    layouts = compare_layouts(params["lora"], cfg.layers)
    show("adapters, mu at 5 bits and nu at 4", layouts)
    precision = stquant.Budget(cfg.bits, interval=cfg.interval)
    print(stquant.plan(params["lora"], precision))  # raises where the budget does not hold them

    rate = schedule(cfg, cfg.steps)
    optimizers = {
        "optax.adamw": optax.adamw(rate),
        f"stquant.adamw {cfg.bits} bits": stquant.adamw(rate, precision=precision),
    }
    runs = {}
    for name, adamw in optimizers.items():
        tx = adapters_only(adamw)
        new, state, run = fit(cfg, name, loss_of, params, tx, reference, cfg.steps)
        sizes = nbytes(state), nbytes(state.inner_states["frozen"])
        moved = optax.global_norm(jax.tree.map(jnp.subtract, new["base"], base))
        runs[name] = evaluate(new) | dict(zip(("state bytes", "of the base"), sizes, strict=True))
        runs[name] |= {"base moved": float(moved)} | run
    # the base as it is; and what it would take to train all of it, which is not done
    others = {"no adapters": evaluate(params)}
    others["all weights"] = {"state bytes": nbytes(jax.eval_shape(optax.adamw(rate).init, base))}
    frozen, trained = (nbytes(params[part]) // 4 for part in ("base", "lora"))
    show(f"{frozen:,} parameters frozen, {trained:,} trained; nats per byte", others | runs)
    gpt.save_plot(plot_file, runs)
    print(f"loss curves: {plot_file}")
    if json_file:
        about = {"environment": environment(), "config": dataclasses.asdict(cfg)}
        write_json(json_file, about | {"layouts": layouts, "others": others, "runs": runs})


if __name__ == "__main__":
    main()
