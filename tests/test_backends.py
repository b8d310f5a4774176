"""Every backend against the XLA loop and against the oracle, kernels interpreted, on a CPU.

Codes, scales, rows and planes are the same bits. A compiler that fuses a product into a sum may
move a logarithm by an ulp, and the update with it. Statistics move with it, and a GPU
sums them in another order.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stquant_jax as stquant
from stquant_jax.backends import settle
from stquant_jax.codecs import MU_NOT_FINITE
from tests import common, oracle, oracle_storage, test_oracle
from tests.oracle_storage import GROUP

ALIGNMENT = {
    "pallas_tpu": 8,
    "pallas_gpu": 1,
    "xla_gpu": 1,
}  # what they need: XLA then has their layout
TILE = {"tile": (32, 128)}
# Blocks of their own in both orientations, ragged along the groups, the lanes or both; then what is
# laid out first: bands not in eights (TPU), rows that the copy engine cannot fetch (GPU), folded,
# flat without and with a ragged end; exact. The interpreter of GPU kernels takes a second a tile.
TREES = {
    "pallas_tpu": {
        "rows": (256, 380),
        "columns": (300, 256),
        "columns, bfloat16": (300, 256),
        "ragged": (250, 500),
        "bands": (60, 248),
        "folded, float16": (160, 64),
        "flat": (9, 40, 36),
        "tail": (70, 60),
        "bias": (40,),
    },
    "pallas_gpu": {
        "rows": (60, 248),
        "rows, bfloat16": (64, 120),
        "rows, second of a launch": (60, 248),
        "columns": (250, 64),
        "columns, bfloat16": (120, 64),
        "odd": (60, 121),
        "folded, float16": (160, 32),
        "tail": (70, 60),
        "bias": (40,),
    },
}
TREES["xla_gpu"] = TREES["pallas_tpu"]
APPLIED = {
    "pallas_tpu": {"same": (300, 256), "to bfloat16": (256, 256), "wide": (9, 20, 36)},
    "pallas_gpu": {
        "same": (32, 128),
        "same, too": (32, 128),
        "to bfloat16": (64, 120),
        "wide": (120, 64),
    },
}
APPLIED["xla_gpu"] = APPLIED["pallas_tpu"]
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
    return reference, stquant.Storage(
        backend=backend, row_alignment=alignment, interpret=backend.startswith("pallas")
    )


@functools.cache
def program(storage, nesterov=False):
    """A step. Widths are data in the state, so that one program serves all."""
    precision = stquant.Fixed(8, 8)
    tx = stquant.scale_by_adam_q(nesterov=nesterov, precision=precision, storage=storage)
    return jax.jit(tx.update)


def init(shapes, storage, mu=5, nu=4):
    """A state of these widths in an arena with room for the widest."""
    first, widest = (
        stquant.scale_by_adam_q(precision=precision, storage=storage)
        for precision in (stquant.Fixed(mu, nu), stquant.Fixed(8, 8))
    )
    params = common.zeros(shapes)
    return first.init(params)._replace(arena=jnp.zeros_like(widest.init(params).arena))


def gaussian(shapes, seed):
    """Gradients, of the dtypes that their names end in."""
    grads = common.gaussian(shapes, seed)
    kinds = {"bfloat16": jnp.bfloat16, "float16": np.float16}
    return {name: g.astype(kinds.get(name.split()[-1], g.dtype)) for name, g in grads.items()}


def assert_same(got, want):
    """Of two backends: (updates, state)."""
    (updates, state), (want_updates, want_state) = got, want
    np.testing.assert_array_equal(state.count, want_state.count)
    # Codes of a group that is not finite are any.
    sound = np.all(np.asarray(want_state.mu_scale) != MU_NOT_FINITE, axis=0)
    # Compilers may round a product that is added to something, or not, and do so by processor: a
    # code whose dither is next to the edge then is another one.
    for name in ("arena", "mu_scale", "nu_scale", "nu_row", "exact"):
        got, want = (np.asarray(getattr(x, name)) for x in (state, want_state))
        if name == "arena":
            got, want = got[:, sound], want[:, sound]
        assert np.sum(got != want) <= 1 + 1e-4 * got.size, name
    for name, update in updates.items():
        expected = want_updates[name]
        assert update.dtype == expected.dtype
        rtol = LOG_ULP + float(jnp.finfo(update.dtype).eps)
        x, y = np.float32(update), np.float32(expected)
        # Where a code was another one before, so is the update of its group.
        far = ~np.isclose(x, y, rtol, ULP, equal_nan=True)
        assert np.sum(far) <= GROUP + 1e-4 * far.size, name
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y), name)
    precision = [x.precision.renewed(x.count) for x in (state, want_state)]
    for x, y in zip(*map(jax.tree.leaves, precision), strict=True):
        np.testing.assert_allclose(x, y, 1e-3, 1e-30)  # such a code is in the sums of its slot


def ignore(*step):
    """Not looked at any further."""


def compare(backend, shapes, widths=(5, 4), steps=2, spoil=lambda g, i: g, check=ignore, **rule):
    """The backend and XLA from the same state for some steps, each with its own."""
    reference, storage = storages(backend)
    states = [init(shapes, reference, *widths)] * 2
    for i in range(steps):
        grads = spoil(gaussian(shapes, i), i)
        want = program(reference, **rule)(grads, states[0])
        got = program(storage, **rule)(grads, states[1])
        assert_same(got, want)
        check(states[1], grads, *got, oracle.Adam(), i + 1)
        states = [want[1], got[1]]


def aligned(place, backend):
    """A leaf's tiles, and empty ones up to a multiple."""
    missing = (0, -len(place.element) % ALIGNMENT[backend]), (0, 0), (0, 0)
    element = np.pad(place.element, missing, constant_values=-1)
    return place._replace(element=element, group=np.pad(place.group, missing))


# Every leaf is one more kernel to compile: `make test` has of each way to lay them out one.
FEW = {"columns", "ragged", "odd", "folded, float16", "bias"}


@pytest.mark.parametrize(
    ("few", "widths"),
    [(True, (5, 4)), (False, (5, 4)), (False, (2, 0))],
    ids=["few-5-4", "5-4", "2-0"],
)
def test_leaves(backend, few, widths):
    """All kinds of them, which share the arena; against the oracle, too. That has float32 updates
    alone; and the library takes a row's share from the tile's first group, of which the last group
    of a ragged end has only a part."""
    shapes = {name: x for name, x in TREES[backend].items() if name in FEW or not few}
    names = sorted(set(shapes) - {"bias"})
    places = {name: aligned(oracle_storage.place(shapes[name]), backend) for name in names}
    skip = {name for name in names if name == "tail" or name.endswith("16")}
    check = functools.partial(test_oracle.assert_step, places=places, skip=skip)
    compare(backend, shapes, widths, check=check)


@pytest.mark.thorough
def test_every_width(backend):
    for widths in itertools.product(range(2, 9), range(9)):
        compare(backend, TILE, widths, steps=1)


@pytest.mark.thorough
def test_extremes(backend):
    """Groups that are absent, come, go and are not finite; tiny and huge; Nesterov's rule."""

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

    compare(backend, TILE, spoil=spoil, steps=4, nesterov=True)


@pytest.mark.thorough
def test_fused_update(backend):
    """New parameters in place of updates, of another dtype than gradients or not; bfloat16 ones are
    rounded at random."""
    shapes = {**APPLIED[backend], "bias": (40,)}
    params, results = gaussian(shapes, 7), []
    for storage in storages(backend):
        precision = stquant.Fixed(8, 8)
        tx = stquant.adamw(RATE, weight_decay=0.1, precision=precision, storage=storage)
        step = jax.jit(functools.partial(stquant.fused_update, tx, stochastic_rounding=True))
        new, state = params, tx.init(params)
        for i in range(2):
            grads = common.gaussian(shapes, i)
            grads["wide"] = grads["wide"].astype(jnp.bfloat16)
            new, state = step(grads, state, new)
        results.append((new, state))
    (want, want_state), (new, state) = results
    # The last bit of a group's energy may be rounded otherwise, and now and then its scale with it,
    # which moves the codes of mu that are measured by it. A code of eight bits that lies next to an
    # edge may be in up to as many words.
    groups = np.not_equal(state[0].nu_scale, want_state[0].nu_scale)
    assert groups.sum() <= 1e-3 * groups.size
    words = np.not_equal(state[0].arena, want_state[0].arena)
    assert words.sum() <= 16 * groups.sum() + 8 + 1e-4 * words.size
    for name, p in new.items():
        assert p.dtype == params[name].dtype
        # An update of up to two, then the sum's own rounding. A border between two bfloat16 numbers
        # is as likely to lie within that as any other 2**-16 of their distance.
        off = 2 * RATE * LOG_ULP
        x, y = np.float32(p), np.float32(want[name])
        apart = np.abs(x - y) > off + ULP * np.abs(y)
        assert apart.sum() <= (1e-3 * p.size if p.dtype == jnp.bfloat16 else 2)  # such codes
