"""The state goes through jit, scan, donation and vmap like any other, bit for bit.

tests/conformance has what all optimizers go through.
"""

import re
import warnings
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import stquant_jax as stquant
from tests import common

TX = stquant.scale_by_adam_q(precision=stquant.Fixed(5, 4))
SMALL = {"bias": (40,), "tile": (128, 32)}
MODEL = {f"w{i}": (256, 1024 + 128 * i) for i in range(3)} | {"bias": (1024,)}


STEP = jax.jit(chex.assert_max_traces(TX.update, n=1))


def test_scan_equals_steps():
    """Steps under `lax.scan` are the same steps, bit for bit; only statistics are rounded apart."""

    def step(state, i):
        shapes = SMALL.items()
        g = {name: jax.random.normal(jax.random.key(i), shape) for name, shape in shapes}
        updates, state = TX.update(g, state)
        return state, updates

    steps, state = jnp.arange(1000), TX.init(common.zeros(SMALL))
    scanned, updates = jax.jit(lambda state: jax.lax.scan(step, state, steps))(state)
    jitted, updates = jax.jit(step), jax.device_get(updates)
    for i in range(len(steps)):
        state, last = jitted(state, i)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x, y[i]), last, updates)
    close = partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, state.precision, scanned.precision)
    state, scanned = (x._replace(precision=None) for x in (state, scanned))
    jax.tree.map(np.testing.assert_array_equal, state, scanned)


def test_one_compilation():
    """Neither a second step nor other widths compile again."""
    state = TX.init(common.zeros(SMALL))
    for i in range(3):
        _, state = STEP(common.gaussian(SMALL, i), state)
    plan = state.precision.plan
    narrow = state.precision._replace(plan=plan._replace(widths=plan.widths - 1))
    STEP(common.gaussian(SMALL), state._replace(precision=narrow))
    assert STEP._cache_size() == 1


def test_in_place():
    """With donation every byte of the state aliases, and nothing of it is copied.

    XLA would copy what is read after it was written.
    """
    params = common.zeros(MODEL)
    state, step = TX.init(params), jax.jit(TX.update, donate_argnums=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 'Some donated buffers were not usable'
        program = step.lower(params, state).compile()
    memory, text = program.memory_analysis(), program.as_text()
    assert memory.alias_size_in_bytes >= common.nbytes(state)
    assert memory.temp_size_in_bytes <= 2 * common.nbytes(params)
    for x in (state.arena, state.mu_scale, state.nu_scale, state.nu_row):
        dtype = {"uint32": "u32", "uint16": "u16", "uint8": "u8"}[x.dtype.name]
        shape = re.escape(f"{dtype}[{','.join(map(str, x.shape))}]")
        assert re.search(rf"= {shape}\S* (parameter|get-tuple-element)\(", text)  # is it spelled so
        assert not re.findall(rf"= {shape}\S* copy\(.*", text)


def test_shapes_alone():
    """`init` needs no values: `eval_shape` gives the state's shapes. All of it is arrays."""
    params = common.zeros()
    abstract = jax.eval_shape(TX.init, jax.eval_shape(lambda: params))
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, TX.init(params))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(TX.init(params)))


def test_ensemble():
    """Under vmap each member is what it is alone."""
    members = [common.gaussian(SMALL, seed=i) for i in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *members)
    together = jax.jit(jax.vmap(TX.update))(stack, jax.vmap(TX.init)(stack))
    for i, g in enumerate(members):
        updates, state = jax.tree.map(lambda x, i=i: x[i], together)
        want, alone = STEP(g, TX.init(g))
        chex.assert_trees_all_close(updates, want, rtol=1e-5)
        assert state.count == alone.count == 1
        assert np.mean(np.asarray(state.nu_scale) != alone.nu_scale) < 0.02


def test_inject_hyperparams():
    """Policies and storage are no numbers, so they need not be named static. A learning rate that
    is set in the state counts from then on."""
    params = {"tile": jnp.ones((128, 32)), "bias": jnp.ones(40)}
    make = optax.inject_hyperparams(stquant.adamw, hyperparam_dtype=jnp.float32)
    tx = make(1e-2, b1=0.8, weight_decay=0.0, precision=stquant.Fixed(5, 4))
    state, step = tx.init(params), jax.jit(tx.update)
    for rate in (1e-2, 1e-2, 2e-2):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        updates, state = step(params, state, params)
        # A row that moves puts 1/32 octave between its elements and the others.
        np.testing.assert_allclose(updates["tile"], -rate, rtol=0.02)
