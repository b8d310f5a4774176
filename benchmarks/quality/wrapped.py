"""Optimizers of Optax, and the same with their state at 8 bits by `stquant.quantize_state`.

The model, the corpus and the settings of examples/train_gpt.py, but fewer steps. Of one seed both
are trained on the same batches from the same weights; further seeds of Optax's show the noise.

    python -m benchmarks.quality.wrapped                      # resumes where it stopped
    python -m benchmarks.quality.wrapped --pairs 3            # one more of the quantized ones
    python -m benchmarks.quality.wrapped --steps 20 --seeds 1 --out /tmp/wrapped
"""

import argparse
import dataclasses
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
from optax import contrib

import stquant_jax as stquant
from benchmarks import _io
from examples import train_gpt

BITS = 8.0

# Peak learning rate, found by factors of 3 for Optax's own, and the optimizer.
OPTIMIZERS: dict[str, tuple[float, Callable[[Any], optax.GradientTransformation]]] = {
    "adamw": (3e-3, optax.adamw),
    "lion": (1e-3, optax.lion),
    "adabelief": (3e-3, optax.adabelief),
    "ademamix": (1e-3, contrib.ademamix),
    "rmsprop": (1e-3, optax.rmsprop),
    "adafactor": (3e-2, lambda lr: optax.adafactor(lr, momentum=0.9)),
    "muon": (3e-2, contrib.muon),
    "sgd, momentum": (1e-1, lambda lr: optax.sgd(lr, momentum=0.9)),
    "novograd": (3e-2, optax.novograd),
    "amsgrad": (3e-3, optax.amsgrad),
    "chain": (
        1e-3,
        lambda lr: optax.chain(
            optax.clip(1.0),
            optax.scale_by_rms(decay=0.99),
            optax.trace(0.8),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(lr),
        ),
    ),
}


def quantized(make: Callable) -> Callable:
    return lambda lr: stquant.quantize_state(make(lr), stquant.Budget(BITS))


def train(cfg: train_gpt.Config, corpus: Any, name: str, seed: int, make: Callable) -> dict:
    run = train_gpt.train(cfg, name, corpus, seed, lambda lr, weight_decay: make(lr))
    keys = "val_loss", "state_bytes", "seconds_per_step"
    return {"seed": seed, **{key: run[key] for key in keys}, "loss": run["loss"][-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="of Optax's own")
    parser.add_argument("--pairs", type=int, default=2, help="of them with a quantized run")
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, help="of the optimizers")
    parser.add_argument("--out", type=Path, default=_io.RESULTS / "wrapped")
    args = parser.parse_args()
    file = args.out.with_suffix(".json")
    cfg = train_gpt.Config(steps=args.steps)
    record = _io.read_json(file)
    if record.get("config") != (config := {**dataclasses.asdict(cfg), "bits": BITS}):
        record = {"config": config, "results": {}}
    corpus = train_gpt.load_corpus(Path(sysconfig.get_paths()["stdlib"]))
    for seed in range(args.seeds):
        for name in args.only or OPTIMIZERS:
            lr, make = OPTIMIZERS[name]
            runs = record["results"].setdefault(name, {"lr": lr, "optax": [], "quantized": []})
            here = dataclasses.replace(cfg, lr=lr)
            kinds = {"optax": make} | ({"quantized": quantized(make)} if seed < args.pairs else {})
            for kind, f in kinds.items():
                if all(run["seed"] != seed for run in runs[kind]):
                    runs[kind].append(train(here, corpus, f"{name}, {kind}", seed, f))
                    record["environment"] = _io.environment()
                    _io.write_json(file, record)


if __name__ == "__main__":
    main()
