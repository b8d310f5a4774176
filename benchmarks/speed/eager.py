"""Calls of an optimizer outside of jit: what each takes once its programs are compiled.

Four leaves of 8,192 elements, as someone has them who tries an optimizer at a prompt. Milliseconds
are medians of the calls after the first two; compilations are those in them, which are none unless
a program is made anew at every call. Next to it Optax's own `update` of the same optimizer.

    python -m benchmarks.speed.eager
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib
from rich.console import Console
from rich.table import Table

import stquant_jax as stquant
from benchmarks import _io

SHAPES = {f"kernel{i}": (64, 128) for i in range(4)}
FIRST = 2  # calls that may compile
OPTIMIZERS = {
    "adamw": (stquant.adamw, optax.adamw),
    "lion": (stquant.lion, optax.lion),
    "muon": (stquant.muon, contrib.muon),
    "ademamix": (stquant.ademamix, contrib.ademamix),
    "solo_adamw": (stquant.solo_adamw, optax.adamw),
}

compilations: list[str] = []


def timed(call: Callable[[], Any], calls: int) -> dict[str, Any]:
    """Seconds of the first call, the median of those after `FIRST`, and what these compile."""
    seconds, before = [], 0
    for i in range(FIRST + calls):
        if i == FIRST:
            before = len(compilations)
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return {
        "first_ms": round(1e3 * seconds[0], 1),
        "ms": round(1e3 * statistics.median(seconds[FIRST:]), 2),
        "compilations": len(compilations) - before,
    }


def measure(calls: int) -> list[dict[str, Any]]:
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    grads = {
        name: jax.random.normal(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    rows = []
    for name, (ours, theirs) in OPTIMIZERS.items():
        tx, reference = ours(1e-3), theirs(1e-3)
        state, start = tx.init(params), reference.init(params)
        functions = {
            "init": lambda tx=tx: tx.init(params),
            "update": lambda tx=tx, state=state: tx.update(grads, state, params),
            "metrics": lambda state=state: stquant.metrics(state, params),
            "Optax's update": lambda tx=reference, s=start: tx.update(grads, s, params),
        }
        if name == "adamw":
            functions["report"] = lambda state=state: stquant.report(state, params).bits
            functions["fused_update"] = lambda tx=tx, state=state: stquant.fused_update(
                tx, grads, state, params
            )
        rows += [{"optimizer": name, "call": f, **timed(g, calls)} for f, g in functions.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--out", type=Path, default=_io.RESULTS / "eager.json")
    args = parser.parse_args()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compilations.append(event) if "backend_compile" in event else None
    )
    rows = measure(args.calls)
    _io.write_json(args.out, {"environment": _io.environment(), "results": rows})
    table = Table("optimizer", "call", "first, ms", "after, ms", "compilations after the second")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
