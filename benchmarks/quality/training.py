"""Does training suffer? Formats of Adam's state on three tasks, over learning rates and seeds.

    python -m benchmarks.quality.training               # all of it: hours; resumes where it stopped
    python -m benchmarks.quality.training --tasks gpt --seeds 1 # a part; tasks may run side by side
    python -m benchmarks.quality.training --preset gpu  # GPT-2 and larger towers, on a GPU
    python -m benchmarks.quality.training --show        # tables and plot of what there is

The models and data of examples/train_{gpt,vit,clip}.py. In a task all formats start from the same
weights and see the same batches, seed by seed, and choose from the same learning rates: a
format counts at the rate at which its mean validation loss is lowest. Differences to float32 are
taken seed by seed, each at its own best rate, with the 95% interval of Student's t. After the
matrix, `--more` further seeds of the formats in `CLOSE` at their best rates narrow that interval.

Then the questions of design (`contenders.QUESTIONS`), on the GPT at float32's best rate.

A run is one program, compiled once for a format: learning rate, weights and batches are its inputs.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from scipy import stats
from tqdm import tqdm

from benchmarks import _io
from benchmarks.quality.contenders import AGAINST, FINE, MATRIX, QUESTIONS, Contender
from examples import train_clip, train_gpt, train_vit

OUT = _io.RESULTS / "quality"
# A quarter of a decade apart: where the best rate lies between two, a format with shorter or longer
# steps than Adam's is ahead for that alone.
LEARNING_RATES = (1e-3, 1.8e-3, 3e-3, 5.6e-3, 1e-2)
# Of which more seeds are run.
CLOSE = tuple(dict.fromkeys(("fp32", "Budget 3.5", *AGAINST.values(), *AGAINST)))
WEIGHT_DECAY = 0.1

SMALL = {
    "gpt": train_gpt.Config(steps=400, layers=2, length=64),
    "vit": train_vit.Config(steps=1000, batch=32, features=64),
    "clip": train_clip.Config(steps=300, batch=64, features=64),
}
LARGE = {
    "gpt": train_gpt.Config(**train_gpt.PRESETS["gpt2"]),
    "vit": train_vit.Config(steps=3000, layers=12, features=384, heads=6, batch=512),
    "clip": train_clip.Config(steps=3000, layers=6, features=384, heads=6, batch=512),
}
PRESETS = {"cpu": SMALL, "gpu": LARGE}


# --- a task: weights, batches, loss ---


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the examples, with its data.

    Attributes:
      cfg: of the example.
      model: (cfg, rngs) -> the module.
      sample: (cfg, train, key) -> a batch, traceable.
      loss_of: (graph, params, batch) -> mean loss.
      train, valid: data to draw from, and one batch to validate with.
    """

    cfg: Any
    model: Callable
    sample: Callable
    loss_of: Callable
    train: Any
    valid: Any

    @classmethod
    def of(cls, name: str, cfg: Any) -> "Task":
        if name == "gpt":
            text, held_out = train_gpt.load_corpus(Path(sysconfig.get_path("stdlib")))
            data = text, train_gpt.validation(cfg, held_out)
            parts = train_gpt.GPT, train_gpt.sample, train_gpt.loss_of
        elif name == "vit":
            data = train_vit.load_data()
            parts = train_vit.ViT, train_vit.sample, train_vit.loss_of
        else:
            data = train_clip.load_data()
            parts = train_clip.CLIP, train_clip.sample, train_clip.loss_of
        return cls(cfg, *parts, *jax.tree.map(jnp.asarray, data))

    def split(self, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(self.model(self.cfg, nnx.Rngs(seed)))


class Program:
    """Training with one format from start to end, and validation, compiled once."""

    def __init__(self, task: Task, contender: Contender):
        self.task, self.contender = task, contender
        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            contender.make(),
            optax.add_decayed_weights(WEIGHT_DECAY),
        )
        steps = task.cfg.steps
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
        graph, params = task.split(0)
        loss_of = functools.partial(task.loss_of, graph)
        self.bits = contender.bits_of(tx.init(params)[1], params)

        def step(carry, now, lr, train):
            params, state = carry
            count, key = now
            batch = task.sample(task.cfg, train, key)
            loss, grads = jax.value_and_grad(loss_of)(params, batch)
            directions, state = tx.update(grads, state, params)
            rate = -lr * schedule(count)
            params = jax.tree.map(lambda p, u: p + rate * u, params, directions)
            return (params, state), loss

        @jax.jit
        def run(params, keys, lr, train, valid):
            body = functools.partial(step, lr=lr, train=train)
            now = jnp.arange(steps), keys
            (params, _), losses = jax.lax.scan(body, (params, tx.init(params)), now)
            return loss_of(params, valid), losses

        self._run = run

    def __call__(self, lr: float, seed: int) -> dict[str, Any]:
        _, params = self.task.split(seed)
        keys = jax.random.split(jax.random.key(seed), self.task.cfg.steps)
        valid, losses = self._run(params, keys, lr, self.task.train, self.task.valid)
        last = np.asarray(losses[-len(losses) // 10 :], np.float64).mean()
        told = {"val_loss": float(valid), "train_loss": float(last)}
        told = {k: x if math.isfinite(x) else None for k, x in told.items()}  # None: it diverged
        return {"lr": lr, "seed": seed, **told}


# --- what was found, by format ---


def losses(rows: list[dict], name: str, lr: float) -> dict[int, float]:
    """Validation losses by seed; infinite where training diverged."""
    found = [row for row in rows if row["format"] == name and row["lr"] == lr]
    return {row["seed"]: math.inf if row["val_loss"] is None else row["val_loss"] for row in found}


def complete(rows: list[dict], name: str) -> int:
    """How many of the first seeds have a run at every learning rate: a matrix may be half done."""
    rates = {row["lr"] for row in rows if row["format"] == "fp32"}
    count = 0
    while rates and all(count in losses(rows, name, lr) for lr in rates):
        count += 1
    return count


def best_rate(rows: list[dict], name: str, seeds: int) -> float | None:
    """The learning rate of the lowest mean over the first seeds, of which every rate has a run."""
    means = {}
    for lr in sorted({row["lr"] for row in rows if row["format"] == name}):
        found = losses(rows, name, lr)
        if all(seed in found for seed in range(seeds)):
            means[lr] = statistics.fmean(found[seed] for seed in range(seeds))
    return min(means, key=means.__getitem__) if means else None


def interval(differences: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% interval; None of a single one."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2 or not math.isfinite(mean):
        return mean, None
    quantile = stats.t.ppf(0.975, count - 1)
    return mean, float(quantile * statistics.stdev(differences) / math.sqrt(count))


def summary(record: dict) -> list[dict]:
    """A row for each format of the matrix: best rate, losses there, difference to float32."""
    rows, out = record["results"], []
    seeds = complete(rows, "fp32")
    for name in MATRIX:
        own = min(seeds, complete(rows, name))
        if not own:
            continue
        rates = best_rate(rows, name, own), best_rate(rows, "fp32", seeds)
        found, base = losses(rows, name, rates[0]), losses(rows, "fp32", rates[1])
        both = sorted(found.keys() & base.keys())
        mean, half = interval([found[seed] - base[seed] for seed in both])
        bits = next(row["bits"] for row in rows if row["format"] == name)
        out.append(
            {"format": name, "bits": bits, "lr": rates[0], "losses": [found[seed] for seed in both]}
            | {"difference": mean, "half": half, "fp32": statistics.fmean(base.values())}
        )
    return out


def versus(record: dict) -> list[dict]:
    """Of every format in `AGAINST`: the loss of ours that it is held against less its own, seed by
    seed, each at its own best rate."""
    rows, out = record["results"], []
    for names in AGAINST.items():
        seeds = [complete(rows, name) for name in names]
        if not all(seeds):
            continue
        rates = map(best_rate, (rows, rows), names, seeds)
        theirs, ours = (losses(rows, *of) for of in zip(names, rates, strict=True))
        both = sorted(theirs.keys() & ours.keys())
        mean, half = interval([ours[seed] - theirs[seed] for seed in both])
        row = {"format": names[0], "ours": names[1], "difference": mean, "half": half}
        out.append(row | {"seeds": len(both)})
    return out


def answers(record: dict) -> dict[str, list[dict]]:
    """Of every question: losses of its formats at float32's best rate, and the differences."""
    rows = record["results"]
    rate, out = best_rate(rows, "fp32", complete(rows, "fp32")), {}
    for question, contenders in QUESTIONS.items():
        for name in contenders:
            found, base = losses(rows, name, rate), losses(rows, "fp32", rate)
            if both := sorted(found.keys() & base.keys()):
                mean, half = interval([found[seed] - base[seed] for seed in both])
                row = {"format": name, "difference": mean, "half": half, "seeds": len(both)}
                out.setdefault(question, []).append(row)
    return out


def by_rate(record: dict) -> dict[str, dict[float, tuple[float, float | None]]]:
    """Of every format the difference to float32 at the same learning rate, for all of them."""
    rows, out = record["results"], {}
    for name in MATRIX:
        for lr in sorted({row["lr"] for row in rows if row["format"] == name}):
            found, base = losses(rows, name, lr), losses(rows, "fp32", lr)
            if both := sorted(found.keys() & base.keys()):
                difference = interval([found[seed] - base[seed] for seed in both])
                out.setdefault(name, {})[lr] = difference
    return out


def told(mean: float, half: float | None) -> str:
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:+.4f}" + ("" if half is None else f" ± {half:.4f}")


def show(name: str, record: dict) -> None:
    table = Table("format", "bits", "best lr", "loss", "minus fp32", "seeds", title=name)
    for row in summary(record):
        difference = told(row["difference"], row["half"])
        mean = f"{statistics.fmean(row['losses']):.4f}"
        cells = f"{row['bits']:.2f}", f"{row['lr']:g}", mean, difference, str(len(row["losses"]))
        table.add_row(row["format"], *cells)
    Console().print(table)
    rates = sorted({row["lr"] for row in record["results"]})
    table = Table("format", *(f"{lr:g}" for lr in rates), title="minus fp32, by learning rate")
    for contender, found in by_rate(record).items():
        table.add_row(contender, *(told(*found[lr]) if lr in found else "" for lr in rates))
    Console().print(table)
    table = Table("format", "ours", "ours minus it", "seeds", title="ours against others")
    for row in versus(record):
        difference = told(row["difference"], row["half"])
        table.add_row(row["format"], row["ours"], difference, str(row["seeds"]))
    Console().print(table)
    for question, rows in answers(record).items():
        table = Table("format", "minus fp32", "seeds", title=question)
        for row in rows:
            table.add_row(row["format"], told(row["difference"], row["half"]), str(row["seeds"]))
        Console().print(table)


def plot(records: dict[str, dict], path: Path) -> None:
    """Difference of the loss to float32, against bits: a panel for each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(records), 4.5), layout="constrained")
    panels = figure.subplots(1, len(records), squeeze=False)[0]
    for panel, (name, record) in zip(panels, records.items(), strict=True):
        rows = [row for row in summary(record) if math.isfinite(row["difference"])]
        by_kind = {"Budget": "o-", "Fixed": "s:"}
        for kind, style in by_kind.items():
            line = [x for x in rows if x["format"].startswith(kind) and "b1" not in x["format"]]
            _points(panel, sorted(line, key=lambda x: x["bits"]), style, kind)
        line = [x for x in rows if x["format"].startswith("Budget") and "b1" in x["format"]]
        _points(panel, sorted(line, key=lambda x: x["bits"]), "o--", "Budget, b1 0.8")
        others = [x for x in rows if not x["format"].startswith((*by_kind, "fp32"))]
        for mark, row in zip("^vP*XdD", others, strict=False):
            _points(panel, [row], mark, row["format"])
        panel.axhline(0, color="black", linewidth=1)
        panel.set(title=name, xlabel="bits per state element, all in")
        panel.set_yscale("symlog", linthresh=0.02)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss less that of float32")
    panels[-1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _points(panel: Any, rows: list[dict], style: str, label: str) -> None:
    x, y = ([row[key] for row in rows] for key in ("bits", "difference"))
    panel.errorbar(x, y, [row["half"] or 0 for row in rows], fmt=style, label=label, capsize=2)


# --- the runs ---


def plan(name: str, args: argparse.Namespace, rows: list[dict]) -> Iterator[tuple]:
    """(format, learning rate, seed) of all runs; later ones depend on what earlier ones gave."""
    for seed in range(args.seeds):
        for contender in args.formats or MATRIX:
            for lr in LEARNING_RATES:
                yield contender, lr, seed
    for seed in range(args.seeds, args.seeds + args.more):
        for contender in CLOSE:
            if rate := best_rate(rows, contender, args.seeds):
                yield contender, rate, seed
    if name == "gpt" and args.questions and (rate := best_rate(rows, "fp32", args.seeds)):
        for question, contenders in QUESTIONS.items():
            seeds = args.seeds + args.more if question in FINE else args.questions
            for seed in range(seeds):
                for contender in contenders:
                    yield contender, rate, seed


def train(name: str, args: argparse.Namespace) -> dict:
    """All runs of a task that its file does not hold yet, each written as it ends."""
    cfg, file = PRESETS[args.preset][name], args.out / f"{name}.json"
    cfg = dataclasses.replace(cfg, steps=args.steps or cfg.steps)
    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    record = _io.read_json(file)
    if record and record["config"] != config:
        raise SystemExit(f"{file} holds runs of {record['config']}: expected {config}; use --out")
    record = record or {"config": config, "results": []}
    rows = record["results"]
    contenders = dict(MATRIX)
    for more in QUESTIONS.values():
        contenders |= more
    task, programs = Task.of(name, cfg), {}
    done = {(row["format"], row["lr"], row["seed"]) for row in rows}
    for run in tqdm(plan(name, args, rows), desc=name, unit="run"):
        if run in done:
            continue
        contender, lr, seed = run
        if contender not in programs:
            programs[contender] = Program(task, contenders[contender])
        program = programs[contender]
        rows.append({"format": contender, "bits": program.bits, **program(lr, seed)})
        record["environment"] = _io.environment()
        _io.write_json(file, record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=SMALL, default=list(SMALL))
    add("--preset", choices=PRESETS, default="cpu", help="sizes of models and lengths of runs")
    add("--formats", nargs="+", choices=MATRIX, help="of the matrix; default: all")
    add("--seeds", type=int, default=3, help="of every format at every learning rate")
    add("--more", type=int, default=5, help="further seeds of the formats in `CLOSE`")
    add("--questions", type=int, default=8, help="seeds of each question of design; 0: none")
    add("--steps", type=int, help="other than the preset's")
    add("--show", action="store_true", help="train nothing")
    add("--out", type=Path, default=OUT, help="folder of a JSON file for each task")
    args = parser.parse_args()
    for name in () if args.show else args.tasks:
        train(name, args)
    records = {name: _io.read_json(args.out / f"{name}.json") for name in SMALL}
    records = {name: record for name, record in records.items() if record}
    for name, record in records.items():
        show(name, record)
    plot(records, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
