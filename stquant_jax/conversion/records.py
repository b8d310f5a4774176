"""One leaf's moments as they are saved, and back: codes by element, scales and rows by tile.

On a mesh every device reads and writes its own part; arrays of tiles are put into the order of the
whole leaf, which the division does not show in.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from stquant_jax.conversion.moments import LeafSlots
from stquant_jax.engine.state import packed_specs, state_specs
from stquant_jax.sharding.devices import divided, per_device, spec_of
from stquant_jax.sharding.shards import tile_order
from stquant_jax.storage import arena as rows
from stquant_jax.storage import planes
from stquant_jax.storage.layout import Layout, Leaf
from stquant_jax.storage.numerics import hash32
from stquant_jax.storage.planes import GROUP
from stquant_jax.storage.tiling import from_tiles, to_tiles

Record = dict[str, Any]


@partial(jax.jit, static_argnums=(0, 1, 2))
def read(leaf: Leaf, mesh: Any, axes: tuple, slots: LeafSlots, packed: rows.Packed) -> Record:
    """A quantized leaf's record, of what is stored along ``axes`` of the mesh."""
    names = leaf.all_axes

    def local(slots, packed):
        def codes(i):
            span = _span(leaf, slots, i)
            return planes.unpack(rows.read_planes(packed.arena, span, leaf.tiles))

        def of_tiles(x, size):
            return lax.dynamic_slice_in_dim(x, slots.tile * size, leaf.tiles * size)

        arrays = {
            "mu": from_tiles(codes(0), leaf).astype(jnp.uint8),
            "nu": from_tiles(codes(1), leaf).astype(jnp.uint8),
            "mu_scale": of_tiles(packed.mu_scale, 1)[: leaf.filled],
            "nu_scale": of_tiles(packed.nu_scale, 1)[: leaf.filled],
            "nu_row": of_tiles(packed.nu_row, GROUP).reshape(-1, GROUP)[: leaf.filled],
        }
        return arrays, _checksum(arrays, names)

    specs = record_specs(leaf)
    of = per_device(local, mesh, (P(), packed_specs(axes)), (specs, P()))
    arrays, checksum = of(slots, packed)
    order = np.argsort(tile_order(leaf))
    arrays = {name: _in_order(x, order, mesh, specs[name], name) for name, x in arrays.items()}
    return arrays | {"checksum": checksum, "torn": jnp.asarray(torn(leaf))}


@partial(jax.jit, static_argnums=(0, 1))
def read_exact(layout: Layout, mesh: Any, moments: jax.Array) -> list[Record]:
    """The records of all exact leaves."""
    if not layout.exact:
        return []
    axes = [leaf.all_axes for leaf in layout.exact]

    def local(moments):
        pairs: list[Record] = [{"mu": x[0], "nu": x[1]} for x in layout.split_exact(moments)]
        return [
            pair | {"checksum": _checksum(pair, names)}
            for pair, names in zip(pairs, axes, strict=True)
        ]

    specs = [record_specs(leaf) | {"checksum": P()} for leaf in layout.exact]
    return per_device(local, mesh, (state_specs(layout).exact,), specs)(moments)


def record_specs(leaf: Leaf) -> dict[str, P]:
    """How the arrays of a leaf are divided."""
    part = spec_of(leaf.axes)
    if not leaf.tiles:
        return {"mu": part, "nu": part}
    tiles = spec_of((leaf.all_axes,))
    return {"mu": part, "nu": part, "mu_scale": tiles, "nu_scale": tiles, "nu_row": tiles}


def _in_order(x: jax.Array, order: np.ndarray, mesh: Any, spec: P, name: str) -> jax.Array:
    """Arrays of tiles in another order; small, so each device may see them whole for a moment."""
    if name in rows.MOMENTS or np.array_equal(order, np.arange(len(order))):
        return x
    return divided(divided(x, mesh, P())[order], mesh, spec)


def torn(leaf: Leaf) -> np.ndarray:
    """How a leaf is divided, if that shows in its bits; zeros if not."""
    parts = leaf.cut.parts if leaf.cut and not leaf.cut.whole else [0] * len(leaf.shape)
    return np.array(parts, np.int32)


def _checksum(arrays: Record, names: tuple[str, ...]) -> jax.Array:
    """uint32[]: the sum of a hash of every value, in whatever order, of all devices."""
    total = jnp.uint32(0)
    for salt, name in enumerate(sorted(arrays)):
        x = arrays[name]
        bits = lax.bitcast_convert_type(x, jnp.uint32) if x.dtype == jnp.float32 else x
        salted = hash32(bits.astype(jnp.uint32) + jnp.uint32(salt * 0x10001 + 1))
        total += jnp.sum(salted, dtype=jnp.uint32)
    return lax.psum(total, names) if names else total


def _span(leaf: Leaf, slots: LeafSlots, i: int) -> rows.Span:
    return rows.Span(slots.rows[i], slots.plan.widths[i], jnp.int32(leaf.tiles))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def write(
    leaf: Leaf, mesh: Any, axes: tuple, slots: LeafSlots, packed: rows.Packed, arrays: dict
) -> tuple[rows.Packed, tuple[jax.Array, jax.Array]]:
    """What is stored, with a leaf's record written to it; the record's checksum, and how many codes
    do not fit their width. ``packed`` is overwritten.
    """
    names = leaf.all_axes

    def local(slots, packed, arrays):
        codes = [arrays[name].astype(jnp.uint32) for name in rows.MOMENTS]
        widths = slots.plan.widths.astype(jnp.uint32)
        odd = sum(jnp.sum(x >> w > 0) for x, w in zip(codes, widths, strict=True))
        words = [planes.pack(to_tiles(x, leaf)) for x in codes]
        spans = [_span(leaf, slots, i) for i in range(2)]
        padding = ((0, leaf.tiles - leaf.filled), (0, 0))

        def put(buffer, name, size):
            x = jnp.pad(arrays[name], padding).reshape(leaf.tiles * size, *buffer.shape[1:])
            return lax.dynamic_update_slice_in_dim(buffer, x, slots.tile * size, 0)

        packed = rows.Packed(
            rows.write_planes(packed.arena, spans, words),
            put(packed.mu_scale, "mu_scale", 1),
            put(packed.nu_scale, "nu_scale", 1),
            put(packed.nu_row, "nu_row", GROUP),
        )
        return packed, (_checksum(arrays, names), lax.psum(odd, names) if names else odd)

    specs, own = record_specs(leaf), packed_specs(axes)
    order = tile_order(leaf)
    arrays = {name: _in_order(x, order, mesh, specs[name], name) for name, x in arrays.items()}
    run = per_device(local, mesh, (P(), own, specs), (own, (P(), P())))
    return run(slots, packed, arrays)


@partial(jax.jit, static_argnums=(0, 1))
def write_exact(layout: Layout, mesh: Any, exact: list[Record]) -> tuple[jax.Array, list]:
    """The vectors of all exact leaves' moments, and checksums of their records."""
    axes = [leaf.all_axes for leaf in layout.exact]

    def local(pairs):
        sums = [_checksum(pair, names) for pair, names in zip(pairs, axes, strict=True)]
        sides = [[pair[name].reshape(-1) for pair in pairs] for name in rows.MOMENTS]
        empty = [jnp.zeros((0,), jnp.float32)]
        return jnp.stack([jnp.concatenate(empty + side) for side in sides]), sums

    specs = [record_specs(leaf) for leaf in layout.exact]
    out = state_specs(layout).exact, [P()] * len(specs)
    pairs = [{name: pair[name] for name in rows.MOMENTS} for pair in exact]
    return per_device(local, mesh, (specs,), out)(pairs)
