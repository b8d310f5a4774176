"""All that a GPU can tell of the kernels, in one run of less than eight minutes.

    python -m benchmarks.gpu.suite

needs one card from Hopper on, jax 0.11.2 with CUDA, optax, flax, chex and numpy. Sections, in the
order of their weight:

    environment   card, versions
    parity        every kind of leaf against the XLA backend on the same card
    gpt2          time and bandwidth of an update of 124M parameters, next to Optax's
    memory        repeated runs equal, guard rows untouched, donated buffers kept
    gpt3-xl       the same as gpt2 of 1.3B parameters
    compilation   seconds, program and code of GPT-2 small
    training      GPT-2 small, 200 steps with optax.adamw and with stquant.adamw
    peers         PyTorch's fused AdamW and bitsandbytes, where they are installed
    races         JAX's race detector over the interpreted kernels, on the CPU

Each is a process of its own with a limit of time, so that one that hangs or breaks the card's
context leaves the others alone; results are written after every row. `--interpret --out FILE` runs
all of it at the size of a tile on a CPU, to test the suite itself: its times mean nothing.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _io
from benchmarks.gpu.setting import Setting

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

OUT = _io.RESULTS / "gpu_suite.json"
MINUTES = 7.5


class Section(NamedTuple):
    """``run`` is the module under benchmarks.gpu and its function, Setting to rows."""

    run: str
    seconds: float
    on_cpu: bool = False


SECTIONS = {
    "environment": Section("card:environment", 40),
    "parity": Section("checks:parity", 100),
    "gpt2": Section("speed:gpt2", 150),
    "memory": Section("checks:memory", 45),
    "gpt3-xl": Section("speed:gpt3_xl", 100),
    "compilation": Section("programs:compilation", 75),
    "training": Section("training:gpt2", 130),
    "peers": Section("peers:torch_optimizers", 40),
    "races": Section("checks:races", 60, on_cpu=True),
}


def rows_of(name: str, setting: Setting) -> Iterator[dict[str, Any]]:
    module, function = SECTIONS[name].run.split(":")
    yield from getattr(import_module(f"benchmarks.gpu.{module}"), function)(setting)


def work(name: str, seconds: float) -> None:
    """In a process of its own: rows as lines of JSON."""
    for row in rows_of(name, Setting(deadline=time.monotonic() + seconds)):
        print(json.dumps({"row": row}), flush=True)


def in_process(name: str, seconds: float, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a section's own process, which ends at its limit; how it ended goes to ``record``."""
    command = [sys.executable, "-m", "benchmarks.gpu.suite", "--worker", name]
    command += ["--seconds", str(seconds)]
    # The card is one process's alone.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", **os.environ, "TQDM_DISABLE": "1"}
    if SECTIONS[name].on_cpu:
        environment["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryFile("w+") as told:
        worker = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            worker.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        with worker:
            assert worker.stdout
            for line in worker.stdout:
                if line.startswith('{"row": '):
                    yield json.loads(line)["row"]
        timer.cancel()
        if worker.returncode:
            limit = f"stopped at its limit of {seconds:.0f} s"
            record["ended"] = limit if late.is_set() else f"failed with code {worker.returncode}"
            told.seek(0)
            record["told"] = told.read()[-3000:]


def run_section(
    name: str, left: float, interpret: bool, record: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of a section; what became of it is noted in its record."""
    limit = min(SECTIONS[name].seconds, left)
    start = time.monotonic()
    record |= {"limit_seconds": round(limit, 1), "ended": "done"}
    if limit < 10:
        record["ended"] = "not started: no time left"
        return
    try:
        if interpret:
            yield from rows_of(name, Setting(interpret=True, deadline=start + limit))
        else:
            yield from in_process(name, limit, record)
    except Exception as error:  # of one section; the next one may run
        record["ended"] = f"failed: {type(error).__name__}: {error}"
    finally:
        record["seconds"] = round(time.monotonic() - start, 2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--sections",
        nargs="+",
        default=list(SECTIONS),
        choices=SECTIONS,
        metavar="SECTION",
        help="some of them, after the environment",
    )
    add("--minutes", type=float, default=MINUTES, help=f"for all of them, default {MINUTES}")
    add("--interpret", action="store_true", help="one tile, on the CPU; needs --out")
    add("--out", type=Path, help=f"default: {OUT.relative_to(Path(__file__).parents[2])}")
    add("--worker", choices=SECTIONS, help=argparse.SUPPRESS)
    add("--seconds", type=float, default=float("inf"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.interpret:
        if args.out is None or _io.RESULTS.resolve() in args.out.resolve().parents:
            parser.error("--interpret measures nothing: expected --out, outside of results")
    args.out = args.out or OUT
    args.sections = [name for name in SECTIONS if name in {"environment", *args.sections}]
    return args


def main() -> None:
    args = parse()
    if args.worker:
        work(args.worker, args.seconds)
        return
    end = time.monotonic() + 60 * args.minutes
    options = ["--minutes", f"{args.minutes:g}", *["--interpret"] * args.interpret]
    command = shlex.join(["python", "-m", "benchmarks.gpu.suite", *options])
    record: dict[str, Any] = {"environment": {"command": command}, "interpret": args.interpret}
    record["sections"] = {}
    bar = tqdm(total=len(args.sections), unit="section") if tqdm else None
    for name in args.sections:
        if bar:
            bar.set_description(name)
        section = record["sections"][name] = {"rows": []}
        for row in run_section(name, end - time.monotonic(), args.interpret, section):
            if name == "environment":
                record["environment"] |= row
            else:
                section["rows"].append(row)
            _io.write_json(args.out, record)
        _io.write_json(args.out, record)
        print(f"{name}: {section['ended']}, {len(section['rows'])} rows", file=sys.stderr)
        if name == "environment" and section["ended"] != "done":
            raise SystemExit(section.get("told", section["ended"]))
        if bar:
            bar.update()
    print(args.out)


if __name__ == "__main__":
    main()
