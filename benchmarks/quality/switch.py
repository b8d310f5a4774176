"""Another optimizer in the middle of a run: fp32, then 5 bits, then fp32 again.

The model, the corpus and the settings are those of examples/train_gpt.py. For every seed, (a)
`optax.adamw` all the way, and (b) the same run, which at step 200 goes on with `stquant.adamw`, by
`stquant.from_optax`, and at step 400 with `optax.adamw` again, by `stquant.to_optax`. Up to the
first switch the two are one.

    python -m benchmarks.quality.switch
    python -m benchmarks.quality.switch --steps 50 --seeds 1 --out /tmp/switch
"""

import argparse
import dataclasses
import functools
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks import _io
from examples import train_gpt

BITS = 5.0
SWITCHES = (0.4, 0.8)  # of the steps: there and back
CHUNK = 10  # steps per dispatch
SPAN = 25  # steps of the running mean that is drawn


def optimizers(cfg: train_gpt.Config) -> dict[str, optax.GradientTransformation]:
    schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.lr, cfg.steps // 10, cfg.steps)
    options = {"learning_rate": schedule, "weight_decay": cfg.weight_decay}
    both = {
        "optax": optax.adamw(**options),
        "stquant": stquant.adamw(**options, precision=train_gpt.policy_for(cfg, BITS)),
    }
    clip = optax.clip_by_global_norm(1.0)
    return {name: optax.chain(clip, adamw) for name, adamw in both.items()}


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


class Training:
    """Programs that all runs of a configuration share."""

    def __init__(self, cfg: train_gpt.Config, corpus: tuple[np.ndarray, np.ndarray]):
        self.cfg, self.optimizers = cfg, optimizers(cfg)
        self.precision = train_gpt.policy_for(cfg, BITS)
        self.text, self.held_out = jnp.asarray(corpus[0]), corpus[1]
        self.graph, _ = nnx.split(train_gpt.GPT(cfg, nnx.Rngs(0)))

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
    def chunk(self, name: str, carry: Any, keys: jax.Array, text: jax.Array) -> Any:
        def step(carry, key):
            params, state = carry
            batch = train_gpt.sample(self.cfg, text, key)
            loss = functools.partial(train_gpt.loss_of, self.graph)
            loss, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = self.optimizers[name].update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, carry, keys)

    def run(self, seed: int, switches: list[tuple[int, str]]) -> dict[str, Any]:
        """Losses of one run, which at each step named goes on with the optimizer named."""
        cfg, due = self.cfg, dict(switches)
        _, params = nnx.split(train_gpt.GPT(cfg, nnx.Rngs(seed)))
        carry = params, self.optimizers["optax"].init(params)
        keys = jax.random.split(jax.random.key(seed), cfg.steps)
        name, losses, moves = "optax", [], []
        for first in tqdm(range(0, cfg.steps, CHUNK), desc=f"seed {seed}, {switches}"):
            if first in due:
                name = due[first]
                carry, seconds = self.switch(name, *carry)
                moves.append({"step": first, "to": name, "seconds": seconds})
                moves[-1]["state_bytes"] = nbytes(carry[1])
            carry, new = self.chunk(name, carry, keys[first : first + CHUNK], self.text)
            losses += np.asarray(new).tolist()
        return {"loss": losses, "val_loss": self.validate(carry[0]), "moves": moves}

    def switch(self, name: str, params: Any, state: Any) -> tuple[Any, float]:
        begin = time.perf_counter()
        convert = stquant.from_optax if name == "stquant" else stquant.to_optax
        state = jax.block_until_ready(convert(state, params, self.precision))
        return (params, state), time.perf_counter() - begin

    def validate(self, params: Any) -> float:
        valid = train_gpt.validation(self.cfg, self.held_out)
        validate = functools.partial(train_gpt.validate, self.cfg, self.graph)
        return float(jax.jit(validate)(params, valid))


def save_plot(file: Path, record: dict[str, Any]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(record["results"]):
        for kind, style in (("optax", "-"), ("switched", "--")):
            smooth = np.convolve(row[kind]["loss"], np.full(SPAN, 1 / SPAN), "valid")
            label = f"seed {row['seed']}, {'optax.adamw' if kind == 'optax' else 'switched'}"
            steps = np.arange(SPAN, SPAN + smooth.size)
            axes.plot(steps, smooth, style, color=f"C{i}", label=label, linewidth=1)
    for move in record["results"][0]["switched"]["moves"]:
        axes.axvline(move["step"], color="gray", linewidth=0.8)
        text = f" to {move['to']}.adamw"
        axes.text(move["step"], 0.98, text, va="top", transform=axes.get_xaxis_transform())
    low = min(min(row["optax"]["loss"]) for row in record["results"])
    axes.set(xlabel="step", ylabel="training loss, nats per byte", ylim=(0.9 * low, 3.5))
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    out = _io.RESULTS / "switch"
    parser.add_argument("--out", type=Path, default=out, help="files without .json and .png")
    args = parser.parse_args()
    cfg = dataclasses.replace(train_gpt.Config(), steps=args.steps)
    there, back = (round(part * cfg.steps / CHUNK) * CHUNK for part in SWITCHES)
    corpus = train_gpt.load_corpus(Path(sysconfig.get_path("stdlib")))
    training = Training(cfg, corpus)
    record = {
        "environment": _io.environment(),
        "config": dataclasses.asdict(cfg) | {"bits": BITS, "there": there, "back": back},
        "corpus_bytes": sum(map(len, corpus)),
        "results": [],
    }
    for seed in range(args.seeds):
        runs = {
            "optax": training.run(seed, []),
            "switched": training.run(seed, [(there, "stquant"), (back, "optax")]),
        }
        record["results"].append({"seed": seed} | runs)
        print(seed, {name: (run["val_loss"], run["moves"]) for name, run in runs.items()})
        _io.write_json(args.out.with_suffix(".json"), record)
        save_plot(args.out.with_suffix(".png"), record)


if __name__ == "__main__":
    main()
