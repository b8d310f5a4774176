"""Cycles of the TPU kernel, without a TPU: counted in the schedule that libtpu's compiler writes.

One leaf's update is compiled for each chip, in a process of its own, since libtpu reads its flags
once. A line of the schedule is a bundle
of instructions, a cycle, empty ones included. A step of the kernel's grid is a chunk of eight
tiles: of its blocks those of one program count, its loops over planes as the widths say, and what
only a leaf's first or last chunk does, too. Waits for copies, for instructions and for banks of
memory are not in it: a bound, not a forecast.

    python -m benchmarks.speed.aot_cycles

`pip install '.[aot]'` brings libtpu, whose format and flags these are; 0.0.42 was read.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.memory.traffic import ADAM, CHIPS, step_bytes, stored
from benchmarks.speed import aot
from pallas_kernels.tpu.chunks import CHUNK
from stquant_jax.storage.planes import TILE

SHAPE, WIDTHS = (768, 3072), (4, 3)
# Cycles a second: peak operations over those of a core's matrix units. v6e's does not follow.
CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": None}
KERNEL = "stquant_update"
FLAGS = (
    "--xla_msa_enable=false"  # a leaf alone would be put into the chip's own memory whole
    " --xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
    " --xla_jf_dump_llo_pass_label_regex=final_bundles|packed-bundles-post-ra"
)
BUNDLE_BYTES = 64  # of code: the program's bytes over its bundles
# The kernel's loops over a moment's planes, in their order: for the first chunk started, for the
# next started, waited for; waited for, started, twice waited for behind the last. 1: at every step.
COPIES = 0, 1, 1, 1, 1, 0, 0
# Blocks of one program alone, in their order, true of that with codes; how many bundles they have.
BLOCKS = True, False, True, True, False
LEAST, MOST = 200, 2000
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})?: *>* *\{", re.M)
_JUMP = re.compile(r"target bundleno = (\d+)")
DELAY = 4  # bundles after a jump that are executed before it


def compile_leaf(chip: str) -> dict[str, Any]:
    """In a process that has libtpu's flags."""
    storage = stquant.Storage(backend="pallas_tpu")
    tx = stquant.scale_by_adam_q(precision=stquant.Fixed(*WIDTHS), storage=storage)
    params = {"leaf": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    program = aot.compile_for(chip, tx.update, params, jax.eval_shape(tx.init, params), donate=(1,))
    call = next(line for line in program.as_text().splitlines() if "tpu_custom_call" in line)
    return {"vmem_bytes": int(re.search(r'used_scoped_memory_configs.*?"size":"(\d+)"', call)[1])}


def _widths(coded: bool) -> tuple[int, int]:
    return WIDTHS[0], WIDTHS[1] * coded


def cycles(schedule: str, coded: bool) -> float:
    """Per tile, of the program with codes of nu or of the one without."""
    starts = [m.start() for m in _BUNDLE.finditer(schedule)]
    ends = [*starts[1:], len(schedule)]
    bundles = [schedule[a:b] for a, b in zip(starts, ends, strict=True)]
    jumps = [(i, int(m[1])) for i, text in enumerate(bundles) for m in _JUMP.finditer(text)]
    back = sorted((to, at + DELAY) for at, to in jumps if to <= at)
    grid = max(back, key=lambda loop: loop[1] - loop[0])
    inner = [x for x in back if grid[0] < x[0] and x[1] < grid[1]]
    planes = [last - first + 1 for first, last in inner]
    blocks = [to - at for at, to in jumps if grid[0] < at and LEAST < to - at < MOST]
    each = [width * happens for happens in COPIES for width in _widths(coded)]
    copies = sum(length * turns for length, turns in zip(planes, each, strict=True))
    left_out = sum(x for x, runs in zip(blocks, BLOCKS, strict=True) if runs != coded)
    return round((grid[1] - grid[0] + 1 - left_out - sum(planes) + copies) / CHUNK, 1)


def measure(chip: str) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        record, dump = Path(folder) / "record.json", Path(folder) / "dump"
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": FLAGS.format(dump),
            "TPU_SKIP_MDS_QUERY": "1",
            "JAX_PLATFORMS": "cpu",
        }
        of = ["--of", chip, "--json", str(record)]
        command = [sys.executable, "-m", "benchmarks.speed.aot_cycles", *of]
        subprocess.run(command, env=environment, check=True)
        files = {x.name: x for x in dump.rglob(f"*{KERNEL}*.txt")}
        schedule, final = (
            next(x for name, x in files.items() if name.endswith(label)).read_text()
            for label in ("-packed-bundles-post-ra.txt", "-final_bundles.txt")
        )
        kernel = _io.read_json(record)
    kernel["code_bytes"] = BUNDLE_BYTES * len(_BUNDLE.findall(final))
    clock, bandwidth = CLOCKS[chip], CHIPS[f"TPU {chip}"]
    found = {}
    for coded in (True, False):
        count = cycles(schedule, coded)
        state = {"ns_of_bytes": stored(*_widths(coded)), "ns_of_float32_adam": ADAM}
        found[f"{chip}{'' if coded else ', no codes'}"] = {
            "cycles_per_tile": count,
            "ns_per_tile": clock and round(count / clock * 1e9),
            **{name: round(step_bytes(n) * TILE / bandwidth * 1e9) for name, n in state.items()},
            **kernel,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", choices=CLOCKS, help="in this process: a chip")
    parser.add_argument("--json", type=Path, default=_io.RESULTS / "aot_cycles.json")
    options = parser.parse_args()
    if options.of:
        _io.write_json(options.json, compile_leaf(options.of))
        return
    kernels = {}
    for chip in tqdm(CLOCKS):
        kernels |= measure(chip)
    _io.write_json(
        options.json,
        {"environment": _io.environment() | {"libtpu": version("libtpu")}, "kernels": kernels},
    )
    table = Table("kernel", "cycles a tile", "ns", "ns of bytes", "VMEM", "code")
    names = "cycles_per_tile", "ns_per_tile", "ns_of_bytes", "vmem_bytes", "code_bytes"
    for kernel, x in kernels.items():
        table.add_row(kernel, *(str(x[name]) for name in names))
    Console().print(table)


if __name__ == "__main__":
    main()
