"""Random runs of optimizers, checked against float64 after every step (`tests/machine.py`).

    python -m benchmarks.codec.fuzz --minutes 10 --seed 0

Runs until the time is over, each batch of runs from a seed of its own, by which it can be repeated:
``--seed 12 --batches 1``.
"""

import argparse
import json
import time
import traceback
from importlib.metadata import version
from typing import Any

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

from benchmarks._io import RESULTS, environment, write_json
from tests.machine import Machine

RUNS, LENGTH = 10, 25  # of a batch, and operations of each at most


def batch(seed: int) -> str | None:
    """Runs that this seed stands for; what failed, if anything."""
    settings = hypothesis.settings(
        max_examples=RUNS,
        stateful_step_count=LENGTH,
        database=None,
        deadline=None,
        print_blob=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=settings)
    except Exception as error:
        steps = "\n".join(getattr(error, "__notes__", []))
        return f"{traceback.format_exc(limit=-2)}\n{steps}"
    return None


def fuzz(seed: int, minutes: float, batches: int | None = None) -> dict[str, Any]:
    start, failures, done = time.monotonic(), [], 0
    while time.monotonic() < start + 60 * minutes and done != batches:
        failed = batch(seed + done)
        if failed:
            failures.append({"seed": seed + done, "error": failed})
        done += 1
    return {
        "seed": seed,
        "minutes": (time.monotonic() - start) / 60,
        "batches": done,
        "runs": done * RUNS,
        "operations": dict(Machine.operations),
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int)
    args = parser.parse_args()
    record = fuzz(args.seed, args.minutes, args.batches)
    packages = environment() | {"hypothesis": version("hypothesis")}
    write_json(RESULTS / "fuzz.json", {"environment": packages, **record})
    print(json.dumps(record, indent=1))
    if record["failures"]:
        raise SystemExit("an invariant does not hold")


if __name__ == "__main__":
    main()
