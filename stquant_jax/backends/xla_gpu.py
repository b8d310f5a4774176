"""The XLA backend in the shape that a GPU wants: few operations, each on millions of elements.

Tiles of all leaves, in the order of the state, are divided into batches of one size, which are
computed one after the other: what is beside the state and the leaves is bounded by that size. All
widths, places and keys are arrays by tile, so that nothing is branched on. Tiles without codes of
nu run the program of those that have them, with codes of zero.
"""

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax.backends.block import Codes, slot_numbers, update_block
from stquant_jax.backends.loops import Table
from stquant_jax.codecs import Ops
from stquant_jax.precision import Plan
from stquant_jax.precision.tally import by_leaf, no_sums
from stquant_jax.rules.adam import Adam, AdamScalars
from stquant_jax.rules.apply import Apply, apply_wide
from stquant_jax.storage import arena as rows
from stquant_jax.storage import planes
from stquant_jax.storage.layout import Layout, Leaf
from stquant_jax.storage.noise import Dither, keys_of, rounding_bits
from stquant_jax.storage.planes import GROUP, LANES, PLANES, TILE
from stquant_jax.storage.settings import Storage
from stquant_jax.storage.tiling import from_tiles, to_tiles

# Blocks of float32 that are in memory at the same time, counted in programs compiled for GPUs.
_LIVE = 8


@dataclass(frozen=True)
class Batch:
    """Consecutive tiles [start, stop) of a layout, and how many of them are not there."""

    layout: Layout
    start: int
    stop: int
    size: int  # of the arrays

    @classmethod
    def all_of(cls, layout: Layout, size: int) -> "list[Batch]":
        """Of at most so many tiles, or as one leaf has that cannot be divided."""
        cuts = [0]
        for leaf, first in zip(layout.quantized, layout.first_tile, strict=True):
            # Tiles that only align belong to the last column.
            starts = range(0, leaf.filled, leaf.bands) if leaf.kind == "tiled" else [0]
            for start, stop in itertools.pairwise([*starts, leaf.tiles]):
                if first + stop - cuts[-1] > size:
                    cuts.append(first + start)
        cuts = sorted({*cuts, layout.tiles})
        size = max(b - a for a, b in itertools.pairwise(cuts))
        return [cls(layout, a, b, size) for a, b in itertools.pairwise(cuts)]

    @cached_property
    def parts(self) -> list[tuple[int, int, int]]:
        """Leaves that have tiles in it, by index, and which of theirs."""
        found = []
        firsts = zip(self.layout.first_tile, self.layout.tiles_of_leaves, strict=True)
        for i, (first, tiles) in enumerate(firsts):
            start, stop = max(first, self.start), min(first + tiles, self.stop)
            if start < stop:
                found.append((i, start - first, stop - first))
        return found

    @property
    def leaf(self) -> np.ndarray:
        """int32[size]: of each tile."""
        leaf = np.concatenate([np.full(b - a, i) for i, a, b in self.parts])
        return np.pad(leaf, (0, self.size - len(leaf)), mode="edge").astype(np.int32)

    @property
    def tile(self) -> np.ndarray:
        """int32[size]: its index in the leaf; beyond it where it is not there."""
        last = self.layout.tiles_of_leaves[self.parts[-1][0]]
        tile = np.concatenate([np.arange(a, b) for _, a, b in self.parts])
        return np.pad(tile, (0, self.size - len(tile)), constant_values=last).astype(np.int32)

    def padded(self, x: jax.Array) -> jax.Array:
        """[tiles there, ...] -> [size, ...], zero beyond."""
        return jnp.pad(x, [(0, self.size - len(x)), *[(0, 0)] * (x.ndim - 1)])

    def of(self, x: jax.Array) -> jax.Array:
        """[all tiles, ...] -> [size, ...]"""
        return self.padded(x[self.start : self.stop])

    def put(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """The inverse, in place."""
        new = new[: self.stop - self.start].astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(x, new, self.start, 0)

    def tiles_of(self, leaves: list[jax.Array]) -> jax.Array:
        """float32[size, 32, 128] of leaves [*shape]."""
        found = []
        for i, a, b in self.parts:
            part = Part.of(self.layout.quantized[i], a, b)
            found.append(to_tiles(part.read(leaves[i]), part.leaf).astype(jnp.float32))
        return self.padded(jnp.concatenate(found))

    def taken(self, leaves: list[jax.Array], tiles: jax.Array) -> list[jax.Array]:
        """The leaves with these tiles in them."""
        leaves, at = list(leaves), 0
        for i, a, b in self.parts:
            part = Part.of(self.layout.quantized[i], a, b)
            new = from_tiles(tiles[at : at + b - a], part.leaf)
            leaves[i] = part.write(leaves[i], new.astype(leaves[i].dtype))
            at += b - a
        return leaves


class Part(NamedTuple):
    """Whole columns of a leaf's tiles, or all of them: a leaf of its own."""

    leaf: Leaf
    whole: Leaf
    first: int  # of its lanes

    @classmethod
    def of(cls, whole: Leaf, start: int, stop: int) -> "Part":
        if stop - start == whole.tiles:
            return cls(whole, whole, 0)
        first = start // whole.bands * LANES
        lanes = min(stop // whole.bands * LANES, whole.lanes_along) - first
        groups = whole.groups_along
        shape = (lanes, groups) if whole.transposed else (groups, lanes)
        changed = {"shape": shape, "split": 1, "lanes_along": lanes, "tiles": stop - start}
        return cls(replace(whole, **changed), whole, first)

    def read(self, x: jax.Array) -> jax.Array:
        if self.leaf is self.whole:
            return x
        axis = 0 if self.leaf.transposed else 1
        x = x.reshape(self.whole.matrix)
        return lax.slice_in_dim(x, self.first, self.first + self.leaf.lanes_along, axis=axis)

    def write(self, x: jax.Array, new: jax.Array) -> jax.Array:
        if self.leaf is self.whole:
            return new
        start = (self.first, 0) if self.leaf.transposed else (0, self.first)
        return lax.dynamic_update_slice(x.reshape(self.whole.matrix), new, start).reshape(x.shape)


def step(
    layout: Layout,
    storage: Storage,
    rule: Adam,
    scalars: AdamScalars,
    count: jax.Array,
    grads: list[jax.Array],
    packed: rows.Packed,
    plan: Plan,
    weights: jax.Array,
    apply: Apply | None = None,
) -> tuple[list[jax.Array], rows.Packed, jax.Array]:
    """As `stquant_jax.backends.xla.step`."""
    if not layout.quantized:
        return [], packed, no_sums(0)
    table = Table.of(layout)
    tiles_of_leaves = np.array(layout.tiles_of_leaves)
    offsets, widths = rows.offsets(plan.widths, layout), plan.widths
    numbers = slot_numbers(plan, scalars, count)
    ragged = any(leaf.ragged for leaf in layout.quantized)
    element = jnp.arange(GROUP, dtype=jnp.uint32)[None, :, None]
    rounds = jnp.array(apply.rounded if apply else [])
    out = list(grads if apply is None else apply.params)

    def update_batch(batch: Batch, turn: jax.Array, out: list[jax.Array], packed: rows.Packed):
        """Leaves and what is stored, with a batch in them, and its sums."""
        leaf, tile = batch.leaf, batch.tile
        there = jnp.asarray(tile < tiles_of_leaves[leaf])

        def by_tile(x):
            return x if isinstance(x, int) else x[leaf][:, None, None]

        def rows_of(slot):
            """Of the arena, int32[8, size]: all different, those of no row too."""
            plane = jnp.arange(PLANES, dtype=jnp.int32)[:, None]
            row = offsets[2 * leaf + slot] + plane * table.tiles[leaf] + tile
            none = rows.NOWHERE + plane * batch.size + np.arange(batch.size, dtype=np.int32)
            return jnp.where((plane < widths[2 * leaf + slot]) & there, row, none)

        where = [rows_of(slot) for slot in (0, 1)]
        mu, nu = (planes.unpack(rows.gather_rows(packed.arena, at + turn)) for at in where)
        old = Codes(
            mu,
            nu,
            batch.of(packed.mu_scale)[:, None].astype(jnp.uint32),
            batch.of(packed.nu_scale)[:, None].astype(jnp.uint32),
            batch.of(packed.nu_row.reshape(-1, GROUP))[..., None].astype(jnp.uint32),
        )
        place = jax.tree.map(by_tile, table.places)
        group, valid = place.of_each(jnp.asarray(tile)[:, None, None], ragged)
        keys = keys_of(storage.seed, jnp.asarray(leaf)[:, None, None], count)
        g = batch.tiles_of(out if apply is None else grads)
        lev, lat = jax.tree.map(by_tile, numbers)
        noise = Dither(keys, group, element)
        result, new, terms = update_block(
            rule, scalars, g, old, valid, lev, lat, noise, count % GROUP, Ops()
        )
        if apply is not None:
            bits = rounding_bits(keys, group, element) if any(apply.rounded) else None
            p, decay, rounded = batch.tiles_of(out), by_tile(apply.decay), by_tile(rounds)
            result = apply_wide(p, result, apply.rate, decay, rounded, bits)
        arena = packed.arena
        for at, codes in zip(where, (new.mu, new.nu), strict=True):
            arena = rows.scatter_rows(arena, at, planes.pack(codes), unique=True)
        packed = rows.Packed(
            arena,
            batch.put(packed.mu_scale, new.mu_scale[:, 0]),
            batch.put(packed.nu_scale, new.nu_scale[:, 0]),
            batch.put(packed.nu_row.reshape(-1, GROUP), new.nu_row[..., 0]).reshape(-1),
        )
        sums = jnp.sum(jnp.stack(terms), (-2, -1))[:, : batch.stop - batch.start]
        return batch.taken(out, result), packed, sums

    sums, turn = [], jnp.int32(0)
    for batch in Batch.all_of(layout, max(1, storage.scratch_bytes // (4 * TILE * _LIVE))):
        out, packed, new = update_batch(batch, turn, out, packed)
        # One after the other, or XLA has several in memory at the same time: the rows that the next
        # one reads depend on what this one has written, in steps that never come.
        touched = [i for i, *_ in batch.parts]
        *written, new = lax.optimization_barrier([*(out[i] for i in touched), new])
        for i, x in zip(touched, written, strict=True):
            out[i] = x
        ends = [x.reshape(-1)[-1].astype(jnp.int32) for x in (*written, new)]
        turn = jnp.where(count < 0, sum(ends), 0)
        sums.append(new)
    sums = jnp.concatenate(sums, axis=1) * weights[:, None]
    return out, packed, by_leaf(sums, layout.tiles_of_leaves)
