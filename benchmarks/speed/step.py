"""Time of one update per element, against float32 `optax.scale_by_adam` in the same run.

Both are jitted with their state donated and run in turn, A B A B, on the same gradients:

    ratio           median time of ours over median time of Optax's
    ratio of pairs  median over the turns of ours over the Optax update right after it
    bytes           read as arguments and written as results, per element: at least what moves
    temporaries     bytes per element that the update allocates beside them

Updates are fresh arrays in both, as between two jitted functions: their page faults cost as much as
float32 Adam itself, and flatter whoever is slower. With --in-place it is what a training step does:
whole AdamW steps, `fused_update` and `optax.adamw` with `apply_updates`, states and parameters
donated and returned in their order, so that nothing is allocated. Each number of cores has its own
process, pinned before JAX starts, since XLA sizes its pool of threads by the affinity mask.

Precisions: ``5`` is Fixed(mu=5, nu=5), ``5,0`` is Fixed(mu=5, nu=0), ``5.0`` is Budget(5.0).

With --profile, a traced run gives the time of every XLA op, without that of the ops inside it. Ops
are fusions of several stages of the library: their time is split by the work that each stage put
into them, counted from the compiled program (`benchmarks.speed.compile.stages_by_instruction`), so
that times of ops are measured and times of stages estimated. Tracing slows small ops down; times
are summed over threads.

    python -m benchmarks.speed.step
    python -m benchmarks.speed.step --in-place
    python -m benchmarks.speed.step --shapes gpt2-block --widths 5.0 --cores 1 --profile
"""

import argparse
import collections
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.shapes import SETS, size
from benchmarks.speed.compile import compile_update, stages_by_instruction

WIDTHS = ("5.0", *map(str, range(2, 9)), "5,0")
WARMUP = 2
RATE = 1e-3
PROFILED = 30_000_000  # elements to update under the profiler, at least
OPS = 30  # the largest ones are kept
SCHEDULER = "ThunkExecutor::Execute"  # XLA's event around the ops of a program


def precision(text: str) -> tuple[str, stquant.Fixed | stquant.Budget]:
    """What a word of --widths stands for, and its name."""
    if "." in text:
        return f"budget {text}", stquant.Budget(float(text))
    mu, _, nu = text.partition(",")
    return f"mu {mu} nu {nu or mu}", stquant.Fixed(mu=int(mu), nu=int(nu or mu))


class Update:
    """A compiled update that owns its state; a call is one step, timed."""

    def __init__(self, tx: optax.GradientTransformation, grads: Any):
        shapes = jax.eval_shape(lambda: grads)
        self.compile_seconds, self.compiled = compile_update(tx, shapes)
        self.state = tx.init(grads)
        self.grads = grads
        for _ in range(WARMUP):
            self()

    def __call__(self) -> float:
        start = time.perf_counter()
        updates, self.state = self.compiled(self.grads, self.state)
        jax.block_until_ready((updates, self.state))
        return time.perf_counter() - start

    def figures(self, elements: int) -> dict[str, float]:
        """Bits of the state, and bytes per element that a step moves."""
        memory = self.compiled.memory_analysis()
        moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
        stored = sum(x.nbytes for x in jax.tree.leaves(self.state))
        return {
            "bits": round(4 * stored / elements, 4),  # of two moments
            "bytes_per_element": round(moved / elements, 3),
            "temporary_bytes_per_element": round(memory.temp_size_in_bytes / elements, 3),
            "compile_seconds": round(self.compile_seconds["total"], 2),
        }


class StepInPlace(Update):
    """A compiled step that owns state and parameters; a call is one step, timed."""

    def __init__(self, step: Callable, tx: optax.GradientTransformation, grads: Any):
        self.params = jax.tree.map(jnp.ones_like, grads)
        self.state = tx.init(self.params)
        start, jitted = time.perf_counter(), jax.jit(step, donate_argnums=(1, 2))
        self.compiled = jitted.lower(grads, self.state, self.params).compile()
        self.compile_seconds = {"total": time.perf_counter() - start}
        self.grads, self.faults = grads, []
        for _ in range(WARMUP):
            self()
        self.faults.clear()

    def __call__(self) -> float:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        self.state, self.params = self.compiled(self.grads, self.state, self.params)
        jax.block_until_ready((self.state, self.params))
        seconds = time.perf_counter() - start
        self.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return seconds

    def figures(self, elements: int) -> dict[str, float]:
        return super().figures(elements) | {"page_faults": float(np.median(self.faults))}


def ours_in_place(policy: stquant.Policy, grads: Any) -> StepInPlace:
    tx = stquant.adamw(RATE, precision=policy)

    def step(grads, state, params):
        params, state = stquant.fused_update(tx, grads, state, params)
        return state, params

    return StepInPlace(step, tx, grads)


def optax_in_place(grads: Any) -> StepInPlace:
    tx = optax.adamw(RATE)

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    return StepInPlace(step, tx, grads)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each precision, in this process."""
    (name,) = args.shapes
    elements, rng = size(SETS[name]), np.random.default_rng(0)
    grads = {k: 1e-3 * rng.standard_normal(shape, np.float32) for k, shape in SETS[name].items()}
    grads = jax.tree.map(jnp.asarray, grads)
    base = optax_in_place(grads) if args.in_place else Update(optax.scale_by_adam(), grads)
    for label, policy in map(precision, args.widths):
        if args.in_place:
            ours = ours_in_place(policy, grads)
        else:
            ours = Update(stquant.scale_by_adam_q(precision=policy), grads)
        pairs = np.array([(ours(), base()) for _ in range(args.repeats)])
        medians, both = np.median(pairs, axis=0), ("stquant", "optax")
        row = {
            "shapes": name,
            "elements": elements,
            "cores": len(os.sched_getaffinity(0)),
            "precision": label,
            "ns_per_element": dict(zip(both, (1e9 * medians / elements).round(4), strict=True)),
            "ratio": round(medians[0] / medians[1], 4),
            "ratio_of_pairs": round(np.median(pairs[:, 0] / pairs[:, 1]), 4),
            "seconds": dict(zip(both, pairs.T.round(6).tolist(), strict=True)),
            "stquant": ours.figures(elements),
            "optax": base.figures(elements),
        }
        yield row | ({"profile": profile(ours, elements)} if args.profile else {})
        del ours  # before the next one is made: at GPT-2's shapes two do not always fit


def profile(update: Update, elements: int) -> dict[str, Any]:
    """Nanoseconds per element by stage and by XLA op, of a traced run."""
    steps = -(-PROFILED // elements)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds = sum(update() for _ in range(steps))
        (path,) = Path(folder).rglob("*.xplane.pb")
        spent, calls = collections.Counter(), collections.Counter()
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                _add_self_times(line.events, spent, calls)
    parts = stages_by_instruction(update.compiled.as_text())
    parts[SCHEDULER] = {"scheduling of ops": 1.0}

    def per(ns: float) -> float:
        return round(ns / (steps * elements), 4)

    stages, ops = collections.Counter(), []
    for op, ns in spent.most_common():
        shares = parts.get(op, {"unknown": 1.0})
        stages.update({stage: ns * share for stage, share in shares.items()})
        shares = {stage: round(share, 3) for stage, share in shares.items() if share > 0.01}
        ops.append({"op": op, "ns": per(ns), "calls": calls[op] / steps, "stages": shares})
    return {
        "steps": steps,
        "ns_traced": per(1e9 * seconds),
        "stages": {stage: per(ns) for stage, ns in stages.most_common()},
        "ops": ops[:OPS],
    }


def _add_self_times(events: Any, spent: collections.Counter, calls: collections.Counter) -> None:
    """Adds the events of one thread: their own time, without that of events inside them."""
    ops = []
    for event in events:
        name = SCHEDULER if event.name == SCHEDULER else dict(event.stats).get("hlo_op")
        if name and not event.name.startswith("end: "):
            ops.append((event.start_ns, -event.duration_ns, name))
    around: list[tuple[float, str]] = []  # end and name of the events that are still open
    for start, minus, name in sorted(ops):
        while around and around[-1][0] <= start:
            around.pop()
        if around:
            spent[around[-1][1]] += minus
        spent[name] -= minus
        calls[name] += 1
        around.append((start - minus, name))


def run_pinned(args: argparse.Namespace, shapes: str, cores: int) -> Iterator[dict[str, Any]]:
    """The rows of one set of shapes, from a process of its own on that many cores."""
    options = ["--shapes", shapes, "--repeats", str(args.repeats), "--widths", *args.widths]
    command = [sys.executable, "-m", "benchmarks.speed.step", "--worker", *options]
    command += ["--profile"] * args.profile + ["--in-place"] * args.in_place
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-cores:])  # the process inherits it
    try:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    finally:
        os.sched_setaffinity(0, allowed)
    with worker:
        assert worker.stdout
        yield from map(json.loads, worker.stdout)
    if worker.returncode:
        raise SystemExit(f"the process on {cores} cores ended with {worker.returncode}")


def show(rows: list[dict[str, Any]]) -> Table:
    """The rows of one set of shapes on one number of cores."""
    first = rows[0]
    table = Table(
        "precision", "bits", "ns", "optax ns", "ratio", "of pairs", "bytes", "temp. bytes"
    )
    what = "step in place" if "page_faults" in first["optax"] else "update"
    table.title = f"one {what} per element: {first['shapes']}, cores: {first['cores']}"
    table.caption = f"optax moves {first['optax']['bytes_per_element']:.1f} bytes"
    for row in rows:
        ns, ours = row["ns_per_element"], row["stquant"]
        numbers = [ours["bits"], ns["stquant"], ns["optax"], row["ratio"], row["ratio_of_pairs"]]
        numbers += [ours["bytes_per_element"], ours["temporary_bytes_per_element"]]
        table.add_row(row["precision"], *(f"{x:.2f}" for x in numbers))
    return table


def show_profile(row: dict[str, Any], ops: int = 12) -> Iterator[Table]:
    """Where the time of one row goes: its stages, and its largest ops."""
    found = row["profile"]
    whole = sum(found["stages"].values())
    table = Table("stage", "ns per element", "%")
    table.title = f"{row['precision']} on {row['shapes']}, cores: {row['cores']}"
    untraced = row["ns_per_element"]["stquant"]
    table.caption = f"traced {found['ns_traced']:.2f} ns, untraced {untraced:.2f} ns"
    for stage, ns in found["stages"].items():
        table.add_row(stage, f"{ns:.3f}", f"{100 * ns / whole:.1f}")
    yield table
    table = Table("XLA op", "ns", "%", "calls", "stages, %")
    for op in found["ops"][:ops]:
        parts = sorted(op["stages"].items(), key=lambda part: -part[1])[:4]
        within = ", ".join(f"{stage} {100 * share:.0f}" for stage, share in parts)
        percent = f"{100 * op['ns'] / whole:.1f}"
        table.add_row(op["op"], f"{op['ns']:.2f}", percent, f"{op['calls']:.0f}", within)
    yield table


def _arguments() -> tuple[argparse.Namespace, list[int]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", default=["gpt2-2blocks", "gpt2"], choices=SETS)
    add("--widths", nargs="+", default=WIDTHS, metavar="PRECISION", help=f"default: {WIDTHS}")
    add("--repeats", type=int, default=15, help="turns of each, default 15")
    add("--cores", default="both", choices=("1", "2", "both"))
    add("--profile", action="store_true", help="also say where the time goes")
    add("--in-place", action="store_true", help="whole AdamW steps, everything donated")
    add("--json", type=Path, help="default: step.json, or step_in_place.json, of the results")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for text in args.widths:
        try:
            precision(text)
        except ValueError as error:
            parser.error(f"--widths {text}: {error}")
    name = "step_in_place.json" if args.in_place else "step.json"
    args.json = args.json or _io.RESULTS / name
    cores = [1, 2] if args.cores == "both" else [int(args.cores)]
    if not hasattr(os, "sched_setaffinity"):
        parser.error("pinning a process to cores needs Linux")
    if max(cores) > len(os.sched_getaffinity(0)) and not args.worker:
        parser.error(f"--cores {args.cores}: {len(os.sched_getaffinity(0))} usable here")
    return args, cores


def main():
    args, cores = _arguments()
    if args.worker:  # in its own process, pinned: rows as lines of JSON
        for row in measure(args):
            print(json.dumps(row), flush=True)
        return
    rows: list[dict[str, Any]] = []
    todo = [(shapes, n) for shapes in args.shapes for n in cores]
    with tqdm(total=len(todo) * len(args.widths)) as bar:
        for shapes, n in todo:
            bar.set_description(f"{shapes}, {n} cores")
            for row in run_pinned(args, shapes, n):
                rows.append(row)
                bar.update()
                _io.write_json(args.json, {"results": rows})
    for row in rows:
        if "profile" in row:
            Console().print(*show_profile(row), sep="\n")
    for shapes, n in todo:
        here = [row for row in rows if (row["shapes"], row["cores"]) == (shapes, n)]
        Console().print(show(here))
    _io.write_json(args.json, {"environment": _io.environment(), "results": rows})


if __name__ == "__main__":
    main()
