"""What compiling a training step costs, by parts: the step as people have it, and with parts left
out.

The step is an update and its parameters, donated, compiled for shapes alone; gradients are those of
a function that costs next to nothing. Every row has a process of its own, which compiles once:

    optax          float32 `optax.adamw`
    whole          `stquant.adamw` at 5 bits
    no decisions   with `interval=None`: nothing decides, nothing is repacked
    no small       leaves below `min_size` left out: none is exact

Seconds are processor time of that process, all threads together, so that what else runs on the
machine matters little. Peak memory is the process's own, above what it took before tracing.

    python -m benchmarks.speed.compile_parts
    python -m benchmarks.speed.compile_parts --shapes four --runs 3
"""

import argparse
import json
import math
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.shapes import SETS

SHAPES = {
    "four": {"up": (256, 512), "up_bias": (512,), "down": (512, 256), "down_bias": (256,)},
    "gpt2": SETS["gpt2"],
    "many": {f"layer{i}": (64 * (1 + i % 3), 128) for i in range(1200)},
}
SMALL = stquant.Storage().min_size
PARTS = {
    "optax": lambda: optax.adamw(1e-3),
    "whole": lambda: stquant.adamw(1e-3),
    "no decisions": lambda: stquant.adamw(1e-3, precision=stquant.Budget(5.0, interval=None)),
    "no small": lambda: stquant.adamw(1e-3),
}


def measure(shapes: str, part: str) -> dict[str, Any]:
    """Seconds, instructions and memory of one compilation, in this process."""
    jax.config.update("jax_enable_compilation_cache", False)
    params = {name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in SHAPES[shapes].items()}
    if part == "no small":
        params = {name: x for name, x in params.items() if x.size >= SMALL}
    tx = PARTS[part]()

    def loss(params: Any) -> jax.Array:
        return sum((jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params)), jnp.float32(0))

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    jax.jit(loss).lower(params).compile()  # wakes the compiler up
    start = usage()
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, state)
    tracing = usage()
    lowered = traced.lower()
    lowering = usage()
    compiled = lowered.compile()
    end = usage()
    return {
        "trace": tracing[0] - start[0],
        "lower": lowering[0] - tracing[0],
        "compile": end[0] - lowering[0],
        "total": end[0] - start[0],
        "instructions": len(re.findall(r"^ +(?:ROOT )?%\S+ = ", compiled.as_text(), re.M)),
        "host_megabytes": (end[1] - start[1]) / 1024,
    }


def usage() -> tuple[float, int]:
    """Processor seconds so far, and the most memory so far, in kilobytes."""
    here = resource.getrusage(resource.RUSAGE_SELF)
    return here.ru_utime + here.ru_stime, here.ru_maxrss


def of_process(shapes: str, part: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed.compile_parts", "--one", shapes, part]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("SHAPES", "PART"), help="in this process")
    parser.add_argument("--out", type=Path, default=_io.RESULTS / "compile_parts.json")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = _io.read_json(args.out).get("results", [])
    rows = [row for row in rows if row["shapes"] not in args.shapes]
    plan = [(shapes, part) for shapes in args.shapes for part in PARTS]
    for shapes, part in tqdm(plan):
        if part == "no small" and min(map(math.prod, SHAPES[shapes].values())) >= SMALL:
            continue
        runs = [of_process(shapes, part) for _ in range(args.runs)]
        rows.append({"shapes": shapes, "part": part, "runs": args.runs, **medians(runs)})
        _io.write_json(args.out, {"environment": _io.environment(), "results": rows})
    table = Table("shapes", "part", "runs", *(name for name in rows[0] if name not in _KEYS))
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


_KEYS = {"shapes", "part", "runs"}


if __name__ == "__main__":
    main()
