"""`jax_enable_x64`: float64 gradients give float64 updates, the state stays as it is."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conformance import x64
from tests.conformance.shared import STORAGES, can

ROOT = Path(__file__).parents[2]


@cache
def found(what):
    run = subprocess.run(
        [sys.executable, "-m", "tests.conformance.x64", what],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.thorough
def test_float64(case):
    for storage in STORAGES:
        error = found("outcomes")[f"{case.name}, {storage}"]
        with can(case, "x64"):
            if error:
                raise ValueError(error)


def test_same_bits():
    """Of float32 gradients the same state is stored, whatever the switch."""
    assert found("digest") == x64.digest()
