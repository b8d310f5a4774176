"""The update of one tile: one warpgroup, thread t owning lane t, the group whose codes are word t
of every plane.

A group needs seven reductions, most of which the next formula waits for, so a tile is gone over in
five passes over its 32 elements, in four where nu has no codes; between the second and the third
its rows are summed over the lanes. What passes share is kept in shared memory, in three blocks [32,
128], few enough for three tiles on a processor; what they can compute again from it they do. The
formulas are those of `stquant_jax.codecs`, here of vectors of 128 lanes: elementwise ones element
by element, ones of a group once.

mu is divided by roots before the base of its group is known, which is a factor of all of them and
comes in with the gain.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import words
from pallas_kernels.gpu.folding import QUARTERS, fold, read, sums_of_rows, write
from pallas_kernels.gpu.geometry import Geometry, Scratch
from pallas_kernels.gpu.instructions import SPECIAL
from pallas_kernels.gpu.lanes import meet, vector
from pallas_kernels.gpu.tile import Tile
from pallas_kernels.leaves import SUMS, Scalars
from stquant_jax.codecs import Second, decoded_second, error_of
from stquant_jax.codecs.first import decoded_first, gain_of, gain_over_roots, length_of, quantized
from stquant_jax.codecs.lattices import (
    Growth,
    base_of,
    centring_step,
    grown,
    last_code,
    part_of,
    pull_of_part,
    root_of,
    row_step,
    settled,
    stepped,
)
from stquant_jax.rules.apply import apply_block
from stquant_jax.storage.noise import rounding_bits
from stquant_jax.storage.numerics import exp2, to_code, to_float
from stquant_jax.storage.planes import GROUP

Terms = Callable[..., Sequence[jax.Array]]
PROGRAMS = True, False  # with codes of nu and without; `benchmarks.gpu.ptxas` counts one at a time
DOWN, ROOT, INVERSE, SHARE = range(4)  # numbers of a tile's rows, for `Passes.rows`


def update_tile(
    geometry: Geometry,
    terms: Terms,
    s: Scalars,
    leaf: jax.Array,
    tile: jax.Array,
    gradients: Sequence[Any],
    out: Sequence[Any],
    sums: Any,
    stored: Any,  # `Packed` of references
    scratch: Scratch,
) -> None:
    """Decode, rule, encode: a tile of a leaf.

    Args:
      leaf: its place in ``gradients`` and ``out``, leaves' matrices. The latter take the updates,
        or hold parameters that they are applied to.
      sums: float32[16], of what `terms` returns.
    """
    args = geometry, terms, s, leaf, tile, gradients, out, sums, stored, scratch
    for coded in PROGRAMS:
        pl.when((s.nu_width > 0) == coded)(partial(_update_tile, coded, *args))


def _update_tile(
    coded, geometry, terms, s, leaf, tile, gradients, out, sums, stored, scratch
) -> None:
    tile = Passes(coded, geometry, s, leaf, tile, stored, scratch)
    tile.fetch(gradients)
    energy, before, codes = tile.accumulate()
    growth = grown(energy, tile.size, before)
    tile.take_parts(growth)
    tile.move_rows(growth, codes)
    tile.fetch_params(out)
    least = tile.step_codes() if coded else None
    group = Group(growth, least, *pull_of_part(growth, energy, s.lat))
    decoded, largest = tile.direct(group)
    nu_scale, octaves = base_of(energy, decoded, growth, tile.coins.nu_coin)
    inverse_base = exp2(-octaves)
    gain = gain_of(largest * inverse_base, s.lev)
    sample = tile.sample(group, inverse_base, gain)
    tile.store(out)
    true, decoded = tile.code_first(gain_over_roots(gain, inverse_base))
    length = SPECIAL.divide(true, gain * gain)
    mu_scale = length_of(length, decoded, growth.presence, tile.coins.mu_coin)
    tile.write(mu_scale, nu_scale)
    error = error_of(sample.pop("e"), sample["mu_code"], mu_scale, s.lev)
    tile.report(terms, sample | {"mu_error": error}, sums)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class Group(NamedTuple):
    """What elements of a group need of it, to make their updates."""

    growth: Growth
    least: Any  # of nu's codes; None where there are none
    half: jax.Array  # of its energy: v over its part
    on_part: jax.Array  # factors in the v that an update uses: of the element's part
    on_share: jax.Array  # and of its row's share


class Passes(Tile):
    """The passes over a tile, in their order."""

    def second(self, codes: jax.Array | None, row: jax.Array, i: jax.Array) -> Second:
        return decoded_second(codes, self.base, row, self.valid(i), self.s.lat)

    def nu_code(self, i: jax.Array) -> Any:
        return words.code_at(self.scratch.nu_words, i) if self.coded else None

    def nu_codes(self, r: jax.Array) -> list:
        return words.codes(self.scratch.nu_words, r) if self.coded else [None] * len(QUARTERS)

    @property
    def alike(self) -> bool:
        """Whether all elements of a row had the same root."""
        return not (self.coded or self.geometry.ragged)

    def accumulate(self) -> tuple[jax.Array, ...]:
        """New moments, and the roots squared that they grow out of. Per group: its energy, that
        before over its base, and the sum of nu's codes."""
        s, scratch = self.s, self.scratch

        def element(r, q, mu_code, nu_code):
            i = r + 8 * q
            old = self.second(nu_code, scratch.roots[i], i)
            mu = decoded_first(mu_code, old.root, self.step, s.lev)
            mu, v = self.geometry.rule.accumulate(self.gradient(r, q), mu, old.v, s.rule)
            scratch.mu[i] = mu
            write(scratch.v, i, v)
            if not self.alike:
                write(scratch.shapes, i, vector(old.shape))
            code = jnp.float32(0) if old.codes is None else self.valid(i) * old.codes
            return v, vector(old.shape), vector(code)

        def of_word(r):
            mu, nu = words.codes(scratch.mu_words, r), self.nu_codes(r)
            return [element(r, q, mu[q], nu[q]) for q in QUARTERS]

        zero = vector(0.0)
        return fold(of_word, (jnp.add,) * 3, (zero, zero, zero))

    def take_parts(self, growth: Growth) -> None:
        """Elements' parts of their group's energy, in place of v, and before, in place of
        shapes."""
        scratch = self.scratch

        def of_word(r):
            for q in QUARTERS:
                i = r + 8 * q
                write(scratch.v, i, part_of(read(scratch.v, i), growth))
                if not self.alike:
                    write(scratch.shapes, i, read(scratch.shapes, i) * growth.before)
            return [()] * len(QUARTERS)

        fold(of_word, (), ())
        meet()

    def move_rows(self, growth: Growth, codes: jax.Array) -> None:
        """Let all rows follow their elements, and centre the codes of the round-robin one. Rows
        lie side by side, row i in lane i."""
        s, scratch = self.s, self.scratch

        def living(x):
            """Sum over the lanes whose groups are neither zero nor unbounded."""
            return jnp.sum(jnp.where(growth.presence == 1.0, vector(x), 0.0))

        if self.alike:
            (now,) = sums_of_rows([scratch.v], scratch.parts[:1])
            before = self.root * self.root * jnp.sum(growth.before)
        else:
            now, before = sums_of_rows([scratch.v, scratch.shapes], scratch.parts)
        dither = self.noise(self.lane, self.first_group).nu
        moved = self.row + row_step(now, before, dither, self.coded)
        if self.coded:
            code, valid = to_float(self.nu_code(s.round_row)), self.valid(s.round_row)
            here = living(valid * code), living(valid)
            tile = living(codes), living(self.size)
            centred = centring_step(*here, *tile, s.lat, dither)
            moved += jnp.where(self.lane == s.round_row, centred, 0.0)
        # Which rows there are is what the tile's first lane says.
        count = jnp.clip(self.first_left, 0, GROUP)
        known = self.lane < count
        size = jnp.maximum(count, 1).astype(jnp.float32)  # a tile that only aligns has no elements
        rows = settled(self.row, moved, known, size, jnp.max, jnp.sum, s.lat)
        self.energy_of_rows = rows.energy
        for what, x in enumerate((rows.down, rows.root, rows.inverse, rows.share)):
            scratch.of_rows[what] = x
        scratch.row_codes[...] = to_code(rows.row).astype(jnp.uint8)
        meet()

    def rows(self, what: int, i: jax.Array) -> jax.Array:
        """What `move_rows` found of row i."""
        return self.scratch.of_rows[what, i]

    def step_codes(self) -> jax.Array:
        """nu's codes move with the drift of their elements. Per group: the least."""
        scratch = self.scratch

        def element(i, nu_code):
            now, before = read(scratch.v, i), read(scratch.shapes, i)
            dither = self.noise(i, self.group).nu
            down = self.rows(DOWN, i)
            code = stepped(to_float(nu_code), now, before, down, self.s.lat, dither, SPECIAL)
            write(scratch.shapes, i, code)
            return (code,)

        def of_word(r):
            return [element(r + 8 * q, nu) for q, nu in enumerate(self.nu_codes(r))]

        return fold(of_word, (jnp.minimum,), (vector(jnp.inf),))[0]

    def placed(self, i: jax.Array, group: Group) -> jax.Array:
        """nu's code of element i, float32, counted from the group's largest root."""
        last = last_code(group.growth, self.s.lat)
        return jnp.minimum(read(self.scratch.shapes, i) - group.least, last)

    def root_at(self, i: jax.Array, code: jax.Array | None) -> jax.Array:
        """Over the group's new base."""
        of_row = self.rows(ROOT, i)
        return of_row if code is None else root_of(code, self.s.lat) * of_row

    def result(self, i: jax.Array, g: jax.Array, group: Group) -> tuple[jax.Array, jax.Array]:
        """Of an element: its update, and v as that used it."""
        s, scratch = self.s, self.scratch
        v_used = group.on_part * read(scratch.v, i) + group.on_share * self.rows(SHARE, i)
        update = self.geometry.rule.direction(g, scratch.mu[i], v_used, s.rule, SPECIAL)
        return update, v_used

    def direct(self, group: Group) -> tuple[jax.Array, ...]:
        """nu's codes, packed; updates; mu over roots, in place of mu. Per group: the energy that is
        decoded, and the largest of mu over roots."""
        scratch, geometry = self.scratch, self.geometry
        self.result_of_round_row = self.result(self.s.round_row, self.gradient_of_round_row, group)
        if geometry.params:
            plgpu.barrier_wait(scratch.params_arrived)

        def element(r, q, code):
            i = r + 8 * q
            g = self.gradient(r, q) if geometry.rule.nesterov else jnp.float32(0)
            update, _ = self.result(i, g, group)
            geometry.out.write(scratch.out, r, q, self.applied(r, q, update))
            if code is None:
                e = scratch.mu[i] * self.rows(INVERSE, i)
                decoded = vector(self.valid(i) * self.rows(ROOT, i) ** 2)
            else:
                x = self.root_at(i, code)
                e = SPECIAL.divide(scratch.mu[i], x)
                decoded = x * x * self.valid(i)
            scratch.mu[i] = e
            return decoded, jnp.abs(e)

        def of_word(r):
            codes = [None] * len(QUARTERS)
            if self.coded:
                codes = [to_code(self.placed(r + 8 * q, group)) for q in QUARTERS]
                words.put_codes(scratch.nu_words, r, codes)
            return [element(r, q, code) for q, code in enumerate(codes)]

        start = vector(0.0), vector(-jnp.inf)
        decoded, largest = fold(of_word, (jnp.add, jnp.maximum), start)
        return vector(self.energy_of_rows) if self.alike else decoded, largest

    def sample(
        self, group: Group, inverse_base: jax.Array, gain: jax.Array
    ) -> dict[str, jax.Array]:
        """What statistics are taken of, of the round-robin row, and mu over sigma, `e`."""
        i, growth, scratch = self.s.round_row, group.growth, self.scratch
        update, v_used = self.result_of_round_row
        nu_code = self.placed(i, group) if self.coded else None
        e = scratch.mu[i] * inverse_base
        root = self.root_at(i, None if nu_code is None else to_code(nu_code))
        q = quantized(e, gain, self.s.lev, self.noise(i, self.group).mu)
        return {
            "present": self.valid(i) * growth.presence == 1.0,
            "g": self.gradient_of_round_row,
            "update": update,
            "nu": read(scratch.v, i) * group.half,
            "nu_used": v_used,
            "predicted": growth.mean * self.rows(SHARE, i),
            "inverse_root": inverse_base / root,
            "nu_code": vector(0.0) if nu_code is None else nu_code,
            "mu_code": q - self.s.lev.low,
            "e": e,
        }

    def applied(self, r: jax.Array, q: int, update: jax.Array) -> jax.Array:
        """The new parameter of element r + 8 q, if updates are applied here."""
        if not self.geometry.params:
            return update
        p = self.geometry.params.read(self.scratch.out, r, q)
        bits = None
        if self.geometry.rounds:
            bits = rounding_bits(self.s.keys, self.group, (r + 8 * q).astype(jnp.uint32))
        return apply_block(p, update, self.s.rate, self.s.decay, bits)

    def code_first(self, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
        """mu's codes, packed. Per group: the length, squared, in codes; that decoded, in scales."""
        lev, scratch = self.s.lev, self.scratch

        def element(i):
            x = scratch.mu[i]
            q = quantized(x, gain, lev, self.noise(i, self.group).mu)
            level = q + lev.between
            length = jnp.square(x * gain)
            return q, (length, level * level * self.valid(i))

        def of_word(r):
            parts = [element(r + 8 * q) for q in QUARTERS]
            words.put_whole(scratch.mu_words, r, [q for q, _ in parts], lev.low)
            return [lengths for _, lengths in parts]

        true, decoded = fold(of_word, (jnp.add, jnp.add), (vector(0.0), vector(0.0)))
        return true, decoded * (lev.unit * lev.unit)

    def report(self, terms: Terms, sample: dict[str, jax.Array], sums: Any) -> None:
        """Statistics of the round-robin row, summed over the lanes: in another order than by
        halves."""
        s, scratch = self.s, self.scratch
        for k, term in enumerate(terms(sample, self.geometry.rule, s.rule, s.lev, s.lat, SPECIAL)):
            write(scratch.v, k, vector(term))
        meet()
        (scratch.of_rows[0],) = sums_of_rows([scratch.v], scratch.parts[:1])
        meet()
        plgpu.copy_smem_to_gmem(scratch.of_rows.at[0, pl.ds(0, SUMS)], sums)
