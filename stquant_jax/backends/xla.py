"""The reference backend: one table-driven loop over all chunks of all leaves, the arena, the
moments' scales and the leaves updated in place.

Per chunk: read gradients and planes, compute, write planes and updates. Nothing reads the arena
after a write of the same chunk, or XLA would copy the arena. A chunk lies in one of many arrays, of
which a traced index picks one: to read it by a branch for each, to write it by a loop for each that
turns once or not at all.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax.backends import windows
from stquant_jax.backends.block import Codes, no_sums, slot_numbers, update_block
from stquant_jax.backends.loops import Table, holder, in_place_at, in_place_if, over_tiles, put
from stquant_jax.backends.staging import Staging
from stquant_jax.codecs import Ops, lane_sum
from stquant_jax.precision import Plan, Sums
from stquant_jax.rules.adam import Adam, AdamScalars
from stquant_jax.rules.apply import Apply, apply_block
from stquant_jax.rules.rounding import stochastic
from stquant_jax.storage import arena as rows
from stquant_jax.storage import planes
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.noise import Dither, keys_of, rounding_bits
from stquant_jax.storage.planes import GROUP
from stquant_jax.storage.settings import Storage


class Buffers(NamedTuple):
    """What the loop carries: every array is updated in place."""

    direct: list[jax.Array]  # large leaves: gradients in, updates out; or parameters
    staged: list[jax.Array]  # a bucket of small leaves, float32[tiles, 32, 128]
    packed: rows.Packed
    sums: jax.Array  # [tiles, statistics]


def step(
    layout: Layout,
    storage: Storage,
    rule: Adam,
    scalars: AdamScalars,
    count: jax.Array,
    grads: list[jax.Array],
    packed: rows.Packed,
    plan: Plan,
    apply: Apply | None = None,
) -> tuple[list[jax.Array], rows.Packed, Sums]:
    """One fused update of all quantized leaves: updates, what is stored of them, and statistics
    float32[tiles] of what storing did, 0 for tiles that only align. With ``apply``, new parameters
    in place of updates.
    """
    if not layout.quantized:
        return [], packed, no_sums()
    widths = plan.widths
    table = Table.of(layout)
    offsets = rows.offsets(widths, layout)
    numbers = slot_numbers(plan, scalars, count)
    hold = holder(count > 0)
    ragged = any(leaf.ragged for leaf in layout.quantized)
    element = jnp.arange(GROUP, dtype=jnp.uint32)[None, :, None]
    staging = Staging(layout)
    chunks = Chunks(layout, staging, grads, apply, hold)

    def of_chunk(leaf, codes_of, tile, size, spans, b, inputs, coded):
        """A chunk's result, new planes and scales, and sums. Nothing is written here."""
        at, old = table.first[leaf] + tile, b.packed
        words, mu_scale, nu_scale, nu_row = hold(
            (
                [rows.read_planes(old.arena, span, size) for span in spans[: 1 + coded]],
                lax.dynamic_slice_in_dim(old.mu_scale, at, size),
                lax.dynamic_slice_in_dim(old.nu_scale, at, size),
                lax.dynamic_slice_in_dim(old.nu_row, at * GROUP, size * GROUP),
            )
        )
        codes = Codes(
            planes.unpack(words[0]),
            planes.unpack(words[1]) if coded else None,
            mu_scale[:, None].astype(jnp.uint32),
            nu_scale[:, None].astype(jnp.uint32),
            nu_row.reshape(size, GROUP, 1).astype(jnp.uint32),
        )
        group, valid = table.place(leaf).of_tiles(tile, size, ragged)
        keys = keys_of(storage.seed, leaf, count)
        lev, lat = codes_of
        g, *param = inputs
        result, new, terms = update_block(
            rule,
            scalars,
            g,
            codes,
            valid,
            lev,
            lat,
            Dither(keys, group, element),
            count % GROUP,
            Ops(hold),
        )
        if apply is not None:
            bits = rounding_bits(keys, group, element) if chunks.rounded else None
            result = chunks.applied(leaf, *param, result, bits)
        mu = planes.pack(new.mu)
        stored = rows.Packed(
            (mu, planes.pack(new.nu) if coded else lax.empty(mu.shape, mu.dtype)),
            new.mu_scale[:, 0].astype(old.mu_scale.dtype),
            new.nu_scale[:, 0].astype(old.nu_scale.dtype),
            new.nu_row.reshape(-1).astype(old.nu_row.dtype),
        )
        return result, stored, lane_sum(hold(jnp.stack(terms))).T

    def update_chunk(leaf: jax.Array, numbers: Any, size: int, tile: jax.Array, b: Buffers) -> Buffers:
        slots = 2 * leaf, 2 * leaf + 1
        spans = [rows.Span(offsets[i] + tile, widths[i], table.tiles[leaf]) for i in slots]
        at, coded, old = table.first[leaf] + tile, widths[slots[1]] > 0, b.packed
        inputs = chunks.read(leaf, tile, size, b)
        # Where nu has no codes it is another, shorter program.
        make = partial(of_chunk, leaf, numbers, tile, size, spans, b, inputs)
        result, new, sums = lax.cond(coded, lambda: make(True), lambda: make(False))
        mu, nu = new.arena
        direct, staged = chunks.write(leaf, tile, result, b)
        arena = rows.write_planes(old.arena, spans[:1], [mu])

        def write_nu(_, arena):
            return rows.write_planes(arena, spans[1:], [nu])

        return Buffers(
            direct,
            staged,
            rows.Packed(
                in_place_if(coded, write_nu, arena),
                put(old.mu_scale, new.mu_scale, at),
                put(old.nu_scale, new.nu_scale, at),
                put(old.nu_row, new.nu_row, at * GROUP),
            ),
            put(b.sums, sums, at),
        )

    def update_leaf(i: jax.Array, b: Buffers) -> Buffers:
        leaf = chunks.order[i]
        here = jax.tree.map(lambda x: x[leaf], numbers)
        return over_tiles(table.tiles[leaf], layout, partial(update_chunk, leaf, here), b)

    def update_bucket(bucket: jax.Array, carry: tuple) -> tuple:
        small, b = carry
        b = b._replace(staged=chunks.load(bucket, small, b.staged))
        b = lax.fori_loop(chunks.starts[bucket], chunks.starts[bucket + 1], update_leaf, b)
        return chunks.unload(bucket, small, b.staged), b

    sums = hold(lax.empty((layout.tiles, len(Sums._fields)), jnp.float32))
    # Born when the gradients are: a buffer that depends on nothing XLA may make at the start of the
    # training step, where it lies beside all that the backward pass keeps.
    come = reduce(jnp.logical_or, (g[(0,) * g.ndim] != 0 for g in grads), count > 0)
    staged = [holder(come)(x) for x in chunks.buffers()]
    direct, small = chunks.divided(grads if apply is None else apply.params)
    carry = small, Buffers(direct, staged, packed, sums)
    small, b = lax.fori_loop(0, len(chunks.starts) - 1, update_bucket, carry)
    return chunks.together(b.direct, small), b.packed, Sums(*b.sums.T)


class Chunks:
    """Where chunks of gradients and parameters come from, and where what is made of them goes."""

    def __init__(
        self, layout: Layout, staging: Staging, grads: list[jax.Array], apply: Apply | None, hold: Any
    ):
        self.layout, self.staging, self.grads, self.apply = layout, staging, grads, apply
        self.hold = hold
        parts = [staging.direct, *staging.buckets]
        source = {i: n for n, i in enumerate(staging.direct)}
        every = range(len(layout.quantized))
        self.order = jnp.array([i for part in parts for i in part], jnp.int32)
        ends = np.cumsum([0, *map(len, parts)])
        self.starts = jnp.array(ends, jnp.int32)
        self.bands = jnp.array([leaf.bands for leaf in layout.quantized], jnp.int32)
        self.source = jnp.array([source.get(i, len(source)) for i in every], jnp.int32)
        self.first = jnp.array([staging.first_tile.get(i, 0) for i in every], jnp.int32)
        rounds = [apply is not None and apply.rounds(x) for x in (apply.params if apply else ())]
        self.rounded, self.rounds = any(rounds), jnp.array(rounds)

    def buffers(self) -> list[jax.Array]:
        """Of the staged leaves' gradients, and of their parameters if these are updated."""
        n = 0 if not self.staging.buckets else 1 if self.apply is None else 2
        return [self.staging.buffer() for _ in range(n)]

    def divided(self, leaves: list[jax.Array]) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        """Leaves that are read where they lie, and others by their index."""
        small = {i: leaves[i] for bucket in self.staging.buckets for i in bucket}
        return [leaves[i] for i in self.staging.direct], small

    def together(self, direct: list[jax.Array], small: dict[int, jax.Array]) -> list[jax.Array]:
        """The inverse."""
        leaves = small | dict(zip(self.staging.direct, direct, strict=True))
        return [leaves[i] for i in range(len(leaves))]

    def read(self, leaf: jax.Array, tile: jax.Array, size: int, b: Buffers) -> list[jax.Array]:
        """A chunk of the gradient, and of the parameter: float32[size, 32, 128]."""

        spot = windows.Spot.of(tile, self.bands[leaf])

        def direct(n, i):
            here = [b.direct[n]] if self.apply is None else [self.grads[i], b.direct[n]]
            found = [windows.read(x, self.layout.quantized[i], spot, size, self.hold) for x in here]
            return [x.astype(jnp.float32) for x in found]

        def staged():
            at = self.first[leaf] + tile
            return [lax.dynamic_slice_in_dim(x, at, size) for x in b.staged]

        branches = [partial(direct, n, i) for n, i in enumerate(self.staging.direct)]
        branches += [staged] if b.staged else []
        return lax.switch(self.source[leaf], branches)

    def applied(
        self, leaf: jax.Array, p: jax.Array, update: jax.Array, bits: jax.Array | None
    ) -> jax.Array:
        """A chunk of new parameters: in float32, but such as their dtype holds where rounded."""
        assert self.apply is not None
        new = apply_block(p, update, self.apply.rate, self.apply.decay[leaf])
        if bits is None:
            return new
        return jnp.where(self.rounds[leaf], stochastic(new, bits).astype(jnp.float32), new)

    def write(
        self, leaf: jax.Array, tile: jax.Array, new: jax.Array, b: Buffers
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """What `Buffers` has of leaves, with a chunk of updates or parameters."""
        source, which = self.source[leaf], self.staging.direct
        spot = windows.Spot.of(tile, self.bands[leaf])

        def one(n, x):
            return windows.write(x, self.layout.quantized[which[n]], spot, new, self.hold)

        direct, staged = in_place_at(source, one, b.direct), list(b.staged)
        if staged:
            at, here = self.first[leaf] + tile, source == len(which)
            staged[-1] = in_place_if(here, lambda now, x: put(x, new, at), staged[-1])
        return direct, staged

    def load(
        self, bucket: jax.Array, small: dict[int, jax.Array], staged: list[jax.Array]
    ) -> list[jax.Array]:
        """The buffers with a bucket's leaves, of which the first are those read directly."""
        inputs = [small] if self.apply is None else [dict(enumerate(self.grads)), small]
        pairs = zip(staged, inputs, strict=False)
        return [self.staging.load(bucket - 1, x, leaves) for x, leaves in pairs]

    def unload(
        self, bucket: jax.Array, small: dict[int, jax.Array], staged: list[jax.Array]
    ) -> dict[int, jax.Array]:
        """The small leaves with a bucket's updates, or parameters."""
        return self.staging.unload(bucket - 1, small, staged[-1]) if staged else small
