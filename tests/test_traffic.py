"""What docs/explanation/kernels.md counts are bytes of real arrays."""

import jax
import jax.numpy as jnp
import optax
import pytest

import stquant_jax as stquant
from benchmarks.gpu.setting import gpt3_xl, stored_bytes
from benchmarks.memory import traffic
from benchmarks.shapes import SETS, size
from tests.common import nbytes

# Whole tiles, groups along the rows and along the columns.
PARAMS = {"rows": jnp.zeros((256, 512)), "columns": jnp.zeros((512, 128))}
ELEMENTS = sum(x.size for x in PARAMS.values())


@pytest.mark.parametrize(("mu", "nu"), [(2, 0), (5, 4), (8, 8)])
def test_stored(mu, nu):
    state = stquant.scale_by_adam_q(precision=stquant.Fixed(mu, nu)).init(PARAMS)
    arrays = state.arena, state.mu_scale, state.nu_scale, state.nu_row
    assert nbytes(arrays) == ELEMENTS * traffic.stored(mu, nu)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_update_reads_and_writes_its_arrays(dtype):
    """All arguments in, all results out, once: for ours, for Optax's, and with parameters."""
    grads = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    ours = stquant.scale_by_adam_q(precision=stquant.Fixed(5, 4))
    for tx in (ours, optax.scale_by_adam()):
        state = tx.init(PARAMS)
        updates, new = jax.eval_shape(lambda g, s, tx=tx: tx.update(g, s), grads, state)
        moved = nbytes(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (updates, new)))
        moved += nbytes((grads, state))
        counted = traffic.step_bytes(nbytes(state), nbytes(grads))
        if tx is not ours:  # its updates have the moments' dtype
            counted += nbytes(PARAMS) - nbytes(grads)
        assert moved == counted
    params = nbytes(PARAMS)
    assert traffic.step_bytes(1, params, params) - traffic.step_bytes(1, params) == params


def test_budget_on_gpt2():
    """About 10.5 bytes at 5 bits, exact leaves and padding included."""
    shapes = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in SETS["gpt2"].items()}
    elements = size(SETS["gpt2"])
    for bits, most in ((5.0, 10.5), (3.5, 9.75)):
        precision = stquant.Budget(bits)
        stored = stored_bytes(shapes, precision, stquant.Storage(backend="xla"))
        found = traffic.step_bytes(stored, 4 * elements) / elements
        assert most - 0.01 < found <= most
        assert most == traffic.step_bytes(traffic.stored_all_in(bits))


def test_stored_bytes_are_the_states():
    """With all rows of the arena in use."""
    precision = stquant.Fixed(5, 4)
    state = stquant.scale_by_adam_q(precision=precision).init(PARAMS)
    assert stored_bytes(PARAMS, precision, stquant.Storage(backend="xla")) == nbytes(state)


def test_float32_adam():
    assert traffic.step_bytes(traffic.ADAM) == 24
    assert traffic.step_bytes(traffic.ADAM, param=4) == 28


def test_backends_move_no_less():
    extra = {backend: traffic.extra_bytes(backend) for backend in traffic.BACKENDS}
    assert extra["xla"] == 0 and min(extra["pallas_tpu"], extra["pallas_gpu"]) > 0
    with pytest.raises(ValueError, match="backend='gpu'"):
        traffic.extra_bytes("gpu")


def test_gpt3_xl():
    assert size(gpt3_xl()) == pytest.approx(1.3e9, rel=0.02)
