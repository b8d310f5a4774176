"""The update of a chunk, eight tiles: passes over their elements, tile by tile, and between them
what belongs to groups and to rows, of all eight tiles at once.

mu is divided by roots before the base of its group is known, which is a factor of all of them and
comes in with the gain. The formulas are those of `stquant_jax.codecs`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.leaves import Scalars
from pallas_kernels.tpu.chunks import CHUNK, Chunks
from pallas_kernels.tpu.vmem import (
    BEFORE,
    DOWN,
    INVERSE,
    NOW,
    ROOT,
    SHARE,
    THEN,
    Chunk,
    Scratch,
    rows_of,
    stored_rows,
)
from stquant_jax.codecs import error_of
from stquant_jax.codecs.first import (
    decoded_first,
    gain_of,
    gain_over_roots,
    length_of,
    quantized,
    step_of,
)
from stquant_jax.codecs.lattices import (
    Growth,
    base_of,
    centring_step,
    decoded_base,
    grown,
    last_code,
    part_of,
    pull_of_part,
    root_of,
    root_of_row,
    row_step,
    settled,
    stepped,
)
from stquant_jax.codecs.second import decoded_second
from stquant_jax.rules.adam import Adam
from stquant_jax.rules.apply import apply_block
from stquant_jax.storage.noise import Dither, rounding_bits
from stquant_jax.storage.numerics import exp2, to_code, to_float
from stquant_jax.storage.planes import GROUP, LANES, code_in


class Codes(NamedTuple):
    """What is stored of a chunk beside its words, uint32."""

    mu_scale: jax.Array  # [8, 128]
    nu_scale: jax.Array
    nu_row: jax.Array  # [1, 256], a tile's next to the last one's


class Group(NamedTuple):
    """What elements of a group need of it, to make their updates."""

    least: jax.Array  # of nu's codes
    last: jax.Array
    on_part: jax.Array  # factors in the v that an update uses: of the element's part
    on_share: jax.Array  # and of its row's share


def update_chunk(
    rule: Adam,
    terms: Callable,
    chunks: Chunks,
    s: Scalars,
    chunk: jax.Array,
    codes: Codes,
    scratch: Scratch,
    applied: bool,
    stochastic: bool,
) -> Codes:
    """Decode, rule, encode, everything else in ``scratch``.

    Args:
      terms: from a sample of elements (a dict), the rule, its scalars, levels and lattice to what
        each element adds to the statistics: at most 16.
    """
    this = Passes(rule, chunks, s, chunk, scratch)
    row = rows_of(to_float(codes.nu_row))
    energy, before, sums = this.accumulate(codes, row)
    growth = grown(energy, this.size, before)
    this.take_parts(growth)
    row = this.move_rows(growth, row, sums)
    half, *factors = pull_of_part(growth, energy, s.lat)
    group = Group(this.step_codes(), last_code(growth, s.lat), *factors)
    sample = this.sample(group)
    decoded, largest = this.direct(group, applied, stochastic)
    nu_scale, octaves = base_of(energy, decoded, growth, this.coins.nu_coin)
    inverse_base = exp2(-octaves)
    gain = gain_of(largest * inverse_base, s.lev)
    true, decoded = this.code_first(gain_over_roots(gain, inverse_base))
    length = true / (gain * gain)
    mu_scale = length_of(length, decoded, growth.presence, this.coins.mu_coin)
    this.report(terms, sample, growth, half, inverse_base, gain, mu_scale)
    return Codes(mu_scale, nu_scale, to_code(stored_rows(row)))


class Passes(Chunk):
    """The passes over a chunk, in their order. Where nu has no codes some are shorter, or left
    out."""

    def accumulate(self, codes: Codes, row: jax.Array) -> tuple[jax.Array, ...]:
        """New moments, and the roots squared that they grow out of. Per group: its energy, that
        before over its base, and the sum of nu's codes."""
        s, scratch = self.s, self.scratch
        base = decoded_base(codes.nu_scale)
        self.keep(base, step_of(codes.mu_scale, base, s.lev))
        scratch.rows[BEFORE] = root_of_row(row)

        def tile(t, coded):
            base, step = t.of_groups(2)
            nu_codes = t.codes(1) if coded else None
            old = decoded_second(nu_codes, base, t.of_rows(BEFORE), t.valid, s.lat)
            mu = decoded_first(t.codes(0), old.root, step, s.lev)
            mu, v = self.rule.accumulate(scratch.data[t.here], mu, old.v, s.rule)
            shape = jnp.broadcast_to(old.shape, (GROUP, LANES))
            scratch.mu[t.here], scratch.v[t.here], scratch.shapes[t.here] = mu, v, shape
            t.reduce(0, jnp.add, v)
            t.reduce(1, jnp.add, shape)
            if coded:
                t.reduce(2, jnp.add, old.codes * t.valid)

        self.each_tile_by_program(tile)
        energy, before, sums = (self.reduced(i, jnp.add) for i in range(3))
        return energy, before, self.if_coded(sums)

    def take_parts(self, growth: Growth) -> None:
        """Elements' parts of their group's energy, in place of v, and before, in place of
        shapes; both summed over the lanes."""
        scratch = self.scratch
        self.keep(growth.now, growth.before)

        def tile(t):
            now, before = t.of_groups(2)
            part = part_of(scratch.v[t.here], growth._replace(now=now))
            then = scratch.shapes[t.here] * before
            scratch.v[t.here], scratch.shapes[t.here] = part, then
            t.sum_rows(NOW, part)
            t.sum_rows(THEN, then)

        self.each_tile(tile)

    def move_rows(self, growth: Growth, row: jax.Array, sums: jax.Array) -> jax.Array:
        """Let all rows follow their elements, and centre the codes of the round-robin ones."""
        s, scratch = self.s, self.scratch
        tiles = self.chunk * CHUNK + lax.broadcasted_iota(jnp.int32, (1, CHUNK), 1)
        group, left = self.place.of_lanes(tiles, jnp.zeros_like(tiles))
        element = lax.bitcast_convert_type(self.element, jnp.uint32)
        dither = Dither(s.keys, group, element).nu
        moved = row + row_step(scratch.rows[NOW], scratch.rows[THEN], dither, self.coded)
        moved += self.if_coded(self.centring(growth, sums, dither))
        count = jnp.clip(left, 0, GROUP)
        known = self.element < count
        size = jnp.maximum(count, 1).astype(jnp.float32)  # a tile that only aligns has no elements
        most, total = (partial(f, axis=0, keepdims=True) for f in (jnp.max, jnp.sum))
        rows = settled(row, moved, known, size, most, total, s.lat)
        scratch.rows[DOWN], scratch.rows[ROOT] = rows.down, rows.root
        scratch.rows[INVERSE], scratch.rows[SHARE] = rows.inverse, rows.share
        return rows.row

    def centring(self, growth: Growth, sums: jax.Array, dither: jax.Array) -> jax.Array:
        """Steps of each row, [32, 8]: none but the round-robin ones make one."""
        s, alive = self.s, jnp.where(growth.presence == 1.0, jnp.float32(1), jnp.float32(0))
        i = s.round_row  # word r of tile k is in row 8 r + k
        words = self.scratch.words[1, pl.ds(pl.multiple_of((i & 7) * CHUNK, CHUNK), CHUNK)]
        old, valid = to_float(code_in(words, i)), alive * self.has_round_row
        each = (valid * old, valid, alive * sums, alive * self.size)
        codes, living, all_codes, all_living = (
            self.of_rows(jnp.sum(x, axis=1, keepdims=True)) for x in each
        )
        step = centring_step(codes, living, all_codes, all_living, s.lat, dither)
        return jnp.where(self.element == s.round_row, step, 0.0)

    def step_codes(self) -> jax.Array:
        """nu's codes move with the drift of their elements. Per group: the least."""
        scratch = self.scratch

        def tile(t):
            now, before = scratch.v[t.here], scratch.shapes[t.here]
            dither = t.noise.nu
            old = to_float(t.codes(1))
            codes = stepped(old, now, before, t.of_rows(DOWN), self.s.lat, dither)
            scratch.shapes[t.here] = codes
            t.reduce(0, jnp.minimum, codes)

        pl.when(self.coded)(partial(self.each_tile, tile))
        return self.if_coded(self.reduced(0, jnp.minimum))

    def result(
        self, g: jax.Array, mu: jax.Array, part: jax.Array, share: jax.Array, group: Group
    ) -> tuple[jax.Array, jax.Array]:
        """Of elements: their updates, and v as those used it."""
        v_used = group.on_part * part + group.on_share * share
        return self.rule.direction(g, mu, v_used, self.s.rule), v_used

    def direct(self, group: Group, applied: bool, stochastic: bool) -> tuple[jax.Array, jax.Array]:
        """nu's codes, packed; updates, or new parameters; mu over roots, in place of mu. Per group:
        the energy that is decoded, and the largest of mu over roots."""
        s, scratch = self.s, self.scratch
        self.keep(*group)

        def tile(t, coded):
            of_group = Group(*t.of_groups(4))
            mu, root = scratch.mu[t.here], t.of_rows(ROOT)
            update, _ = self.result(
                scratch.data[t.here], mu, scratch.v[t.here], t.of_rows(SHARE), of_group
            )
            if applied:
                bits = rounding_bits(s.keys, t.group, t.element) if stochastic else None
                # The rounding to the parameters' dtype comes with the store.
                update = _apply(scratch.params[t.here], update, s, bits)
            scratch.data[t.here] = update
            if coded:
                codes = jnp.minimum(scratch.shapes[t.here] - of_group.least, of_group.last)
                codes = to_code(codes)
                t.put_codes(1, codes)
                root = root_of(codes, s.lat) * root
                e = mu / root
            else:
                e = mu * t.of_rows(INVERSE)
            scratch.mu[t.here] = e
            t.reduce(0, jnp.add, jnp.broadcast_to(root * root * t.valid, (GROUP, LANES)))
            t.reduce(1, jnp.maximum, jnp.abs(e))

        self.each_tile_by_program(tile)
        return self.reduced(0, jnp.add), self.reduced(1, jnp.maximum)

    def code_first(self, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
        """mu's codes, packed. Per group: the length, squared, in codes; that decoded, in scales."""
        lev, scratch = self.s.lev, self.scratch
        self.keep(gain)

        def tile(t):
            (gain,) = t.of_groups(1)
            e = scratch.mu[t.here]
            q = quantized(e, gain, lev, t.noise.mu)
            t.put_codes(0, to_code(q, lev.low))
            level = q + lev.between
            t.reduce(0, jnp.add, jnp.square(e * gain))
            t.reduce(1, jnp.add, level * level * t.valid)

        self.each_tile(tile)
        true, decoded = (self.reduced(i, jnp.add) for i in range(2))
        return true, decoded * (lev.unit * lev.unit)

    # --- statistics ---

    def sample(self, group: Group) -> dict[str, jax.Array]:
        """What is overwritten before statistics are taken, of the round-robin rows, [8, 128]."""
        scratch, pick = self.scratch, self.round_row
        g, part = pick(scratch.data), pick(scratch.v)
        here = pl.ds(self.s.round_row, 1)
        root, share = (self.of_columns(scratch.rows[what, here]) for what in (ROOT, SHARE))
        update, v_used = self.result(g, pick(scratch.mu), part, share, group)
        codes = jnp.minimum(pick(scratch.shapes) - group.least, group.last)
        codes, zero = self.if_coded(codes), jnp.zeros_like(g)
        root = root_of(to_code(codes), self.s.lat) * root
        return {
            "g": g,
            "update": update,
            "nu": part,
            "nu_used": v_used,
            "predicted": zero + share,
            "inverse_root": zero + root,
            "nu_code": codes,
        }

    def report(
        self,
        terms: Callable,
        sample: dict[str, jax.Array],
        growth: Growth,
        half: jax.Array,
        inverse_base: jax.Array,
        gain: jax.Array,
        mu_scale: jax.Array,
    ) -> None:
        """Statistics, from `sample` and what is known of groups since."""
        s = self.s
        e = self.round_row(self.scratch.mu) * inverse_base
        i = s.round_row.astype(jnp.uint32)
        q = quantized(e, gain, s.lev, Dither(s.keys, self.group, i).mu)
        code = q - s.lev.low
        sample = sample | {
            "present": self.has_round_row * growth.presence == 1.0,
            "nu": sample["nu"] * half,
            "predicted": sample["predicted"] * growth.mean,
            "inverse_root": inverse_base / sample["inverse_root"],
            "mu_code": code,
            "mu_error": error_of(e, code, mu_scale, s.lev),
        }
        for k, term in enumerate(terms(sample, self.rule, s.rule, s.lev, s.lat)):
            self.scratch.terms[CHUNK * k : CHUNK * (k + 1)] = term


def _apply(p: jax.Array, update: jax.Array, s: Scalars, bits: jax.Array | None) -> jax.Array:
    p = p if bits is None else p.astype(jnp.bfloat16)
    new = apply_block(p, update, s.rate, s.decay, bits)
    return new.astype(jnp.float32)
