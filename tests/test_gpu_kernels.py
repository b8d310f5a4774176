"""The GPU kernels beyond parity (tests/test_backends.py): races, lowering, Nesterov's gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stquant_jax as stquant
from stquant_jax.backends import pallas_gpu
from tests import common

if reason := pallas_gpu.unsupported():
    pytest.skip(f"backend 'pallas_gpu': {reason}", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from pallas_kernels.gpu import calls  # noqa: E402

STORAGE = {
    "xla": stquant.Storage(backend="xla"),
    "pallas_gpu": stquant.Storage(backend="pallas_gpu", interpret=True),
}
COLUMNS, TILE = (250, 64), (32, 128)
WIDEST, NARROW = stquant.Fixed(8, 8), stquant.Fixed(4, 3)


@functools.cache
def step(storage, precision=WIDEST, nesterov=False):
    """A compiled step."""
    options = {"nesterov": nesterov, "precision": precision, "storage": storage}
    tx = stquant.adamw(1e-2, weight_decay=0.1, **options)
    return jax.jit(functools.partial(stquant.fused_update, tx, stochastic_rounding=True))


def gaussian(shapes, dtypes, seed):
    grads = common.gaussian(shapes, seed)
    return {name: g.astype(dtypes.get(name, np.float32)) for name, g in grads.items()}


def close(x, y, name):
    """Arrays of one dtype, but for the last places that exponents of 60 leave to a float32."""
    assert x.dtype == y.dtype
    tolerance = float(jnp.finfo(x.dtype).eps) * (64 if x.dtype == jnp.float32 else 2)
    x, y = np.float32(x), np.float32(y)
    np.testing.assert_allclose(x, y, tolerance, tolerance * np.nanmax(np.abs(y)), err_msg=name)


def test_nesterov():
    """Parameters are fetched to where the gradients were, which this rule needs once more."""
    shapes = {"narrow": (64, 120)}
    grads = gaussian(shapes, {}, 0)
    params = gaussian(shapes, {"narrow": jnp.bfloat16}, 1)
    tx = stquant.adamw(1e-2, weight_decay=0.1, precision=WIDEST)
    results = {
        name: step(storage, nesterov=True)(grads, tx.init(params), params)
        for name, storage in STORAGE.items()
    }
    for name in shapes:
        close(*(results[backend][0][name] for backend in STORAGE), name)
        assert results["pallas_gpu"][0][name].dtype == params[name].dtype


def test_no_races(capfd):
    """Of threads with the copy engine, and of tiles with one another."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    storage = stquant.Storage(backend="pallas_gpu", interpret=interpret)
    shapes = {"leaf": (120, 64)}
    grads = gaussian(shapes, {"leaf": jnp.bfloat16}, 0)
    params = gaussian(shapes, {}, 1)
    tx = stquant.adamw(1e-2, precision=NARROW, storage=storage)
    jax.block_until_ready(step(storage, NARROW)(grads, tx.init(params), params))
    assert "RACE" not in capfd.readouterr().out


def test_lowering():
    """For a GPU that is not there: one launch per geometry, the state updated in place."""
    shapes = {"a": TILE, "b": COLUMNS, "c": TILE, "d": TILE}
    storage = stquant.Storage(backend="pallas_gpu")
    tx = stquant.scale_by_adam_q(precision=NARROW, storage=storage)
    params = common.zeros(shapes)
    traced = jax.jit(tx.update).trace(params, tx.init(params))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"custom_call @mosaic_gpu.*", text)
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.count("output_operand_alias<") == 4
    assert len(re.findall(r"call @_update_leaves", text)) == len(kernels)


def test_launches():
    """Leaves that are alike are updated together, at most 16 and evenly: a number is a kernel."""
    batches = calls._batches(["a", "b", *["a"] * 33])
    assert [len(batch) for batch in batches] == [12, 12, 10, 1]
    assert sorted(i for batch in batches for i in batch) == list(range(35))
    assert batches[-1] == [1]
