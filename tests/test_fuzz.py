"""A few random runs of few programs; `python -m benchmarks.codec.fuzz` has more of both."""

import hypothesis
import pytest
from hypothesis.stateful import run_state_machine_as_test

from tests.machine import Machine


@pytest.mark.thorough
def test_fuzz():
    class Few(Machine):
        few = True

    settings = hypothesis.settings(
        max_examples=10,
        stateful_step_count=12,
        phases=[hypothesis.Phase.generate],  # what fails is small already, and slow to shrink
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(Few, settings=settings)
