"""The update of one tile: one warpgroup, thread t owning lane t, the group whose codes are word t
of every plane.

A group needs six reductions, each of which the next formula waits for, so a tile is gone over in
five passes over its 32 elements, in three where nu has no codes; a row needs one, over the lanes.
What passes share is kept in shared memory, in four arrays [32, 128], few enough for three tiles on
a processor; what they can compute again from it they do. The formulas are those of
`stquant_jax.codecs`, here of vectors of 128 lanes: elementwise ones element by element, ones of a
group once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import words
from pallas_kernels.gpu.folding import QUARTERS, fold
from pallas_kernels.gpu.geometry import Geometry, Scratch
from pallas_kernels.gpu.lanes import lane_index, meet, vector
from pallas_kernels.leaves import Scalars
from stquant_jax.codecs import Second, decode_first, decoded_second, error_of
from stquant_jax.codecs.first import gain_of, length_of, quantized
from stquant_jax.codecs.lattices import (
    ROW_LAST,
    ROW_PER_OCTAVE,
    Growth,
    base_of,
    centring_step,
    decoded_base,
    grown,
    last_code,
    part_of,
    root_of,
    root_of_row,
    row_step,
    shrunk,
    stepped,
)
from stquant_jax.rules.apply import apply_block
from stquant_jax.storage.arena import Span
from stquant_jax.storage.noise import Dither, rounding_bits
from stquant_jax.storage.numerics import TINY, exp2, to_code, to_float
from stquant_jax.storage.planes import GROUP, LANES

Terms = Callable[..., Sequence[jax.Array]]
PROGRAMS = True, False  # with codes of nu and without; `benchmarks.gpu.ptxas` counts one at a time
OLD, DOWN, ROOT, INVERSE, SHARE = range(5)  # numbers of a tile's rows, for `Tile.rows`


def update_tile(
    geometry: Geometry,
    terms: Terms,
    s: Scalars,
    gradients: Any,
    out: Any,
    sums: Any,
    stored: Any,  # `Packed` of references
    scratch: Scratch,
) -> None:
    """Decode, rule, encode: the tile of this block of the grid.

    Args:
      gradients, out: the leaf's matrices. The latter takes the updates, or holds parameters that
        they are applied to.
      sums: float32[tiles, 16], of what `terms` returns.
    """
    args = geometry, terms, s, gradients, out, sums, stored, scratch
    for coded in PROGRAMS:
        pl.when((s.nu_width > 0) == coded)(partial(_update_tile, coded, *args))


def _update_tile(coded, geometry, terms, s, gradients, out, sums, stored, scratch) -> None:
    tile = Tile(coded, geometry, s, stored, scratch)
    tile.fetch(gradients)
    energy, before, codes = tile.accumulate()
    growth = grown(energy, tile.size, before)
    tile.move_rows(growth, codes)
    tile.fetch_params(out)
    decoded = tile.code_second(growth)
    nu_scale, rounded = base_of(energy, decoded, growth, tile.coins.nu_coin)
    inverse_base = exp2(-rounded)
    sample = tile.sample(growth, inverse_base)
    largest, length = tile.direct(growth, inverse_base)
    tile.store(out)
    gain = gain_of(largest, s.lev)
    decoded = tile.code_first(gain)
    mu_scale = length_of(length, decoded, growth.presence, tile.coins.mu_coin)
    tile.write(mu_scale, nu_scale)
    tile.report(terms, sample, gain, mu_scale, sums)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class Tile:
    """The passes over a tile, in their order."""

    def __init__(self, coded: bool, geometry: Geometry, s: Scalars, stored: Any, scratch: Scratch):
        self.coded = coded
        self.geometry, self.s, self.stored, self.scratch = geometry, s, stored, scratch
        tile = lax.axis_index("tile")
        self.lane = lane_index()
        place = geometry.place._replace(start=s.start)
        self.group, self.left = place.of_lanes(vector(tile), self.lane)
        self.first_group, self.first_left = place.of_lanes(tile, jnp.int32(0))
        self.size = jnp.float32(GROUP)  # elements of a group
        if geometry.ragged:
            self.size = jnp.clip(self.left, 0, GROUP).astype(jnp.float32)
        self.coins = self.noise(jnp.int32(0), self.group)
        self.tile, self.at = tile, s.first_tile + tile
        stride = jnp.int32(geometry.tiles)
        self.mu_slot = Span(s.mu_first + tile, s.mu_width, stride)
        self.nu_slot = Span(s.nu_first + tile, s.nu_width, stride)

    @property
    def corner(self) -> tuple[jax.Array, jax.Array]:
        """Band and lane tile in the leaf's matrix."""
        if self.geometry.staged:
            return self.tile, jnp.int32(0)
        lane_tile = self.tile // self.geometry.bands
        return self.tile - lane_tile * self.geometry.bands, lane_tile

    def noise(self, i: jax.Array, group: jax.Array) -> Dither:
        return Dither(self.s.keys, group, i.astype(jnp.uint32))

    def valid(self, i: jax.Array) -> jax.Array:
        """1 where element i exists, 0 where it is padding."""
        if not self.geometry.ragged:
            return jnp.float32(1)
        return jnp.where(i < self.left, 1.0, 0.0)

    def fetch(self, gradients: Any) -> None:
        """All that is read of global memory, asked for at once."""
        stored, scratch = self.stored, self.scratch
        self.geometry.gradients.fetch(gradients, scratch.gradients, *self.corner, scratch.arrived)
        # A transfer that a barrier counts has 128 bytes or more: rows of the next tiles come along.
        rows = stored.nu_row.at[pl.ds(self.at * GROUP, LANES)]
        plgpu.copy_gmem_to_smem(rows, scratch.row_codes, scratch.arrived)
        home = self.mu_slot.first
        words.load(stored.arena, self.mu_slot, home, scratch.mu_words)
        if self.coded:
            words.load(stored.arena, self.nu_slot, home, scratch.nu_words)
        self.mu_scale = stored.mu_scale[self.at].astype(jnp.uint32)
        self.base = decoded_base(stored.nu_scale[self.at].astype(jnp.uint32))
        plgpu.barrier_wait(scratch.arrived)
        self.row = to_float(scratch.row_codes[...].astype(jnp.uint32))  # of row i, in lane i
        self.root = root_of_row(self.row)
        scratch.codes[0] = self.root
        meet()

    def gradient(self, i: jax.Array) -> jax.Array:
        g = self.geometry.gradients.read(self.scratch.gradients, i)
        return g.astype(jnp.float32)

    def second(self, codes: jax.Array | None, row: jax.Array, i: jax.Array) -> Second:
        return decoded_second(codes, self.base, row, self.valid(i), self.s.lat)

    def nu_code(self, i: jax.Array) -> Any:
        return words.code_at(self.scratch.nu_words, i) if self.coded else None

    def nu_codes(self, r: jax.Array) -> list:
        return words.codes(self.scratch.nu_words, r) if self.coded else [None] * len(QUARTERS)

    def accumulate(self) -> tuple[jax.Array, ...]:
        """New moments. Per group: its energy, that before over its base, and the sum of nu's
        codes."""
        s, scratch = self.s, self.scratch

        def element(i, mu_code, nu_code):
            old = self.second(nu_code, scratch.codes[0, i], i)
            mu = decode_first(mu_code, self.mu_scale, old.root, old.base, s.lev)
            mu, v = self.geometry.rule.accumulate(self.gradient(i), mu, old.v, s.rule)
            scratch.mu[i] = mu
            scratch.v[i] = v
            code = jnp.float32(0) if old.codes is None else self.valid(i) * old.codes
            return v, vector(old.shape), vector(code)

        def of_word(r):
            mu, nu = words.codes(scratch.mu_words, r), self.nu_codes(r)
            return [element(r + 8 * q, mu[q], nu[q]) for q in QUARTERS]

        zero = vector(0.0)
        return fold(of_word, (jnp.add,) * 3, (zero, zero, zero))

    def parts(self, i: jax.Array, growth: Growth, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """An element's part of its group's energy, now and before."""
        old = self.second(self.nu_code(i), row, i)
        return part_of(self.scratch.v[i], growth), old.shape * growth.before

    def move_rows(self, growth: Growth, codes: jax.Array) -> None:
        """Let all rows follow their elements, and centre the codes of the round-robin one. Rows
        lie side by side, row i in lane i."""
        s, scratch = self.s, self.scratch

        def living(x):
            """Sum over the lanes whose groups are neither zero nor unbounded."""
            return jnp.sum(jnp.where(growth.presence == 1.0, vector(x), 0.0))

        def of_row(i, sums):
            parts = zip(self.parts(i, growth, scratch.codes[0, i]), sums, strict=True)
            return [jnp.where(self.lane == i, jnp.sum(vector(x)), so_far) for x, so_far in parts]

        now, before = lax.fori_loop(0, GROUP, of_row, [vector(0.0)] * 2)
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
        lowest = -jnp.max(jnp.where(known, -moved, -float(ROW_LAST)))
        moved = jnp.clip(moved, lowest, lowest + ROW_LAST)
        row = moved - lowest
        root, inverse = root_of_row(row), root_of_row(-row)
        size = jnp.maximum(count, 1).astype(jnp.float32)  # a tile that only aligns has no elements
        mean = jnp.sum(jnp.where(known, root * root, 0.0)) / size
        share = root * root / jnp.maximum(mean, TINY)
        down = (moved - self.row) * (1 / ROW_PER_OCTAVE)
        for what, x in enumerate((self.root, down, root, inverse, share)):
            scratch.mu_words[what] = lax.bitcast_convert_type(x, jnp.uint32)
        scratch.row_codes[...] = to_code(row).astype(jnp.uint8)
        meet()

    def rows(self, what: int, i: jax.Array) -> jax.Array:
        """What `move_rows` found of row i."""
        return lax.bitcast_convert_type(self.scratch.mu_words[what, i], jnp.float32)

    def fetch_params(self, params: Any) -> None:
        """They may come where the gradients were, whose last use this is, unless the rule asks for
        them again."""
        self.gradient_of_round_row = self.gradient(self.s.round_row)
        if self.geometry.params:
            meet()
            self.geometry.params.fetch(
                params, self.scratch.out, *self.corner, self.scratch.params_arrived
            )

    def code_second(self, growth: Growth) -> jax.Array:
        """nu's codes, and roots over the group's base in their place. Per group: the energy that is
        decoded."""
        if not self.coded:
            return self.decoded_energy(lambda r: [self.rows(ROOT, r + 8 * q) for q in QUARTERS])
        highest, last = self.step_codes(growth), last_code(growth, self.s.lat)
        return self.decoded_energy(partial(self.place_codes, highest, last))

    def step_codes(self, growth: Growth) -> jax.Array:
        """nu's codes move with the drift of their elements. Per group: the least."""
        scratch = self.scratch

        def element(i, nu_code):
            now, before = self.parts(i, growth, self.rows(OLD, i))
            dither = self.noise(i, self.group).nu
            code = stepped(to_float(nu_code), now, before, self.rows(DOWN, i), self.s.lat, dither)
            scratch.codes[i] = code
            return (code,)

        def of_word(r):
            return [element(r + 8 * q, nu) for q, nu in enumerate(self.nu_codes(r))]

        return fold(of_word, (jnp.minimum,), (vector(jnp.inf),))[0]

    def decoded_energy(self, roots: Callable[[jax.Array], list[jax.Array]]) -> jax.Array:
        """Per group: the sum of the squares of ``roots(r)``, of elements r, r + 8, ..."""

        def of_word(r):
            return [(vector(x * x * self.valid(r + 8 * q)),) for q, x in enumerate(roots(r))]

        return fold(of_word, (jnp.add,), (vector(0.0),))[0]

    def place_codes(self, least: jax.Array, last: jax.Array, r: jax.Array) -> list[jax.Array]:
        """nu's codes counted from the group's largest root, packed; roots over the group's base."""
        scratch = self.scratch
        parts, roots = [], []
        for q in QUARTERS:
            i = r + 8 * q
            parts.append(to_code(jnp.minimum(scratch.codes[i] - least, last)))
            roots.append(root_of(parts[-1], self.s.lat) * self.rows(ROOT, i))
            scratch.codes[i] = roots[-1]
        words.put_codes(scratch.nu_words, r, parts)
        return roots

    def result(
        self, i: jax.Array, g: jax.Array, growth: Growth, inverse_base: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Of an element: its update, v as that used it, 1 / sigma as coded."""
        s, scratch = self.s, self.scratch
        v_used = shrunk(scratch.v[i], growth.mean, self.rows(SHARE, i), s.lat)
        update = self.geometry.rule.direction(g, scratch.mu[i], v_used, s.rule)
        if self.coded:
            return update, v_used, inverse_base / scratch.codes[i]
        return update, v_used, inverse_base * self.rows(INVERSE, i)

    def sample(self, growth: Growth, inverse_base: jax.Array) -> dict[str, jax.Array]:
        """What statistics are taken of, of the round-robin row, but for mu's codes."""
        i, g = self.s.round_row, self.gradient_of_round_row
        update, v_used, inverse_root = self.result(i, g, growth, inverse_base)
        code = to_float(self.nu_code(i)) if self.coded else vector(0.0)
        return {
            "present": self.valid(i) * growth.presence == 1.0,
            "g": g,
            "update": update,
            "nu": self.scratch.v[i],
            "nu_used": v_used,
            "predicted": growth.mean * self.rows(SHARE, i),
            "inverse_root": inverse_root,
            "nu_code": code,
        }

    def direct(self, growth: Growth, inverse_base: jax.Array) -> tuple[jax.Array, ...]:
        """Updates, and mu over sigma. Of the latter, per group: the largest and the length."""
        scratch, geometry = self.scratch, self.geometry
        if geometry.params:
            plgpu.barrier_wait(scratch.params_arrived)

        def element(i):
            g = self.gradient(i) if geometry.rule.nesterov else jnp.float32(0)
            update, _, inverse_root = self.result(i, g, growth, inverse_base)
            geometry.out.write(scratch.out, i, self.applied(i, update))
            e = scratch.mu[i] * inverse_root
            scratch.mu[i] = e
            return jnp.abs(e), e * e

        def of_word(r):
            return [element(r + 8 * q) for q in QUARTERS]

        return fold(of_word, (jnp.maximum, jnp.add), (vector(-jnp.inf), vector(0.0)))

    def applied(self, i: jax.Array, update: jax.Array) -> jax.Array:
        """The new parameter, if updates are applied here."""
        if not self.geometry.params:
            return update
        p = self.geometry.params.read(self.scratch.out, i)
        bits = None
        if self.geometry.rounds:
            bits = rounding_bits(self.s.keys, self.group, i.astype(jnp.uint32))
        return apply_block(p, update, self.s.rate, self.s.decay, bits)

    def store(self, out: Any) -> None:
        """Updates and rows go out while mu is coded."""
        rows = self.stored.nu_row.at[pl.ds(self.at * GROUP, GROUP)]
        meet()
        self.geometry.out.store(out, self.scratch.out, *self.corner)
        plgpu.copy_smem_to_gmem(self.scratch.row_codes.at[pl.ds(0, GROUP)], rows)

    def coded_first(self, i: jax.Array, gain: jax.Array) -> jax.Array:
        """mu's code of element i, signed."""
        return quantized(self.scratch.mu[i], gain, self.s.lev, self.noise(i, self.group).mu)

    def code_first(self, gain: jax.Array) -> jax.Array:
        """mu's codes, packed. Per group: the decoded length, squared, in scales."""
        lev = self.s.lev

        def element(i):
            q = self.coded_first(i, gain)
            level = q + lev.between
            return to_code(q, lev.low), (level * level * self.valid(i),)

        def of_word(r):
            parts = [element(r + 8 * q) for q in QUARTERS]
            words.put_codes(self.scratch.mu_words, r, [code for code, _ in parts])
            return [length for _, length in parts]

        return fold(of_word, (jnp.add,), (vector(0.0),))[0] * (lev.unit * lev.unit)

    def write(self, mu_scale: jax.Array, nu_scale: jax.Array) -> None:
        """Codes and scales back to where they were read."""
        words.store(self.stored.arena, self.mu_slot, self.scratch.mu_words)
        if self.coded:
            words.store(self.stored.arena, self.nu_slot, self.scratch.nu_words)
        self.stored.mu_scale[self.at] = mu_scale.astype(jnp.uint8)
        self.stored.nu_scale[self.at] = nu_scale.astype(jnp.uint16)

    def report(
        self,
        terms: Terms,
        sample: dict[str, jax.Array],
        gain: jax.Array,
        mu_scale: jax.Array,
        sums: Any,
    ) -> None:
        """Statistics of the round-robin row, summed over the lanes: in the order in which warps do
        it, not by halves, for which lanes would have to read one another's terms."""
        s, i = self.s, self.s.round_row
        code = self.coded_first(i, gain) - s.lev.low
        error = error_of(self.scratch.mu[i], code, mu_scale, s.lev)
        sample = sample | {"mu_code": code, "mu_error": error}
        for k, term in enumerate(terms(sample, self.geometry.rule, s.rule, s.lev, s.lat)):
            sums[self.tile, k] = jnp.sum(vector(term))
