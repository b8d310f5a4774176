"""The TPU kernel beyond parity (tests/test_backends.py): races, lowering, refusals."""

import jax
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

import stquant_jax as stquant
from tests import common

PRECISION = stquant.Fixed(5, 4)
# Four chunks, and whole blocks of mu's scales: this interpreter pads what is updated in place.
SHAPES = {"leaf": (256, 512)}


def optimizer(**storage):
    return stquant.scale_by_adam_q(precision=PRECISION, storage=stquant.Storage(**storage))


@pytest.mark.thorough
def test_no_races():
    """Copies of planes overlap the arithmetic: nothing may be read before it has arrived, nor be
    overwritten before it has left."""
    interpret = pltpu.InterpretParams(detect_races=True)
    kernel = optimizer(backend="pallas_tpu", interpret=interpret)
    grads = common.gaussian(SHAPES)
    state = kernel.init(grads)
    _, got = jax.block_until_ready(jax.jit(kernel.update)(grads, state))
    assert interpret_pallas_call.races.races_found is False
    _, want = jax.jit(optimizer(backend="xla").update)(grads, state)
    np.testing.assert_array_equal(got.arena, want.arena)


@pytest.mark.parametrize("backend", ["pallas_tpu", None])
def test_lowering(backend):
    """For a TPU, on any machine; where nothing is named, for the platform that is there."""
    tx = optimizer(backend=backend)
    grads = common.zeros({**SHAPES, "ragged": (250, 500)})
    args = grads, jax.eval_shape(tx.init, grads)
    text = export.export(jax.jit(tx.update), platforms=["tpu"])(*args).mlir_module()
    assert ("tpu_custom_call" in text) == (backend == "pallas_tpu")


def test_choice(monkeypatch):
    """Where there is a TPU the kernels run there, and XLA where else it is lowered for."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    grads = common.zeros({**SHAPES, "bands": (60, 248)})  # four tiles, and four more to align
    tx = optimizer()
    args = grads, jax.eval_shape(tx.init, grads)
    assert stquant.plan(grads, PRECISION).backend == "pallas_tpu"
    assert args[1].mu_scale.shape[0] == 40
    for platform, kernels in (("tpu", True), ("cpu", False)):
        module = export.export(jax.jit(tx.update), platforms=[platform])(*args).mlir_module()
        assert ("tpu_custom_call" in module) == kernels


def test_named_runs_or_raises():
    """On a CPU, without the interpreter, the error says what would."""
    tx = optimizer(backend="pallas_tpu")
    grads = common.zeros(SHAPES)
    with pytest.raises(ValueError, match=r"pallas_tpu.*cannot run on cpu.*interpret=True"):
        tx.update(grads, tx.init(grads))


def test_alignment():
    tx = stquant.Storage(backend="pallas_tpu", row_alignment=4)
    with pytest.raises(ValueError, match="row_alignment=4.*pallas_tpu.*multiple of 8"):
        stquant.plan(common.zeros(SHAPES), storage=tx)
    aligned = stquant.Storage(backend="pallas_tpu", row_alignment=16)
    assert stquant.plan(common.zeros(SHAPES), storage=aligned).backend == "pallas_tpu"
