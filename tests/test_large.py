"""Leaves of up to 2**40 elements: all of them can be traced, what is computed of their places is
right, and a program that int32 cannot index is refused before it runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import stquant_jax as stquant
from stquant_jax.precision import Slots
from stquant_jax.precision.allocate import allocate
from stquant_jax.precision.slots import room
from stquant_jax.sharding.shards import part_of
from stquant_jax.storage.indexing import MOST_TILES
from stquant_jax.storage.layout import layout_of
from stquant_jax.storage.places import Place
from stquant_jax.storage.settings import Storage

GROUP, LANES = 32, 128
# Leaves that are folded are small, for it is their padding that is folded away.
SHAPES = {
    (2**40,): "flat",
    (2**40 - 12345,): "flat",
    (3, 2**31 + 11): "flat",
    (40, 2**34): "flat",
    (2**20, 2**20): "tiled",
    (2**35, 32): "tiled",
    (60, 2**34 - 100): "tiled",
    (2**10, 2**10, 2**10, 2**10): "tiled",
}
# Elements, or groups, at which numbers of 31 and 32 bits end.
EDGES = (2**31, 2**32, 2**35)


def leaf_of(shape):
    return layout_of(jax.ShapeDtypeStruct(shape, jnp.float32), Storage()).leaves[0]


def some_tiles(leaf, random):
    """int[256]: at random, around the edges, and the last of the leaf."""
    edges = np.array([n // unit for n in EDGES for unit in (GROUP * LANES, LANES)])
    near = edges[:, None] + random.integers(-100, 100, (len(edges), 16))
    last = leaf.tiles - 1 - np.arange(16)
    found = np.concatenate([near.reshape(-1), last, random.integers(0, leaf.tiles, 144)])
    return np.clip(found, 0, leaf.tiles - 1)


def places_by_definition(leaf, tiles):
    """Band and lane of every group, and how many elements it has, as numbers of any size."""
    tile, lane = tiles.astype(object)[:, None], np.arange(LANES).astype(object)[None]
    lane_tile, band = tile // leaf.bands, tile % leaf.bands + 0 * lane
    lane = lane_tile * LANES + lane
    left = leaf.groups_along - GROUP * band if leaf.kind == "tiled" else leaf.size - GROUP * lane
    return band, lane, np.clip(left, 0, GROUP).astype(int)


@pytest.mark.parametrize(("shape", "kind"), SHAPES.items(), ids=str)
def test_places(shape, kind):
    leaf = leaf_of(shape)
    assert leaf.kind == kind
    tiles = some_tiles(leaf, np.random.default_rng(0))
    band, lane, want_left = places_by_definition(leaf, tiles)
    lanes = jnp.arange(LANES, dtype=jnp.int32)[None]
    group, left = jax.jit(Place.of(leaf).of_lanes)(jnp.asarray(tiles, jnp.int32)[:, None], lanes)
    want = (band * leaf.lanes_along + lane) % 2**32
    np.testing.assert_array_equal(group, want.astype(np.uint32))
    np.testing.assert_array_equal(np.clip(left, 0, GROUP), want_left)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((2**40,), (2**8,)),
        ((2**20, 2**20), (2, 4)),
        ((2**10, 2**10, 2**10, 2**10), (1, 2, 1, 4)),  # bands and lanes in runs
        ((2**35, 32), (8, 1)),
        ((2**35, 3 * 32), (1, 3)),
    ],
    ids=str,
)
def test_places_of_parts(shape, parts):
    """What a part adds, runs and gaps, by the definition of `Cut`."""
    names = "abcd"
    axes = tuple((name,) if n > 1 else () for name, n in zip(names, parts, strict=False))
    here = part_of(leaf_of(shape), axes, dict(zip(names, parts, strict=False)), Storage())
    cut = here.cut
    index = [n - 1 for n in parts]
    start = sum(i * step for i, step in zip(index, cut.steps, strict=True))
    tiles = some_tiles(here, np.random.default_rng(0))
    band, lane, _ = places_by_definition(here, tiles)
    lanes_along = here.lanes_along
    if cut.lanes:
        lanes_along = cut.lanes
        lane = lane + lane // LANES // cut.tile_run * cut.lane_gap
        band = band + band // cut.band_run * cut.band_gap
    want = (start + band * lanes_along + lane) % 2**32
    locate = jax.jit(Place.of(here, start).of_lanes)
    lanes = jnp.arange(LANES, dtype=jnp.int32)[None]
    group, _ = locate(jnp.asarray(tiles, jnp.int32)[:, None], lanes)
    np.testing.assert_array_equal(group, want.astype(np.uint32))


def test_room():
    """Rows that a plan leaves, where they are more than int32 holds; about 2**30 of more."""
    random = np.random.default_rng(0)
    for n in (-(2**33), -(2**30), -(2**29), -1, 0, 1, 2**29, 2**30, 2**33):
        tiles = np.append(random.integers(1, 2**28, 4), random.integers(1, 2**12, 2))
        widths = random.integers(4, 9, 6)
        rows = max(0, int(np.sum(tiles * widths)) + n + int(random.integers(-3, 4)))
        want = rows - int(np.sum(tiles * widths))
        got = int(room(rows, tiles, jnp.asarray(widths, jnp.int32)))
        assert got == want or (abs(got - np.sign(want) * 2**30) <= 2**12 and abs(want) > 2**29)


def test_allocate():
    """A budget of 2**32 rows, and one that just misses what all slots could take."""
    tiles, cost = np.array([2**28, 2**28, 1]), 4.0 ** -jnp.arange(9.0) * jnp.ones((3, 1))
    most = 8 * int(np.sum(tiles))
    for rows in (most, most - 1):
        widths = np.asarray(jax.jit(lambda cost, rows=rows: allocate(cost, tiles, rows))(cost))
        used = int(np.sum(tiles * widths))
        assert rows - 2**28 < used <= rows, widths


KERNELS = Storage(backend="pallas_tpu", interpret=True)
FLAT, SQUARE = (2**40 - 5,), (2**20, 2**20)
OPTIMIZERS = {
    "adamw": (stquant.adamw(1e-3), FLAT),
    "STQuant": (stquant.scale_by_adam_q(precision=stquant.STQuant(5.0)), SQUARE),
    "exact": (stquant.adamw(1e-3, precision=stquant.Fixed(pins={"w": "exact"})), FLAT),
    "kernels": (stquant.scale_by_adam_q(precision=stquant.Fixed(5, 4), storage=KERNELS), SQUARE),
    "solo_adamw": (stquant.solo_adamw(1e-3), FLAT),
    "adabelief": (stquant.adabelief(1e-3, precision=stquant.Fixed(8, 8)), SQUARE),
    "quantize_state": (stquant.quantize_state(optax.adam(1e-3), stquant.Fixed(8, 8)), FLAT),
}


def check_traces(tx, params, fused):
    """``init``, and ``update``, or the fused one where there is."""
    step, state = tx.update, jax.eval_shape(tx.init, params)
    if fused:
        step = partial(stquant.fused_update, tx, stochastic_rounding=True)
    assert jax.eval_shape(step, params, state, params) == (params, state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_traces(name):
    tx, shape = OPTIMIZERS[name]
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    check_traces(tx, params, fused=name in ("adamw", "exact"))


@pytest.mark.parametrize("make", [stquant.adamw, stquant.solo_adamw, stquant.lion])
@pytest.mark.parametrize(("shape", "spec"), [((2**40,), P("x")), (SQUARE, P(None, "x"))])
def test_traces_parts(make, shape, spec):
    mesh = jax.sharding.AbstractMesh((256,), ("x",))
    tx = make(1e-3, sharding=stquant.Sharding(mesh, spec))
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    check_traces(tx, params, fused=make is stquant.adamw)


@pytest.mark.parametrize("make", [stquant.adamw, stquant.lion])
def test_refused(make):
    """What is too large for one device, by name, before anything of its size is there."""
    tx = make(1e-3, precision=stquant.Fixed(5, 4))
    params = {"w": jax.ShapeDtypeStruct((MOST_TILES * GROUP * LANES,), jnp.float32)}
    jax.jit(tx.init).lower(params)
    params = {"w": jax.ShapeDtypeStruct((MOST_TILES * GROUP * LANES + 1,), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    error = pytest.raises(ValueError, match=r"67,108,864 tiles .* at most 67,108,863.*Sharding")
    with error:
        jax.jit(tx.init).lower(params)
    with error:
        jax.jit(tx.update).lower(params, state, params)
    if make is stquant.adamw:
        with error:
            tx.init(params)


def test_divided():
    """Parts that are small enough are not."""
    mesh = jax.make_mesh((8,), ("x",))
    tx = stquant.adamw(1e-3, sharding=stquant.Sharding(mesh, P("x")))
    params = {"w": jax.ShapeDtypeStruct((2**40,), jnp.bfloat16)}
    jax.jit(tx.init).lower(params)


def test_refused_policy():
    """`STQuant` adds up what all slots ask for."""
    policy, slots = stquant.STQuant(5.0), Slots(np.full(2, 2**28 + 1), ("w", "w"))
    decide, rows = partial(policy.decide, slots), 10 * 2**28
    state = jax.eval_shape(lambda: policy.init(slots, rows))
    args = state, (0.9, 0.999), jnp.int32(1)
    assert jax.eval_shape(partial(decide, rows), *args).plan == state.plan
    with pytest.raises(ValueError, match=r"STQuant.*536,870,914 tiles.*at most 536,870,912"):
        jax.jit(partial(decide, rows)).lower(*args)
