"""Optax's own suite of contributed optimizers, as it is installed, with ours in the place of its
table: default storage, a budget of eight bits, parameters of a few elements.

Its methods are called as they are, each with the arguments that it is tried with there.
"""

import inspect
import re
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
from optax.contrib import _common_test as contrib

from tests.conformance.cases import CASES, Case
from tests.conformance.shared import EXACT


def axes(**values):
    return [dict(zip(values, x, strict=True)) for x in product(*values.values())]


TARGETS = [
    getattr(contrib, f"_setup_{name}")
    for name in ("parabola", "rosenbrock", "matrix_parabola", "mixed_tensor_target")
]
FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
NARROW = axes(dtype=("bfloat16", "float32"))
# Those of wrappers around any optimizer, and all.
WRAPPED = {
    "test_optimizers_accept_extra_args": axes(wrap=(True, False)),
    "test_optimizers": axes(target=TARGETS, dtype=("float32",)),
    "test_state_shape_dtype_shard_stability": axes(dtype=FLOATS),
    "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": axes(),
}
ALL = WRAPPED | {
    "test_optimizers_can_be_wrapped_in_inject_hyperparams": axes(),
    "test_preserve_dtype": NARROW,
    "test_gradient_accumulation": NARROW,
}


class Line(NamedTuple):
    """Of the table: an optimizer's arguments, and a wrapper around it with its own."""

    case: Case
    options: dict[str, Any]
    wrapper: str | None = None
    wrapper_options: dict[str, Any] | None = None

    def __str__(self):
        return f"{self.case.name}, {self.wrapper}" if self.wrapper else self.case.name


def mechanized(case):
    """As Optax's table has it around any: with a rate of 1, and a longer memory of signs."""
    memory = {"b1": 0.99} if "lion" in case.name else {}
    return Line(case, {"learning_rate": 1.0} | memory, "mechanize", {"weight_decay": 0.0})


# Those that take a learning rate, as all in Optax's table do.
ALIASES = [case for case in CASES if not case.direction]
(SGD,) = (case for case in ALIASES if case.name.startswith("sgd"))
LINES = [
    *(Line(case, {"learning_rate": case.rate / 10}) for case in ALIASES),
    *map(mechanized, ALIASES),
    Line(SGD, {"learning_rate": 1e-3}, "schedule_free", {"learning_rate": 1e-3}),
    Line(SGD, {"learning_rate": 1e-4}, "reduce_on_plateau", {}),
]
TESTED = [
    (line, test) for line in LINES for test in (WRAPPED if line.wrapper == "mechanize" else ALL)
]


def factory(case):
    """What makes ours; hyperparameters that cannot be injected are not among its arguments."""
    make = partial(case.make, **case.options, **case.own(EXACT))

    def made(*args, **kwargs):
        return make(*args, **kwargs)

    signature = inspect.signature(make)
    injected = [x for name, x in signature.parameters.items() if name not in case.static]
    made.__signature__ = signature.replace(parameters=injected)  # pyright: ignore[reportFunctionMemberAccess]
    return made


@pytest.mark.parametrize(("line", "test"), TESTED, ids=str)
def test_suite(monkeypatch, line, test):
    if not hasattr(contrib.ContribTest, f"{test}0"):
        pytest.skip("this Optax has no such test")
    monkeypatch.setattr(contrib, "_get_opt_factory", lambda _: factory(line.case))
    suite = contrib.ContribTest(f"{test}0")
    method = partial(getattr(suite, f"{test}0").__wrapped__, suite)
    for arguments in ALL[test]:
        method(
            opt_name=line.case.make.__name__,
            opt_kwargs=line.options,
            wrapper_name=line.wrapper,
            wrapper_kwargs=line.wrapper_options,
            **arguments,
        )


def test_all_of_it():
    """Nothing of the suite is left out."""
    methods = (name for name in dir(contrib.ContribTest) if name.startswith("test"))
    # Variants are numbered, or have their arguments in their names.
    assert {re.sub(r"(\d+|_\(.*)$", "", name) for name in methods} <= ALL.keys()
