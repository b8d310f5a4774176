"""The most memory that a training process takes on a CPU, and what of it is compilation.

A transformer of 23 million parameters, some steps of it, each row in a process of its own: float32
AdamW and ours. Figures are the process's peak of resident memory: before the step is traced, with
parameters and state; after it was compiled; after the steps. The program is

    compiled        there and then
    cached          from JAX's compilation cache, which an earlier process filled
    plain emitters  compiled by `jax.jit(..., compiler_options=PLAIN)`: XLA's fusion emitters take
                    most of the memory

    python -m benchmarks.memory.host
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import _io
from benchmarks.memory.training import BASE, OPTIMIZERS, Model, batch_of, loss_of, params_of

MODEL = Model(6, 512, 8, 8192, 256)
BATCH, STEPS = 4, 3
NAMES = BASE, "stquant.adamw 5", "stquant.adamw 3"
PLAIN = {"xla_cpu_use_fusion_emitters": False}
PROGRAMS = {"compiled": {}, "cached": {}, "plain emitters": PLAIN}  # their compiler options
MOMENTS = "start", "compiled", "end"


def measure(name: str, program: str) -> dict[str, float]:
    """Megabytes of this process at their most, up to each of the moments."""
    init, update = OPTIMIZERS[name]("xla", True)
    loss = functools.partial(loss_of, MODEL, jnp.float32)

    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch)
        return *update(grads, state, params), value

    params, batch = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        (params_of(MODEL, False, jnp.dtype(jnp.float32)), batch_of(MODEL, BATCH)),
    )
    state = jax.block_until_ready(jax.jit(init)(params))
    found = [peak()]
    jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=PROGRAMS[program])
    compiled = jitted.lower(params, state, batch).compile()
    found.append(peak())
    for _ in range(STEPS):
        params, state, value = compiled(params, state, batch)
    jax.block_until_ready((params, state, value))
    return dict(zip(MOMENTS, [*found, peak()], strict=True))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def of_process(name: str, program: str, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory.host", "--one", name, program, cache]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--one", nargs=3, metavar=("OPTIMIZER", "PROGRAM", "CACHE"), help="in this process"
    )
    parser.add_argument("--out", type=Path, default=_io.RESULTS / "host.json")
    args = parser.parse_args()
    if args.one:
        name, program, cache = args.one
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        print(json.dumps(measure(name, program)))
        return
    rows = []
    for name in tqdm(NAMES):
        runs: dict[str, list] = {program: [] for program in PROGRAMS}
        for _ in range(args.runs):
            with tempfile.TemporaryDirectory() as cache:  # empty at first
                for program in PROGRAMS:
                    runs[program].append(of_process(name, program, cache))
        for program, found in runs.items():
            most = {x: round(statistics.median(run[x] for run in found)) for x in MOMENTS}
            rows.append({"optimizer": name, "program": program, "runs": args.runs, **most})
    _io.write_json(args.out, {"environment": _io.environment(), "results": rows})
    table = Table("optimizer", "program", *(f"MB, {x}" for x in MOMENTS))
    for row in rows:
        table.add_row(row["optimizer"], row["program"], *(str(row[x]) for x in MOMENTS))
    Console().print(table)


if __name__ == "__main__":
    main()
