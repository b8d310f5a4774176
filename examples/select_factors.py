"""Which statistics tell how many bits a slot of optimizer state needs?

    python examples/select_factors.py

Takes about a minute on two cores. Trains a byte-level transformer with its Adam state at 5 + 3
bits, records candidate statistics of every leaf's gradients and moments beside the measured squared
error that each moment's codes put into an element of the update, and selects the three that predict
it best, relative to the other leaves at the same time.

Expect R^2 of about 0.91 for mu and 0.79 for nu, 0.98 and 0.82 from the statistics that `STQuant`
has in the step. The bound printed is that of theory, near zero because candidates are correlated;
the best set of all shows how good the choice is.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import sysconfig
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
from stquant_jax.precision.factors import (
    CANDIDATES,
    OF_SUMS,
    Signals,
    record,
    regress,
    select,
)
from stquant_jax.precision.statistics import distortion
from stquant_jax.precision.stquant import PUBLISHED


def flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = flag(500, "training steps")
    warmup: int = flag(100, "steps before the first record")
    every: int = flag(20, "steps that a record averages")
    select: int = flag(3, "statistics to select")
    lr: float = flag(1e-3, "learning rate")
    batch: int = flag(16, "sequences per step")
    length: int = flag(64, "bytes per sequence")
    layers: int = flag(2, "transformer blocks")
    features: int = flag(64, "width of the residual stream")
    seed: int = flag(0, "seed of the weights and of the order of the data")


MOMENTS = ("mu", "nu")
WIDTHS = stquant.Fixed(mu=5, nu=3)


# --- a small model with leaves of many kinds ---


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d = cfg.features
        self.norm1 = nnx.LayerNorm(d, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, d, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(d, rngs=rngs)
        self.up = nnx.Linear(d, 4 * d, rngs=rngs)
        self.down = nnx.Linear(4 * d, d, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.token = nnx.Embed(256, cfg.features, rngs=rngs)
        self.position = nnx.Embed(cfg.length, cfg.features, rngs=rngs)
        self.blocks = nnx.List([Block(cfg, rngs) for _ in range(cfg.layers)])
        self.norm = nnx.LayerNorm(cfg.features, rngs=rngs)
        self.head = nnx.Linear(cfg.features, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.token(tokens) + self.position.embedding[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def load_text() -> jax.Array:
    """Bytes of the top modules of the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise SystemExit("this Python ships its standard library without sources; use another one")
    return jnp.asarray(np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8))


# --- the run: statistics and distortion, every few steps ---


class Run(NamedTuple):
    """What training carries from step to step."""

    params: Any
    state: Any  # at a few bits
    exact: Any  # Optax's float32 state beside it, of the same gradients: moments without rounding
    gradient: Any


class Records(NamedTuple):
    """What is recorded of each leaf, averaged over the steps before: [times, leaves, ...]."""

    candidates: Any  # [..., candidates], from the arrays
    sums: Any  # [..., factors], as `STQuant` has them from the sums of the fused step
    error: Any  # [..., moments], squared error of the update per element


def observe_run(cfg: Config) -> tuple[Records, list[str]]:
    """Trains and records; the paths of the leaves."""
    text = load_text()
    graph, params = nnx.split(Model(cfg, nnx.Rngs(cfg.seed)), nnx.Param)
    packed, exact = stquant.scale_by_adam_q(precision=WIDTHS), optax.scale_by_adam()
    leaves = stquant.plan(params, WIDTHS).leaves
    quantized = [i for i, leaf in enumerate(leaves) if leaf.kind != "exact"]

    def loss_of(params, batch):
        logits = nnx.merge(graph, params)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def step(run, key):
        starts = jax.random.randint(key, (cfg.batch, 1), 0, text.size - cfg.length)
        batch = text[starts + jnp.arange(cfg.length + 1)].astype(jnp.int32)
        loss, grads = jax.value_and_grad(loss_of)(run.params, batch)
        update, state = packed.update(grads, run.state)
        params = jax.tree.map(lambda p, u: p - cfg.lr * u, run.params, update)
        new = Run(params, state, exact.update(grads, run.exact)[1], grads)
        signals = Signals(grads, run.gradient, new.exact.mu, new.exact.nu, update)
        signals = Signals(*([jax.tree.leaves(x)[i] for i in quantized] for x in signals))
        return new, (record(signals), loss)

    @jax.jit
    def steps(run, keys):
        run, (statistics, loss) = jax.lax.scan(step, run, keys)
        plan, observed, *_ = run.state.precision.renewed(run.state.count)
        sums = observed.sums
        error = distortion(observed, plan.widths[1::2]).reshape(-1, len(MOMENTS))
        error *= (sums.energy / sums.elements)[:, None]
        factors = jnp.stack([factor(sums) for factor in OF_SUMS.values()], axis=1)
        return run, Records(jnp.mean(statistics, axis=0), factors, error), loss[-1]

    run = Run(params, packed.init(params), exact.init(params), optax.tree.zeros_like(params))
    keys = jax.random.split(jax.random.key(cfg.seed), cfg.steps)
    records = []
    with tqdm(total=cfg.steps, unit="step") as bar:
        for start in range(0, cfg.steps, cfg.every):
            run, new, loss = steps(run, keys[start : start + cfg.every])
            if start >= cfg.warmup:
                records.append(jax.tree.map(np.asarray, new))
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update(cfg.every)
    records = Records(*map(np.stack, zip(*records, strict=True)))
    return records, [leaves[i].path for i in quantized]


def relative(x: np.ndarray) -> np.ndarray:
    """Over the geometric mean of all leaves at the same time: who needs bits, not when."""
    logs = np.log(np.maximum(x.astype(np.float64), 1e-30))
    return np.exp(logs - logs.mean(axis=1, keepdims=True)).reshape(-1, x.shape[-1])


# --- the choice ---


def fitted(features: dict[str, np.ndarray], target: np.ndarray, names: tuple) -> dict[str, Any]:
    coefficients, r_squared = regress(features, target, names)
    return {"names": names, "r_squared": r_squared, "coefficients": coefficients}


def analyse(cfg: Config, records: Records) -> dict[str, Any]:
    """Per moment: single statistics, greedy sets, the best set, the published three."""
    features = dict(zip(CANDIDATES, relative(records.candidates).T, strict=True))
    in_step = dict(zip(OF_SUMS, relative(records.sums).T, strict=True))
    results = {}
    for moment, target in zip(MOMENTS, relative(records.error).T, strict=True):
        sets = itertools.combinations(features, cfg.select)
        best = max(sets, key=lambda names: regress(features, target, names)[1])
        results[moment] = {
            "single": {name: regress(features, target, [name])[1] for name in features},
            "path": select(features, target, len(features)).r_squared,
            "greedy": select(features, target, cfg.select)._asdict(),
            "best": fitted(features, target, best),
            # the rest are what the policy has in the step
            "greedy, of sums": select(in_step, target, min(cfg.select, len(in_step)))._asdict(),
            "published": fitted(in_step, target, tuple(PUBLISHED)),
        }
    return results


def show(cfg: Config, results: dict[str, Any]) -> None:
    table = Table("", "by", "statistics, octaves of error per octave of each", "R^2")
    table.title = f"{cfg.select} statistics that predict the error"
    for moment, found in results.items():
        for by, fit in found.items():
            if by not in ("single", "path"):
                terms = zip(fit["names"], fit["coefficients"], strict=True)
                text = ", ".join(f"{name} {value:+.2f}" for name, value in terms)
                table.add_row(moment, by, text, f"{np.max(fit['r_squared']):.3f}")
        table.add_section()
    Console().print(table)
    for moment, found in results.items():
        part = found["greedy"]["r_squared"][-1] / found["best"]["r_squared"]
        bound = found["greedy"]["bound"]
        print(f"{moment}: greedy reaches {part:.1%} of the best set's R^2; bound: {bound:.2%}")


def save_plot(file: Path, results: dict[str, Any]) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted(CANDIDATES, key=lambda name: max(r["single"][name] for r in results.values()))
    place = np.arange(len(names))
    for i, (moment, found) in enumerate(results.items()):
        left.plot(np.arange(1, len(found["path"]) + 1), found["path"], "o-", label=moment)
        single = [found["single"][name] for name in names]
        right.barh(place + 0.4 * i, single, 0.4, label=moment)
    left.set(xlabel="statistics, greedily selected", ylabel="$R^2$", ylim=(0, 1))
    right.set(xlabel="$R^2$ of one statistic alone", yticks=place + 0.2, yticklabels=names)
    left.legend()
    right.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Select the statistics that predict the distortion of optimizer state.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            help=field.metadata["help"],
        )
    plot = Path("select_factors.png")
    parser.add_argument("--plot", type=Path, default=plot, help="file for the figure")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    flags = vars(parser.parse_args())
    json_file, plot_file = flags.pop("json"), flags.pop("plot")
    cfg = Config(**flags)

    records, leaves = observe_run(cfg)
    results = analyse(cfg, records)
    show(cfg, results)
    save_plot(plot_file, results)
    print(f"figure: {plot_file}")
    if json_file:
        about = {"config": dataclasses.asdict(cfg), "widths": [WIDTHS.mu, WIDTHS.nu]}
        about |= {"leaves": leaves, "records": len(records.error), "jax": jax.__version__}
        about |= {"date": str(datetime.date.today())}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(about | results, indent=1))


if __name__ == "__main__":
    main()
