"""What XLA makes of the "xla_gpu" backend for GPUs, on a machine without one.

The update of GPT-2 small is compiled ahead of time, for a card before Hopper and for an H100, by
JAX's CUDA plugin. Counted in the compiled program:

    kernels         operations of the entry computation that are launched; copies apart
    exact           of them, those that only write a leaf that is too small to be quantized
    waits           conditionals and loops: the host reads what they depend on. One is the policy's
    bytes           what the operations read and write: of a slice what is taken, of an array that
                    is updated in place what is written, twice; per element of the parameters
    milliseconds    for these bytes, at nominal bandwidth
    temporaries     that XLA allocates beside arguments and results

    make ptxas does it, after the kernels; or python -m benchmarks.gpu.xla build/cuda
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.gpu.ptxas import H100, surroundings
from benchmarks.shapes import SETS, size

# Nominal bandwidths: Nvidia's data sheets of the A100 80GB SXM and the H100 SXM.
CARDS = {
    "A100, sm_80": (
        2.04e12,
        {
            "cuda_compute_capability.*": "cuda_compute_capability { major: 8 }",
            "H100 80GB HBM3": "A100-SXM4-80GB",
            "core_count: 132": "core_count: 108",
            "fpus_per_core: 128": "fpus_per_core: 64",
            "shared_memory_per_core: .*": "shared_memory_per_core: 167936",
            "optin: .*": "optin: 166912",
        },
    ),
    "H100, sm_90": (3.35e12, {}),
}
BYTES = {"f32": 4, "u32": 4, "s32": 4, "u16": 2, "bf16": 2, "u8": 1, "s8": 1, "pred": 1}
_ARRAY = re.compile(rf"({'|'.join(BYTES)})\[([\d,]*)\]")
_OP = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)(.*)")
SLICES = ("dynamic-slice", "slice", "gather")


class Op(NamedTuple):
    name: str
    bytes: int  # of its result
    kind: str
    operands: list[str]
    attributes: str
    is_root: bool


class Program:
    """A compiled program's text, taken apart."""

    def __init__(self, text: str):
        parts = re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", text)
        heads = [re.match(r"(ENTRY )?%([\w.\-]+) \(", part) for part in parts]
        found = [(head, part) for head, part in zip(heads, parts, strict=True) if head]
        self.text = {head[2]: part for head, part in found}
        (self.entry,) = (head[2] for head, _ in found if head[1])

    @cache  # noqa: B019
    def ops(self, name: str) -> list[Op]:
        matches = filter(None, map(_OP.match, self.text[name].splitlines()))
        return [
            Op(
                m[2],
                _size(m[3]),
                m[4],
                [re.sub(r"/\*.*?\*/", "", x).strip().lstrip("%") for x in m[5].split(",")],
                m[6],
                bool(m[1]),
            )
            for m in matches
        ]

    def moved(self, op: Op) -> float:
        """Bytes that an operation of the entry computation reads and writes."""
        if op.kind == "copy":
            return 2 * op.bytes
        match = re.search(r"calls=%([\w.\-]+)", op.attributes)
        assert match, op
        inside = self.ops(match[1])
        by_name = {x.name: x for x in inside}
        (root,) = (x for x in inside if x.is_root)

        @cache
        def used(name: str) -> float:
            """The part of an array that is read."""
            part, whole = 0.0, float(name == root.name)
            for x in inside:
                if name not in x.operands:
                    continue
                if x.kind in SLICES and x.operands[0] == name:
                    part += used(x.name) * x.bytes / max(1, by_name[name].bytes)
                elif x.kind == "reduce":
                    whole = 1.0
                elif x.kind not in ("dynamic-update-slice", "scatter") or x.operands[0] != name:
                    whole = max(whole, used(x.name))
            return max(whole, min(1.0, part))

        def written(x: Op) -> float:
            while x.kind == "bitcast":
                x = by_name[x.operands[0]]
            at = {"dynamic-update-slice": 1, "scatter": 2}.get(x.kind)
            return x.bytes if at is None else 2 * by_name[x.operands[at]].bytes

        results = [by_name[n] for n in root.operands] if root.kind == "tuple" else [root]
        reads = sum(used(x.name) * x.bytes for x in inside if x.kind == "parameter")
        return reads + sum(map(written, results))


def _size(shapes: str) -> int:
    return sum(
        BYTES[kind] * math.prod(int(n) for n in sides.split(",") if n)
        for kind, sides in _ARRAY.findall(shapes)
    )


def count(text: str, bandwidth: float, elements: int) -> dict[str, Any]:
    """What is to be told of a compiled program."""
    program = Program(text)
    entry = program.ops(program.entry)
    kernels = [op for op in entry if op.kind == "fusion"]
    copies = [op for op in entry if op.kind == "copy"]
    moved = sum(map(program.moved, [*kernels, *copies]))
    return {
        "kernels": len(kernels),
        "exact": sum(op.name.startswith("wrapped_slice") for op in kernels),
        "copies": len(copies),
        "waits": sum(op.kind in ("conditional", "while") for op in entry),
        "bytes_per_element": round(moved / elements, 1),
        "milliseconds": round(1e3 * moved / bandwidth, 2),
        "arena_copies": len(re.findall(r"u32\[\d{5,},128\]\S* copy(?:-start)?\(", text)),
    }


def measure(card: str, scratch: int) -> dict[str, Any]:
    """The update of GPT-2 small for a card."""
    bandwidth, changes = CARDS[card]
    target = H100
    for old, new in changes.items():
        target, times = re.subn(old, new, target)
        assert times, old
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target)
    on = SingleDeviceSharding(topology.devices[0])
    storage = stquant.Storage(backend="xla_gpu", scratch_bytes=scratch)
    tx = stquant.scale_by_adam_q(precision=stquant.Budget(5.0), storage=storage)
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in SETS["gpt2"].items()}
    args = params, jax.eval_shape(tx.init, params)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), args)
    start = time.perf_counter()
    compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(*args).compile()
    seconds = time.perf_counter() - start
    counted = count(compiled.as_text(), bandwidth, size(SETS["gpt2"]))
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return (
        {"card": card, "scratch_bytes": scratch}
        | counted
        | {
            "temporary_bytes": temporaries,
            "compile_seconds": round(seconds, 1),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path, help="where the CUDA plugin is")
    parser.add_argument("--of", nargs=2, metavar=("CARD", "BYTES"), help="in this process: one")
    parser.add_argument("--json", type=Path, default=_io.RESULTS / "xla_gpu.json")
    options = parser.parse_args()
    if options.of:
        card, scratch = options.of
        print(json.dumps(measure(card, int(scratch))))
        return
    rows, todo = [], [(card, 2**n) for n in (28, 30) for card in CARDS]
    for card, scratch in tqdm(todo):
        site = options.site.resolve()
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.xla",
            str(site),
            "--of",
            card,
            str(scratch),
        ]
        done = subprocess.run(
            command, env=os.environ | surroundings(site), stdout=subprocess.PIPE, check=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    _io.write_json(options.json, {"environment": _io.environment(), "results": rows})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
