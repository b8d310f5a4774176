"""What the tests of all optimizers share: a small model, its gradients, programs compiled once."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stquant_jax as stquant
from tests.conformance.cases import CAPABILITIES, Case

# All leaves in the arena, and all of them exact: none has 4096 elements.
PACKED, EXACT = stquant.Storage(min_size=0), stquant.Storage()
STORAGES = {"packed": PACKED, "exact": EXACT}

SHAPES = {"bias": (3,), "kernel": (48, 40), "scale": ()}


def params(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    return {name: jnp.ones(shape, dtype) for name, shape in SHAPES.items()}


def gradients(seed: int = 0, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.standard_normal(x), dtype) for name, x in SHAPES.items()}


def can(case: Case, capability: str) -> AbstractContextManager:
    """Where the capability is lacking, what follows raises the error that is promised."""
    assert capability in CAPABILITIES
    limit = case.limits.get(capability)
    return nullcontext() if limit is None else pytest.raises(Exception, match=limit)


@cache
def compiled(case: Case, storage: stquant.Storage) -> optax.GradientTransformation:
    """The optimizer with its update compiled, once for all tests on float32 `params`. Wrappers are
    called op by op around it."""
    tx = case.optimizer(storage)
    return optax.GradientTransformation(tx.init, jax.jit(tx.update))


@cache
def steps(case: Case, storage: stquant.Storage, count: int = 4) -> list[tuple[Any, Any]]:
    """Updates and states of the first steps."""
    tx, out = compiled(case, storage), []
    state = tx.init(params())
    for seed in range(count):
        updates, state = tx.update(gradients(seed), state, params())
        out.append((updates, state))
    return out


def types(tree: Any) -> Any:
    """Structure, shapes and dtypes, to compare."""
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x).name), tree)
