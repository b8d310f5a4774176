"""Every kernel backend against the XLA backend and against the oracle, interpreted on a CPU.

Codes, scales, rows and planes are the same bits. A compiler that fuses a product into a sum may
move a logarithm by an ulp, and the update with it. Statistics are summed in another order.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stquant_jax as stquant
from stquant_jax.backends import settle
from tests import common, oracle, oracle_storage, test_oracle

ALIGNMENT = {"pallas_tpu": 8, "pallas_gpu": 1}  # what they need: XLA then has their layout
TILE = {"tile": (32, 128)}
# Blocks of their own in both orientations, ragged along the groups, the lanes, both or neither;
# then what is laid out first: bands not in eights (TPU), folded, flat; exact. The interpreter of
# GPU kernels takes a second for a tile.
TREES = {
    "pallas_tpu": {
        "whole": (256, 256),
        "rows": (256, 380),
        "columns": (300, 256),
        "ragged": (250, 500),
        "bands": (60, 248),
        "folded": (160, 64),
        "flat": (9, 40, 36),
        "bias": (40,),
    },
    "pallas_gpu": {
        "rows": (60, 248),
        "columns": (250, 64),
        "folded": (160, 32),
        "flat": (9, 20, 36),
        "bias": (40,),
    },
}
ULP = 2.0**-23  # updates are around 1
# Roots are kept as logarithms: an ulp of one of up to 64 octaves, in the root.
LOG_ULP = 2.0**-18
RATE = 1e-2


@pytest.fixture(params=list(TREES))
def backend(request):
    try:
        settle(stquant.Storage(backend=request.param))
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


def storages(backend):
    """That of XLA, and that of the backend."""
    alignment = ALIGNMENT[backend]
    reference = stquant.Storage(backend="xla", row_alignment=alignment)
    return reference, stquant.Storage(backend=backend, row_alignment=alignment, interpret=True)


@functools.cache
def program(storage, nesterov=False):
    """A step. Widths are data in the state, so that one program serves all."""
    precision = stquant.Fixed(8, 8)
    tx = stquant.scale_by_adam_q(nesterov=nesterov, precision=precision, storage=storage)
    return jax.jit(tx.update)


@functools.cache
def fused_program(storage, stochastic):
    precision = stquant.Fixed(8, 8)
    tx = stquant.adamw(RATE, weight_decay=0.1, precision=precision, storage=storage)
    step = functools.partial(stquant.fused_update, tx, stochastic_rounding=stochastic)
    return tx, jax.jit(step)


def init(shapes, storage, mu=5, nu=4):
    """A state of these widths in an arena with room for the widest."""
    first, widest = (
        stquant.scale_by_adam_q(precision=precision, storage=storage)
        for precision in (stquant.Fixed(mu, nu), stquant.Fixed(8, 8))
    )
    params = common.zeros(shapes)
    return first.init(params)._replace(arena=jnp.zeros_like(widest.init(params).arena))


def assert_same(got, want):
    """Of two backends: (updates, state)."""
    (updates, state), (want_updates, want_state) = got, want
    for name in ("count", "arena", "mu_scale", "nu_scale", "nu_row", "exact"):
        np.testing.assert_array_equal(getattr(state, name), getattr(want_state, name), name)
    for name, update in updates.items():
        expected = want_updates[name]
        assert update.dtype == expected.dtype
        rtol = LOG_ULP + float(jnp.finfo(update.dtype).eps)
        np.testing.assert_allclose(np.float32(update), np.float32(expected), rtol, ULP, name)
    observed = zip(*map(jax.tree.leaves, (state.precision, want_state.precision)), strict=True)
    for x, y in observed:
        np.testing.assert_allclose(x, y, 1e-5, 1e-30)


def compare(
    backend, shapes, widths=(5, 4), dtype=np.float32, steps=3, spoil=lambda g, i: g, **rule
):
    """The backend and XLA from the same state for some steps, each with its own."""
    reference, storage = storages(backend)
    states = [init(shapes, reference, *widths)] * 2
    for i in range(steps):
        grads = spoil(common.gaussian(shapes, i, dtype=dtype), i)
        want = program(reference, **rule)(grads, states[0])
        got = program(storage, **rule)(grads, states[1])
        assert_same(got, want)
        states = [want[1], got[1]]


def test_leaves(backend):
    """All kinds of them, which share the arena."""
    compare(backend, TREES[backend])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_narrow_gradients(backend, dtype):
    compare(backend, {name: TREES[backend][name] for name in ("columns", "flat")}, dtype=dtype)


def test_every_width(backend):
    for widths in itertools.product(range(2, 9), range(9)):
        compare(backend, TILE, widths, steps=1)


def test_nesterov(backend):
    compare(backend, TILE, nesterov=True)


def test_extremes(backend):
    """Groups that are absent, come, go and are not finite, and gradients from tiny to huge."""

    def spoil(grads, i):
        g = grads["tile"]
        g[:, 0] = np.nan if i == 2 else 1.0
        g[5, 1] = np.inf if i == 1 else 1.0
        g[:, 2] = 0.0
        g[:, 3] = 1.0 if i == 1 else 0.0
        g[3, 4:64] = 0.0
        g[:, 64:96] *= 1e15
        g[:, 96:] *= 1e-17
        return grads

    compare(backend, TILE, spoil=spoil, steps=4)


def aligned(place, backend):
    """A leaf's tiles, and empty ones up to a multiple."""
    missing = (0, -len(place.element) % ALIGNMENT[backend]), (0, 0), (0, 0)
    element = np.pad(place.element, missing, constant_values=-1)
    return place._replace(element=element, group=np.pad(place.group, missing))


@pytest.mark.parametrize(("mu", "nu"), [(5, 4), (2, 0), (3, 1), (8, 8)])
def test_definitions(backend, mu, nu):
    """Against the definitions, without XLA's loop between."""
    shapes = TREES[backend]
    names = sorted(set(shapes) - {"bias"})
    places = {name: aligned(oracle_storage.place(shapes[name]), backend) for name in names}
    reference, storage = storages(backend)
    state = init(shapes, reference, mu, nu)
    for count in (1, 2):
        g, before = common.gaussian(shapes, count), state
        updates, state = program(storage)(g, state)
        test_oracle.assert_step(before, g, updates, state, oracle.Adam(), count, places)


@pytest.mark.parametrize(
    ("gradients", "params"),
    [(np.float32, np.float32), (np.float32, jnp.bfloat16), (jnp.bfloat16, np.float32)],
    ids=["float32", "to bfloat16", "to float32"],
)
def test_fused_update(backend, gradients, params):
    """New parameters in place of updates; bfloat16 ones at random."""
    shapes = {name: TREES[backend][name] for name in ("columns", "flat", "bias")}
    p = common.gaussian(shapes, 7, dtype=params)
    results = []
    for storage in storages(backend):
        tx, step = fused_program(storage, params == jnp.bfloat16)
        new, state = p, tx.init(p)
        for i in range(2):
            new, state = step(common.gaussian(shapes, i, dtype=gradients), state, new)
        results.append((new, state))
    (want, want_state), (new, state) = results
    np.testing.assert_array_equal(state[0].arena, want_state[0].arena)
    for name in shapes:
        assert new[name].dtype == params
        off = 2 * RATE * LOG_ULP  # an update of up to two, and then the sum's own rounding
        np.testing.assert_allclose(np.float32(new[name]), np.float32(want[name]), ULP, off)
