"""The GPU kernels against the XLA backend, in Mosaic's interpreter, and what they lower to.

The interpreter runs the kernels' own operations one by one, so that codes, scales and rows agree to
the bit. Only sums over lanes and what XLA fuses may differ, by a last bit of an update.
"""

import functools
import itertools
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

STORAGE = {
    "xla": stquant.Storage(backend="xla"),
    "pallas_gpu": stquant.Storage(backend="pallas_gpu", interpret=True),
}
ROWS, COLUMNS, TILE = (60, 248), (250, 64), (32, 128)  # the former two with ragged edges


@functools.cache
def step(storage, nesterov=False, fused=False):
    """A compiled step for all widths, which are data in the state."""
    options = {"nesterov": nesterov, "precision": stquant.Fixed(8, 8), "storage": storage}
    if not fused:
        return jax.jit(stquant.scale_by_adam_q(**options).update)
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


def agree(state, reference):
    for name in ("count", "arena", "mu_scale", "nu_scale", "nu_row"):
        np.testing.assert_array_equal(getattr(state, name), getattr(reference, name), name)
    observed = zip(*map(jax.tree.leaves, (state.precision, reference.precision)), strict=True)
    for x, y in observed:
        np.testing.assert_allclose(x, y, 1e-5, 1e-30)


def compare(shapes, widths=(4, 3), dtypes=None, steps=2, spoil=lambda g, i: None, **options):
    """Both backends from zero for some steps."""
    states = dict.fromkeys(STORAGE, common.init(common.zeros(shapes), *widths))
    for i in range(steps):
        grads = gaussian(shapes, dtypes or {}, i)
        spoil(grads, i)
        results = {name: step(s, **options)(grads, states[name]) for name, s in STORAGE.items()}
        (updates, state), (expected, reference) = results["pallas_gpu"], results["xla"]
        agree(state, reference)
        for name, u in updates.items():
            close(u, expected[name], name)
        states = {name: state for name, (_, state) in results.items()}


def test_leaves_where_they_are():
    """Groups along the rows and along the columns, ragged, of both sizes."""
    shapes = {"rows": ROWS, "columns": COLUMNS, "rows2": (32, 120), "columns2": (120, 32)}
    compare(shapes, dtypes={"rows2": jnp.bfloat16, "columns2": jnp.bfloat16})


def test_staged_leaves():
    """Folded, flat with a ragged end, and rows that the copy engine cannot fetch."""
    shapes = {"folded": (160, 32), "flat": (70, 60), "odd": (60, 121)}
    compare(shapes, dtypes={"folded": jnp.float16})


def test_extremes():
    """Groups that are absent, come, go and are not finite; tiny and huge; Nesterov's rule."""

    def spoil(grads, i):
        g = grads["tile"]
        g[:, :4] = [np.nan if i == 2 else 1.0, 1.0, 0.0, float(i == 1)]
        g[5, 1] = np.inf if i == 1 else 1.0
        g[3, 4:64] = 0.0
        g[:, 64:96] *= 1e15
        g[:, 96:] *= 1e-17

    compare({"tile": TILE}, spoil=spoil, steps=4, nesterov=True)


def test_every_width():
    for widths in itertools.product(range(2, 9), range(9)):
        compare({"tile": TILE}, widths, steps=1)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fused_update(nesterov):
    """Parameters fetched to where the gradients were, of another dtype or not, or beside them."""
    shapes = {"narrow": (32, 120)}
    if not nesterov:
        shapes |= {"same": TILE, "wide": (120, 32)}
    grads = gaussian(shapes, {"wide": jnp.bfloat16}, 0)
    params = gaussian(shapes, {"narrow": jnp.bfloat16}, 1)
    tx = stquant.adamw(1e-2, weight_decay=0.1, precision=stquant.Fixed(8, 8))
    results = {
        name: step(storage, nesterov, fused=True)(grads, tx.init(params), params)
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
    tx = stquant.adamw(1e-2, precision=stquant.Fixed(4, 3), storage=storage)
    jax.block_until_ready(step(storage, fused=True)(grads, tx.init(params), params))
    assert "RACE" not in capfd.readouterr().out


def test_lowering():
    """For a GPU that is not there: one kernel per geometry, the state updated in place."""
    shapes = {"a": TILE, "b": COLUMNS, "c": TILE, "d": TILE}
    storage = stquant.Storage(backend="pallas_gpu")
    tx = stquant.scale_by_adam_q(precision=stquant.Fixed(4, 3), storage=storage)
    params = common.zeros(shapes)
    traced = jax.jit(tx.update).trace(params, tx.init(params))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"custom_call @mosaic_gpu.*", text)
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.count("output_operand_alias<") == 4
    assert len(re.findall(r"call @_update_leaf", text)) == len(shapes)
