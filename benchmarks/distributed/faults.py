"""Training that is killed: `examples.train_pod` gets SIGKILL again and again, and starts anew.

    python -m benchmarks.distributed.faults

kills it at random times, while it trains and while it saves, then lets it finish. Parameters and
optimizer state must be those of a run that nobody disturbed, bit for bit, and no checkpoint that
was complete may be lost. Takes about five minutes on two cores.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from benchmarks._io import RESULTS, environment, write_json

ROOT = Path(__file__).parents[2]
# Two devices; a step takes a few hundredths of a second, and bits move every seventh.
FLAGS = "--cpu-devices 2 --fsdp 2 --batch 4 --length 32 --interval 7 --log-every 1".split()


def start(*flags: Any, env: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """A training process, its lines in its ``stdout``."""
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    own |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "examples.train_pod", *map(str, flags)]
    return subprocess.Popen(
        command, cwd=ROOT, env=own | env, text=True, stdout=subprocess.PIPE, **options
    )


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    """What is still to come from a process that has to end well."""
    told, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"training ended with code {process.returncode}")
    return [line for line in told.splitlines() if line.startswith("step ")]


def read(directory: Path, step: int) -> dict[str, np.ndarray]:
    """A checkpoint's arrays by their paths, wherever it was written."""
    path, reader = directory.absolute() / str(step) / "default", ocp.PyTreeCheckpointer()
    shapes = reader.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    leaves = jax.tree_util.tree_leaves_with_path(reader.restore(path, restore_args=as_numpy))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Paths at which two checkpoints have not the same bits."""
    return sorted(
        path
        for path in a.keys() | b.keys()
        if path not in a
        or path not in b
        or (a[path].shape, a[path].dtype) != (b[path].shape, b[path].dtype)
        or a[path].tobytes() != b[path].tobytes()
    )


def complete(directory: Path) -> int:
    """The newest checkpoint that has its name: Orbax gives it last."""
    return max((int(p.name) for p in directory.iterdir() if p.name.isdigit()), default=0)


def kill(lines: int, delay: float, directory: Path, **options: Any) -> dict[str, Any]:
    """Trains for so many steps and seconds, and what was seen when the process was killed."""
    process = start(*options.pop("flags"), "--directory", directory, **options)
    assert process.stdout
    seen = list(itertools.islice(process.stdout, lines))
    time.sleep(delay)
    process.kill()
    seen += process.stdout.readlines()
    died = process.wait() < 0
    seen = [line.strip() for line in seen if line.startswith("step ") and line.endswith("\n")]
    steps = [int(line.split()[1]) for line in seen]  # of "step 12 loss 3.4567"
    return {
        "killed": died,
        "resumed_from": steps[0] - 1,
        "reached": steps[-1],
        "saving": any("tmp" in path.name for path in directory.iterdir()),
        "complete": complete(directory),
        "losses": seen,
    }


def faults(where: Path, kills: int, steps: int, seed: int, save_every: int = 3) -> dict[str, Any]:
    """A run that is killed so many times against one that is not.

    Every other time death comes within 0.3 s of a step after which it saves, else at any time.
    """
    calm, hard = where / "calm", where / "hard"
    flags = [*FLAGS, "--steps", steps, "--save-every", save_every]
    env = {  # compile once
        "JAX_COMPILATION_CACHE_DIR": str(where / "cache"),
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    undisturbed = lines_of(start(*flags, "--directory", calm, env=env))
    draw, hits, other = random.Random(seed), [], []
    for i in tqdm(range(kills), desc="kills", disable=None):
        most = 4 * save_every
        lines = save_every * draw.randint(1, 4) if i % 2 else draw.randint(1, most)
        hit = kill(
            lines, draw.uniform(0, 0.3), hard, flags=flags, env=env, stderr=subprocess.DEVNULL
        )
        other += [line for line in hit.pop("losses") if line not in undisturbed]
        hits.append({"before": hits[-1]["complete"] if hits else 0} | hit)
    told = lines_of(start(*flags, "--directory", hard, env=env))
    want, got = read(calm, steps), read(hard, steps)
    return {
        "steps": steps,
        "kills": sum(hit["killed"] for hit in hits),
        "during_a_save": sum(hit["killed"] and hit["saving"] for hit in hits),
        "resumed_from": [hit["resumed_from"] for hit in hits],
        "from_the_newest": all(hit["resumed_from"] == hit["before"] for hit in hits),
        "never_lost": all(hit["complete"] >= hit["before"] for hit in hits),
        "other_losses": other + [line for line in told if line not in undisturbed],
        "arrays": len(want),
        "differing": differing(want, got),
        "hits": hits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        record = faults(Path(where), args.kills, args.steps, args.seed)
    write_json(RESULTS / "faults.json", {"environment": environment(), **record})
    print(json.dumps({name: value for name, value in record.items() if name != "hits"}, indent=1))
    if record["differing"] or record["other_losses"] or not record["never_lost"]:
        raise SystemExit("not the same training")


if __name__ == "__main__":
    main()
