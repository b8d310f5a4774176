"""A training process is killed at random times, restarted, and ends as if nothing had happened."""

import numpy as np
import pytest

from benchmarks.distributed import faults


@pytest.mark.thorough
def test_killed_and_restarted(tmp_path):
    """`python -m benchmarks.distributed.faults` does it thirty times."""
    record = faults.faults(tmp_path, kills=3, steps=60, seed=0)
    assert record["kills"] == 3
    assert record["resumed_from"][-1] > 0  # it had something to lose
    assert record["from_the_newest"] and record["never_lost"]
    assert not record["other_losses"] and not record["differing"]


def test_differing():
    """What decides on that sees a bit, a dtype and an array too many."""
    a = {"x": np.float32([1, np.nan]), "y": np.uint8([1])}
    assert not faults.differing(a, {name: x.copy() for name, x in a.items()})
    assert faults.differing(a, a | {"x": np.float32([-1, np.nan])}) == ["x"]
    assert faults.differing(a, a | {"y": np.int8([1])}) == ["y"]
    assert faults.differing(a, a | {"z": np.float32([])}) == ["z"]
