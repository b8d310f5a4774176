"""Updates compiled for TPUs, ahead of time and without one.

That they compile is half of the test: Mosaic refuses what a chip cannot do. The other half is
memory: the state is overwritten where it lies. Needs libtpu, which `pip install '.[aot]'` brings.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import stquant_jax as stquant
from benchmarks.shapes import SETS
from benchmarks.speed import aot
from examples import train_gpt

pytest.importorskip("libtpu", reason="pip install '.[aot]' brings libtpu")

STORAGE = stquant.Storage(backend="pallas_tpu")
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def nbytes(*trees):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


def gpt2(tx, dtype=jnp.float32):
    """Shapes of GPT-2 small's 148 leaves and of their state."""
    params = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in SETS["gpt2"].items()}
    return params, jax.eval_shape(tx.init, params)


@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_update(chip):
    """With the policy, and the repacking that it may order."""
    tx = stquant.scale_by_adam_q(precision=stquant.Budget(5.0), storage=STORAGE)
    params, state = gpt2(tx)
    program = aot.compile_for(chip, tx.update, params, state, donate=(1,))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(state)
    assert memory.temp_size_in_bytes <= 0.1 * nbytes(params)
    assert aot.copies(program, state.arena) == 0
    assert "stquant_update" in program.as_text()  # the kernel's name


def test_fused_update():
    """bfloat16 parameters, overwritten too, and rounded at random."""
    tx = stquant.adamw(1e-3, precision=stquant.Budget(5.0), storage=STORAGE)
    params, state = gpt2(tx, jnp.bfloat16)
    step = functools.partial(stquant.fused_update, tx, stochastic_rounding=True)
    program = aot.compile_for("v5e", step, params, state, params, donate=(1, 2))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(params, state)
    assert memory.temp_size_in_bytes <= 0.1 * nbytes(params)
    assert aot.copies(program, state[0].arena) == 0


def test_data_parallel():
    """A training step of the demo's model on four chips: each has a part of the batch, all have the
    same parameters and state, and only gradients and the loss travel.
    """
    cfg = train_gpt.Config()
    graph, params = nnx.split(nnx.eval_shape(lambda: train_gpt.GPT(cfg, nnx.Rngs(0))))
    tx = stquant.adamw(cfg.lr, precision=stquant.Budget(5.0), storage=STORAGE)
    state = jax.eval_shape(tx.init, params)

    def step(params, state, text):
        def loss_of(params):  # a mean over all, so that gradients are means as well
            return jax.lax.pmean(train_gpt.loss_of(graph, params, text), "data")

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    mesh = Mesh(np.array(aot.devices("v5e")), "data")
    text = jax.ShapeDtypeStruct((cfg.batch, cfg.length + 1), jnp.uint8)
    arguments = (params, state, text)
    specs = (P(), P(), P("data"))
    placed = [
        aot.shapes(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)
    ]
    sharded = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
    program = jax.jit(sharded, donate_argnums=(0, 1)).lower(*placed).compile()
    (packed,) = (x for x in state if isinstance(x, stquant.ScaleByAdamQState))
    assert program.memory_analysis().alias_size_in_bytes >= nbytes(params, state)
    assert aot.copies(program, packed.arena) == 0
    travels = re.findall(rf" = (.*) (?:{COLLECTIVES})(?:-start)?\(", program.as_text())
    assert travels and not any(re.search(r"\b[us]\d+\[", shape) for shape in travels)
