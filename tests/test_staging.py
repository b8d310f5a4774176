"""The XLA loop's leaves: large ones are read where they lie, of the others some at a time in a
buffer. What is computed does not depend on it.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stquant_jax as stquant
from stquant_jax.backends import loops, staging
from stquant_jax.backends.staging import Staging
from stquant_jax.storage.layout import layout_of
from tests import common

ADAMW = stquant.adamw(1e-2, precision=stquant.Fixed(5, 4))


def leaf(tiles, kind):
    return SimpleNamespace(tiles=tiles, kind=kind, shape=(tiles,), dtype="float32", size=tiles)


SHAPES = {name: shape for name, shape in common.SHAPES.items() if name != "ragged"}


@given(
    st.lists(
        st.builds(leaf, st.integers(1, 600), st.sampled_from(["tiled", "folded"])),
        min_size=1,
        max_size=40,
    )
)
def test_buckets(leaves):
    """Every leaf is read directly or in one bucket; none is larger than it has to be."""
    found = Staging(SimpleNamespace(quantized=leaves))
    assert sorted([*found.direct, *sum(found.buckets, [])]) == list(range(len(leaves)))
    assert all(leaves[i].kind == "tiled" for i in found.direct)
    assert all(leaves[i].tiles >= staging.LEAST for i in found.direct)
    assert all(map(len, found.buckets))
    for bucket in found.buckets:
        held = [leaves[i].tiles for i in bucket]
        assert sum(held) <= max(staging.ROOM, held[0])
        # One leaf's tiles follow the other's, those of one shape side by side.
        assert [found.first_tile[i] for i in bucket] == list(np.cumsum([0, *held[:-1]]))
        assert held == sorted(held)


def run(step, dtypes, shapes=SHAPES):
    params = {name: jnp.ones(x, dtypes.get(name, jnp.float32)) for name, x in shapes.items()}
    state, step = ADAMW.init(params), jax.jit(step)
    for seed in range(3):
        g = common.gaussian(shapes, seed)
        g = {name: jnp.asarray(x, params[name].dtype) for name, x in g.items()}
        params, state = step(g, state, params)
    return params, state


def applied(g, state, params):
    return stquant.fused_update(ADAMW, g, state, params, stochastic_rounding=True)


@pytest.mark.parametrize(
    "step, dtypes",
    [(ADAMW.update, {}), (applied, {"embed": jnp.bfloat16})],
    ids=["update, float32", "applied, two dtypes"],
)
def test_bits(step, dtypes, monkeypatch):
    """Updates or parameters and the state are the same bits wherever leaves lie, in one bucket or
    in many, in chunks of any size."""
    want = run(step, dtypes)
    for least, room, chunk in ((64, 1, 8), (1, 1, 8), (1, 256, 2)):
        jax.clear_caches()
        monkeypatch.setattr(staging, "LEAST", least)
        monkeypatch.setattr(staging, "ROOM", room)
        monkeypatch.setattr(loops, "CHUNK", chunk)
        got = run(step, dtypes)
        found = Staging(layout_of(want[0], stquant.Storage()))
        assert found.direct if least == 1 else len(found.buckets) > 1
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.clear_caches()


def test_a_small_leaf_beside_a_large_one(monkeypatch):
    """Chunks are those of the large leaf, more than the small one has tiles."""
    shapes, results = {"large": (512, 520), "small": (64, 64)}, []
    for least in (64, 1):
        jax.clear_caches()
        monkeypatch.setattr(staging, "LEAST", least)
        results.append(run(ADAMW.update, {}, shapes))
    found = Staging(layout_of(results[0][0], stquant.Storage()))
    assert loops.chunk_of(found.layout) > found.layout.quantized[1].tiles
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.clear_caches()


@pytest.mark.parametrize(
    "step, donated, dtype",
    [(ADAMW.update, (0, 1), jnp.float32), (applied, (1, 2), jnp.bfloat16)],
    ids=["update, float32", "applied, bfloat16"],
)
def test_memory(step, donated, dtype, monkeypatch):
    """What a step needs beside its arguments, of which it keeps the memory, is less than a byte per
    element: no copy of leaves in either order of their axes, nor of all of them in float32, nor
    noise for all of them."""
    monkeypatch.setattr(staging, "ROOM", 32)
    shapes = {f"w{i}": (256, 1024) if i % 2 else (1024, 256) for i in range(16)}
    params = common.zeros(shapes, dtype)
    state = ADAMW.init(params)
    program = jax.jit(step, donate_argnums=donated).lower(params, state, params).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= common.nbytes(params)
    assert memory.temp_size_in_bytes < sum(x.size for x in params.values())
