"""The XLA loop's buckets: the gradients of some leaves at a time lie in tiles."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stquant_jax as stquant
from stquant_jax.backends import buckets
from stquant_jax.backends.buckets import Buckets
from stquant_jax.storage.layout import layout_of
from tests import common

ADAMW = stquant.adamw(1e-2, precision=stquant.Fixed(5, 4))


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40))
def test_buckets(tiles):
    """Every leaf is in one bucket, in order; none is larger than it has to be."""
    found = Buckets(SimpleNamespace(quantized=[SimpleNamespace(tiles=n) for n in tiles])).leaves
    assert [i for bucket in found for i in bucket] == list(range(len(tiles)))
    assert all(map(len, found))
    held = [sum(tiles[i] for i in bucket) for bucket in found]
    room = max(buckets.LEAST, *tiles, -(-sum(tiles) // buckets.MOST))
    assert max(held) <= room
    # Two neighbours would not have fitted into one.
    assert all(a + tiles[bucket.start] > room for a, bucket in zip(held, found[1:], strict=False))
    assert len(found) <= 2 * buckets.MOST


def run(step, dtypes):
    shapes = {name: shape for name, shape in common.SHAPES.items() if name != "ragged"}
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
    """Updates or parameters and the state are the same bits in one bucket and in many."""
    want = run(step, dtypes)
    jax.clear_caches()
    monkeypatch.setattr(buckets, "LEAST", 1)
    got = run(step, dtypes)
    jax.clear_caches()
    assert len(Buckets(layout_of(want[0], stquant.Storage())).leaves) > 2
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    "step, donated, dtype",
    [(ADAMW.update, (0, 1), jnp.float32), (applied, (1, 2), jnp.bfloat16)],
    ids=["update, float32", "applied, bfloat16"],
)
def test_memory(step, donated, dtype, monkeypatch):
    """What a step needs beside its arguments, of which it keeps the memory, is less than a byte per
    element: no copy of leaves in either order of their axes, nor of all of them in float32, nor
    noise for all of them."""
    monkeypatch.setattr(buckets, "LEAST", 1)
    shapes = {f"w{i}": (256, 1024) if i % 2 else (1024, 256) for i in range(16)}
    params = common.zeros(shapes, dtype)
    state = ADAMW.init(params)
    program = jax.jit(step, donate_argnums=donated).lower(params, state, params).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= common.nbytes(params)
    assert memory.temp_size_in_bytes < sum(x.size for x in params.values())
