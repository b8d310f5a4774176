"""What Nvidia's assembler makes of the GPU kernels, on a machine without a GPU.

A launch is compiled for an H100 by JAX's CUDA plugin. Measured of its kernel:

    registers, spills, shared memory, and the warpgroups that fit on a processor with them; with
    codes of nu and without are two programs of one kernel, which are compiled apart here
    instructions that a thread executes, per element of its tile, by the pipe that they occupy
    copies that XLA puts around the kernel, of anything as large as the arena
    processor seconds to trace and to lower

The least that a tile can take follows: four schedulers issue one instruction each a cycle, and the
special functions' pipe takes a warp's in two. No latency, no memory: a bound, not a forecast.

The plugin is not for the environment that tests run in, so it goes elsewhere. `make ptxas
PYTHON=python3.12 VENV=.venv-newest` fetches it and runs

    python -m benchmarks.gpu.ptxas build/cuda
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

import stquant_jax as stquant
from benchmarks import _io

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
PROCESSOR = {"shared": 233472, "registers": 65536, "warpgroups": 16}
RESERVED = 1024  # bytes of shared memory that every block takes beside its own
ELEMENTS = 32  # of a thread

# Leaf, dtype of gradients, and of parameters if the update is applied; leaves of the launch.
KERNELS = {
    "rows": ((768, 3072), jnp.float32, None),
    "columns": ((3072, 768), jnp.float32, None),
    "rows, bfloat16": ((768, 3072), jnp.bfloat16, None),
    "columns, bfloat16": ((3072, 768), jnp.bfloat16, None),
    "rows, ragged": ((760, 3000), jnp.float32, None),
    "rows, applied": ((768, 3072), jnp.bfloat16, jnp.float32),
    "rows, applied at random": ((768, 3072), jnp.float32, jnp.bfloat16),
    "rows, twelve leaves": ((768, 3072), jnp.float32, None, 12),
}

TURNS = 8  # of a pass over a tile, four elements each
PASSES = {True: (4, 5), False: (3, 4)}  # with codes and without; one is short, and may be unrolled
NO_CODES = ", no codes"

PIPES = {
    "float": "FADD FMUL FFMA FSEL FSETP FSET FMNMX HFMA2 HADD2 HMUL2 F2FP",
    "integer": "IADD3 IMAD LOP3 SHF LEA ISETP SEL PRMT VIADD VIMNMX IMNMX PLOP3 I2FP SGXT BMSK",
    "special": "MUFU I2F F2I FRND F2F I2I POPC FLO",
    "shared memory": "LDS STS",
    "global memory": "LDG STG UTMALDG UTMASTG UBLKCP",
    "lanes": "SHFL BAR SYNCS",
}
PIPE_OF = {op: pipe for pipe, ops in PIPES.items() for op in ops.split()}


def compile_leaves(
    shape: tuple[int, ...], gradients: Any, params: Any, leaves: int = 1
) -> dict[str, Any]:
    """Lower and compile an update of leaves that are alike; the kernel's dumps go where Mosaic was
    told."""
    device = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=H100
    ).devices[0]
    storage = stquant.Storage(backend="pallas_gpu")
    tx = stquant.adamw(1e-3, precision=stquant.Budget(5.0), storage=storage)
    p, g = (
        {f"leaf {i}": jax.ShapeDtypeStruct(shape, dtype) for i in range(leaves)}
        for dtype in (params or gradients, gradients)
    )
    state = jax.eval_shape(tx.init, p)
    f = partial(stquant.fused_update, tx, stochastic_rounding=params == jnp.bfloat16)
    donate = (1, 2)
    if params is None:
        tx = stquant.scale_by_adam_q(precision=stquant.Fixed(4, 3), storage=storage)
        f, donate, state = tx.update, (1,), jax.eval_shape(tx.init, p)
    args = (g, state, *((p,) if params else ()))
    place = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    args = jax.tree.map(lambda x: place(x.shape, x.dtype), args)
    start = time.process_time()
    lowered = jax.jit(f, donate_argnums=donate).lower(*args)
    seconds = time.process_time() - start
    text = lowered.compile().as_text()
    return {
        "lower_cpu_s": round(seconds, 2),
        "arena_copies": len(re.findall(r"u32\[\d+,128\]\S* copy(?:-start)?\(", text)),
    }


def resources(assembler: str, mosaic: str) -> dict[str, int]:
    """From the assembler's and Mosaic's reports."""
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+)", assembler).groups())
    registers = int(re.search(r"Used (\d+) registers", assembler)[1])
    shared = int(re.search(r"smem_scratch_bytes=(\d+)", mosaic)[1])
    fits = (
        PROCESSOR["shared"] // (shared + RESERVED),
        PROCESSOR["registers"] // (128 * registers),
        PROCESSOR["warpgroups"],
    )
    return {
        "registers": registers,
        "spilled_bytes": stores + loads,
        "shared_bytes": shared,
        "warpgroups": min(fits),
    }


def _immediate(text: str) -> int:
    return 0 if text in ("RZ", "URZ") else int(text, 0)


def _trips(code: list[str], first: int, last: int) -> int | None:
    """How often a loop runs whose counter is compared with a constant, or None."""
    body, number = code[first : last + 1], r"(-?0x[0-9a-f]+|U?RZ)"
    steps = {}
    for text in body:
        if found := re.match(
            rf"(?:U?IADD3?|VIADD) (U?R\d+),.*?\b\1(?:\.reuse)?, {number}(?:, U?RZ)?$", text
        ):
            steps[found[1]] = _immediate(found[2])
    for text in body:
        found = re.match(rf"U?ISETP\.\S+ U?P\d, U?PT, (U?R\d+)(?:\.reuse)?, {number},", text)
        if not found or not steps.get(counter := found[1]):
            continue
        # What was last written to it before the loop: zeros to it and its neighbour, a move, or a
        # move by way of two halves.
        zeros = rf"CS2R(?:\.32)? (?:{counter}|R{int(counter.strip('UR')) - 1}), SRZ"
        before = (x for x in reversed(code[:first]) if re.match(rf"\S+ {counter},|{zeros}", x))
        start = next(before)
        if re.match(zeros, start):
            begin = 0
        elif move := re.match(rf"(?:U?MOV|IMAD\.MOV\.U32) {counter}, (?:RZ, RZ, )?{number}", start):
            begin = _immediate(move[1])
        elif halves := re.match(rf"HFMA2\S* {counter}, -RZ, RZ, (\S+), (\S+)", start):
            high, low = (int(np.float16(float(x)).view(np.uint16)) for x in halves.groups())
            begin = high << 16 | low
        else:
            continue
        return (_immediate(found[2]) - begin) // steps[counter]
    return None


def executed(disassembly: str, known: tuple[int, ...]) -> Counter[str]:
    """Instructions that a thread executes for its 32 elements, by opcode.

    A pass over a tile is a loop of eight turns, four elements each, unless it is unrolled. What is
    conditional counts as if it were executed, and so do all of the places for a launch's leaves;
    loops without a constant number of turns count once: they wait, and end at once.
    """
    code, labels = [], {}
    for line in disassembly.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(\S.*)", line):
            code.append(found[1].strip())
    jumps = [(re.search(r"^BRA.*`\((\.L\w+)\)", text), i) for i, text in enumerate(code)]
    loops = [(labels[jump[1]], i) for jump, i in jumps if jump and labels.get(jump[1], i + 1) <= i]
    turns = {loop: _trips(code, *loop) for loop in loops}
    passes = list(turns.values()).count(TURNS)
    assert passes in known, f"{passes} passes over a tile"
    counts = Counter()
    for i, text in enumerate(code):
        around = [turns[a, b] or 1 for a, b in loops if a <= i <= b]
        counts[re.split(r"[.\s]", text)[0]] += math.prod(around)
    return counts


def per_element(counts: Counter[str]) -> dict[str, Any]:
    pipes = Counter()
    for opcode, n in counts.items():
        pipes[PIPE_OF.get(opcode, "other")] += n
    # Four warps on four schedulers; 16 lanes of special functions for 128.
    cycles = {"issue": sum(pipes.values()), "special": 8 * pipes["special"]}
    return {
        "instructions_per_element": {
            pipe: round(pipes[pipe] / ELEMENTS, 2) for pipe in (*PIPES, "other")
        }
        | {"all": round(sum(pipes.values()) / ELEMENTS, 1)},
        "least_cycles_per_tile": max(cycles.values()),
    }


def measure(name: str) -> dict[str, Any]:
    """In a process of its own, whose environment tells Mosaic to dump what it compiles."""
    from pallas_kernels.gpu import kernel  # of what it imports, older versions of JAX lack some

    dump, coded = Path(os.environ["MOSAIC_GPU_DUMP_TO"]), not name.endswith(NO_CODES)
    kernel.PROGRAMS = (coded,)
    record = compile_leaves(*KERNELS[name.removesuffix(NO_CODES)])
    (assembler,) = dump.glob("*.ptxas")
    (mosaic,) = dump.glob("*.resources.txt")
    record |= resources(assembler.read_text(), mosaic.read_text())
    for disassembly in dump.glob("*.sass_ctrl"):
        record |= per_element(executed(disassembly.read_text(), PASSES[coded]))
    return record


def surroundings(site: Path) -> dict[str, str]:
    """Variables of a process that is to find the plugin and its tools."""
    tools = next(site.glob("nvidia/*/bin"))
    paths = (str(site), os.environ.get("PYTHONPATH", ""))
    return {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join((str(tools), os.environ["PATH"])),
    }


def child(site: Path, name: str) -> dict[str, Any]:
    """`measure`, with the plugin and its tools."""
    with tempfile.TemporaryDirectory() as dump:
        dumps = {"MOSAIC_GPU_DUMP_TO": dump, "MOSAIC_GPU_DUMP_PTXAS": "1"}
        environment = os.environ | surroundings(site) | dumps
        record = Path(dump) / "record.json"
        command = [sys.executable, "-m", "benchmarks.gpu.ptxas", str(site), "--of", name]
        subprocess.run([*command, "--json", str(record)], env=environment, check=True)
        return _io.read_json(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path, help="where the CUDA plugin is")
    names = [name + program for name in KERNELS for program in ("", NO_CODES)]
    parser.add_argument("--kernels", nargs="+", choices=names, default=names)
    parser.add_argument("--of", choices=names, help="in this process: one kernel")
    parser.add_argument("--json", type=Path, default=_io.RESULTS / "ptxas.json")
    options = parser.parse_args()
    if options.of:
        _io.write_json(options.json, measure(options.of))
        return
    kernels = {name: child(options.site.resolve(), name) for name in options.kernels}
    _io.write_json(options.json, {"environment": _io.environment(), "kernels": kernels})
    table = Table(
        "kernel", "registers", "spills", "shared", "on a processor", "per element", "cycles"
    )
    for name, x in kernels.items():
        table.add_row(
            name,
            *(str(x[key]) for key in ("registers", "spilled_bytes", "shared_bytes", "warpgroups")),
            str(x.get("instructions_per_element", {}).get("all")),
            str(x.get("least_cycles_per_tile")),
        )
    Console().print(table)
    if bad := [name for name, x in kernels.items() if x["spilled_bytes"] or x["arena_copies"]]:
        sys.exit(f"spills, or copies of the arena: {', '.join(bad)}")


if __name__ == "__main__":
    main()
