"""Time of one AdamW step of PyTorch's optimizers on a CPU, beside ours and Optax's.

Parameters of a set of shapes, gradients kept; a row for each optimizer and number of cores, each in
a process of its own, pinned before PyTorch starts and given as many threads. Ours and Optax's are
those of `benchmarks.speed.step --in-place`, measured in the same run.

    pip install torch torchao bitsandbytes
    python -m benchmarks.speed.peers
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import _io
from benchmarks.shapes import SETS, size
from benchmarks.speed import step

SET = "gpt2-2blocks"
WARMUP, REPEATS = 3, 9
RATE = 1e-3


def _torch(**options: Any) -> Callable:
    import torch

    return lambda params: torch.optim.AdamW(params, RATE, **options)


def _torchao(name: str) -> Callable:
    import torchao.optim

    return lambda params: getattr(torchao.optim, name)(params, RATE)


def _bitsandbytes() -> Callable:
    import bitsandbytes

    return lambda params: bitsandbytes.optim.AdamW8bit(params, RATE)


OPTIMIZERS: dict[str, Callable[[], Callable]] = {
    "bitsandbytes AdamW8bit": _bitsandbytes,
    "torchao AdamW8bit": lambda: _torchao("AdamW8bit"),
    "torchao AdamW4bit": lambda: _torchao("AdamW4bit"),
    "torch AdamW, foreach": lambda: _torch(foreach=True),
    "torch AdamW, fused": lambda: _torch(fused=True),
}
OURS = ("5.0", "3.0", "5,0")


def measure(name: str) -> dict[str, Any]:
    """A row, in this process."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rng, params = np.random.default_rng(0), []
    for shape in SETS[SET].values():
        p = torch.nn.Parameter(torch.ones(shape))
        p.grad = torch.from_numpy(1e-3 * rng.standard_normal(shape, np.float32))
        params.append(p)
    optimizer, seconds = OPTIMIZERS[name]()(params), []
    for _ in range(WARMUP + REPEATS):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    taken = np.array(seconds[WARMUP:])
    library = name.split()[0]
    return {
        "name": name,
        "version": version(library),
        "cores": len(os.sched_getaffinity(0)),
        "ns_per_element": round(1e9 * float(np.median(taken)) / size(SETS[SET]), 2),
        "seconds": taken.round(6).tolist(),
    }


def in_process(name: str, cores: int) -> dict[str, Any]:
    """`measure`, pinned; what it failed with where it did."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-cores:])
    try:
        command = [sys.executable, "-m", "benchmarks.speed.peers", "--of", name]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        os.sched_setaffinity(0, allowed)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1][:200]
        return {"name": name, "cores": cores, "failed": reason}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", choices=OPTIMIZERS, help="in this process: one")
    options = parser.parse_args()
    if options.of:
        print(json.dumps(measure(options.of)))
        return
    rows: list[dict[str, Any]] = []
    todo = [(name, cores) for cores in (1, 2) for name in OPTIMIZERS]
    for name, cores in tqdm(todo):
        rows.append(in_process(name, cores))
    for cores in tqdm((1, 2)):
        asked = SimpleNamespace(repeats=REPEATS, widths=OURS, profile=False, in_place=True)
        for row in step.run_pinned(asked, SET, cores):  # type: ignore[arg-type]
            ns = row["ns_per_element"]
            rows.append(
                {
                    "name": f"stquant, {row['precision']}",
                    "cores": cores,
                    "ns_per_element": round(ns["stquant"], 2),
                    "optax": round(ns["optax"], 2),
                }
            )
    table = Table("optimizer", "cores", "ns per element")
    for row in rows:
        table.add_row(row["name"], str(row["cores"]), str(row.get("ns_per_element", row)))
    Console().print(table)
    _io.write_json(
        _io.RESULTS / "step_peers.json", {"environment": _io.environment(), "results": rows}
    )


if __name__ == "__main__":
    main()
