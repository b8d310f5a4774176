"""The XLA backend for GPUs: how tiles are divided into batches, and which GPUs get it. That it
computes what the loop does is in `test_backends.py`."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stquant_jax as stquant
from benchmarks.gpu import xla as counting
from stquant_jax import backends
from stquant_jax.backends.xla_gpu import Batch, Part
from stquant_jax.storage.layout import layout_of
from stquant_jax.storage.tiling import from_tiles, to_tiles
from tests import common
from tests.test_backends import assert_same

shapes = st.lists(st.tuples(st.integers(32, 400), st.integers(32, 400)), min_size=1, max_size=5)


@settings(max_examples=20)
@given(shapes, st.integers(1, 40), st.sampled_from([1, 8]))
def test_batches(shapes, size, alignment):
    """Every tile is in one batch, in order. None is larger than it has to be, and all are padded
    to one size."""
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    layout = layout_of(tree, stquant.Storage(min_size=0, row_alignment=alignment))
    found = Batch.all_of(layout, size)
    tiles = [(i, t) for batch in found for i, a, b in batch.parts for t in range(a, b)]
    assert tiles == [(i, t) for i, x in enumerate(layout.quantized) for t in range(x.tiles)]
    columns = [
        x.bands + x.tiles - x.filled if x.kind == "tiled" else x.tiles for x in layout.quantized
    ]
    for batch in found:
        assert batch.size == found[0].size <= max(size, *columns)
        there = batch.tile < np.array(layout.tiles_of_leaves)[batch.leaf]
        assert there.sum() == batch.stop - batch.start and len(there) == batch.size


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("shape", [(64, 1000), (1000, 64), (2, 32, 600), (60, 640), (96, 1100)])
def test_parts(shape, alignment):
    """Some columns of a leaf's tiles are read and written where they lie."""
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32)]
    layout = layout_of(tree, stquant.Storage(row_alignment=alignment))
    (leaf,) = layout.quantized
    x = np.arange(leaf.size, dtype=np.float32).reshape(shape)
    want, got = to_tiles(x, leaf), jnp.zeros(shape)
    parts = [Part.of(leaf, *ends) for b in Batch.all_of(layout, 5) for _, *ends in b.parts]
    assert len(parts) > 1
    at = 0
    for part in parts:
        tiles = to_tiles(part.read(x), part.leaf)
        np.testing.assert_array_equal(tiles, want[at : at + len(tiles)])
        got = part.write(got, from_tiles(tiles, part.leaf))
        at += len(tiles)
    np.testing.assert_array_equal(got, x)
    assert at == leaf.tiles


@pytest.mark.parametrize("alignment", [1, 8])
def test_scratch(alignment):
    """Codes do not depend on how many batches there are."""
    shapes = {"a": (256, 380), "b": (300, 256), "folded": (160, 64), "flat": (9, 40, 36)}
    results = []
    for scratch in (2**28, 2**20):
        storage = stquant.Storage(backend="xla_gpu", scratch_bytes=scratch, row_alignment=alignment)
        tx = stquant.scale_by_adam_q(precision=stquant.Fixed(5, 4), storage=storage)
        update, state = jax.jit(tx.update), tx.init(common.zeros(shapes))
        for seed in range(3):
            updates, state = update(common.gaussian(shapes, seed), state)
        results.append((updates, state))
    layout = layout_of(common.zeros(shapes), stquant.Storage())
    assert len(Batch.all_of(layout, 2**20 // (4 * 4096 * 8))) > 4
    assert_same(*results)


@pytest.mark.parametrize(
    ("capability", "obstacle", "want"),
    [("8.0", None, "xla_gpu"), ("9.0", "too old a JAX", "xla_gpu"), ("gfx942", None, "xla_gpu")]
    + [("9.0", None, "pallas_gpu"), ("10.0", None, "pallas_gpu")],
)
def test_choice(capability, obstacle, want, monkeypatch):
    """GPUs before Hopper, those of AMD, and those of a JAX without what our kernels need."""
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    found = backends._obstacle
    monkeypatch.setattr(
        backends, "_obstacle", lambda name: obstacle if name == "pallas_gpu" else found(name)
    )
    assert backends.settle(stquant.Storage()).backend == want


def test_counting():
    """Bytes of operations, by hand: of slices what is taken, in place what is written."""
    text = """
%whole (a: f32[100], b: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %b = f32[100]{0} parameter(1)
  ROOT %c = f32[100]{0} add(%a, %b), metadata={}
}
%taken (a: f32[100], i: s32[]) -> f32[10] {
  %a = f32[100]{0} parameter(0)
  %i = s32[] parameter(1)
  %two = f32[100]{0} add(%a, %a)
  ROOT %c = f32[10]{0} dynamic-slice(%two, %i), dynamic_slice_sizes={10}
}
%placed (a: f32[100], b: f32[10], i: s32[]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %b = f32[10]{0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %c = f32[100]{0} dynamic-update-slice(%a, %b, %i)
}
ENTRY %main (x: f32[100], y: f32[100], i: s32[]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %y = f32[100]{0} parameter(1)
  %i = s32[] parameter(2)
  %p = f32[100]{0} fusion(%x, %y), kind=kLoop, calls=%whole
  %q = f32[10]{0} fusion(%p, %i), kind=kLoop, calls=%taken
  %r = f32[100]{0} copy(%x)
  ROOT %s = f32[100]{0} fusion(%r, %q, %i), kind=kLoop, calls=%placed
}
"""
    program = counting.Program(text)
    ops = {op.name: op for op in program.ops(program.entry)}
    moved = {name: program.moved(ops[name]) for name in "pqrs"}
    assert moved == {"p": 1200, "q": 40 + 4 + 40, "r": 800, "s": 40 + 4 + 80}
    counted = counting.count(text, 1e3, 100)
    assert (counted["kernels"], counted["copies"], counted["waits"]) == (3, 1, 0)
    assert counted["bytes_per_element"] == round(sum(moved.values()) / 100, 1)
