"""`jax_enable_x64`: float64 gradients give float64 updates, the state stays as it is."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.conformance.cases import STORAGES

ROOT = Path(__file__).parents[2]


@cache
def outcomes():
    run = subprocess.run(
        [sys.executable, "-m", "tests.conformance.x64"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_float64(case):
    for storage in STORAGES:
        error = outcomes()[f"{case.name}, {storage}"]
        with case.can("x64"):
            if error:
                raise ValueError(error)
