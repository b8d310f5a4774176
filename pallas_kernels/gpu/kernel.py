"""The update of one tile: one warpgroup, thread t owning lane t, the group whose codes are word t
of every plane.

A group needs six reductions, each of which the next formula waits for, so a tile is gone over in
five passes over its 32 elements; a row needs one, over the lanes. What passes share is kept in
shared memory, in four arrays [32, 128], few enough for three tiles on a processor; what they can
compute again from it they do. The formulas are those of `stquant_jax.codecs`, here of vectors of
128 lanes: elementwise ones element by element, ones of a group once.
"""

from collections.abc import Callable, Sequence
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
from stquant_jax.apply import apply_block
from stquant_jax.arena import Span
from stquant_jax.codecs import Second, decode_first, decode_second
from stquant_jax.codecs.first import decoded_scale, gain_of, length_of, level_of, quantized
from stquant_jax.codecs.second import (
    ROW_LAST,
    ROW_PER_OCTAVE,
    Growth,
    base_of,
    centring_step,
    drift_of,
    factor_of,
    grown,
    last_code,
    log_share_of,
    row_step,
    shrunk,
    stepped,
)
from stquant_jax.noise import Dither, dither, rounding_bits
from stquant_jax.numerics import exp2, to_code, to_float
from stquant_jax.planes import GROUP, LANES

Terms = Callable[..., Sequence[jax.Array]]
OLD, NEW, DEPTH, LOG_SHARE = range(4)  # numbers of a tile's rows, for `Tile.rows`


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
    tile = Tile(geometry, s, stored, scratch)
    tile.fetch(gradients)
    energy, before, codes = tile.accumulate()
    growth = grown(energy, tile.size, before)
    tile.move_rows(growth, codes)
    tile.fetch_params(out)
    highest = tile.step_codes(growth)
    decoded = tile.place_codes(highest, last_code(growth, s.lat))
    nu_scale, rounded = base_of(energy, decoded, growth, tile.coins.nu_coin)
    sample = tile.sample(growth, rounded)
    largest, length = tile.direct(growth, rounded)
    tile.store(out)
    gain = gain_of(largest, s.lev)
    decoded = tile.code_first(gain)
    mu_scale = length_of(length, decoded, growth.presence, tile.coins.mu_coin)
    tile.write(mu_scale, nu_scale)
    tile.report(terms, sample, gain, mu_scale, sums)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class Tile:
    """The passes over a tile, in their order."""

    def __init__(self, geometry: Geometry, s: Scalars, stored: Any, scratch: Scratch):
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
        return dither(self.s.keys, group, i.astype(jnp.uint32))

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
        words.load(stored.arena, self.nu_slot, home, scratch.nu_words)
        self.mu_scale = stored.mu_scale[self.at].astype(jnp.uint32)
        self.nu_scale = stored.nu_scale[self.at].astype(jnp.uint32)
        plgpu.barrier_wait(scratch.arrived)
        self.row = to_float(scratch.row_codes[...].astype(jnp.uint32))  # of row i, in lane i
        scratch.codes[0] = self.row
        meet()

    def gradient(self, i: jax.Array) -> jax.Array:
        g = self.geometry.gradients.read(self.scratch.gradients, i)
        return g.astype(jnp.float32)

    def second(self, codes: jax.Array, row: jax.Array, i: jax.Array) -> Second:
        return decode_second(codes, self.nu_scale, row, self.valid(i), self.s.lat)

    def accumulate(self) -> tuple[jax.Array, ...]:
        """New moments. Per group: new and old energy, and the sum of nu's codes."""
        s, scratch = self.s, self.scratch

        def element(i, mu_code, nu_code):
            old = self.second(nu_code, scratch.codes[0, i], i)
            mu = decode_first(mu_code, self.mu_scale, old.sigma, s.lev)
            mu, v = self.geometry.rule.accumulate(self.gradient(i), mu, old.v, s.rule)
            scratch.mu[i] = mu
            scratch.drift[i] = drift_of(v, old.root)
            return v, old.root * old.root * self.valid(i), self.valid(i) * old.codes

        def of_word(r):
            mu, nu = words.codes(scratch.mu_words, r), words.codes(scratch.nu_words, r)
            return [element(r + 8 * q, mu[q], nu[q]) for q in QUARTERS]

        zero = vector(0.0)
        return fold(of_word, (jnp.add,) * 3, (zero, zero, zero))

    def move_rows(self, growth: Growth, codes: jax.Array) -> None:
        """Let all rows follow their elements, and centre the codes of the one in turn. Rows lie
        side by side, row i in lane i."""
        s, scratch = self.s, self.scratch

        def living(x):
            """Sum over the lanes whose groups are neither zero nor unbounded."""
            return jnp.sum(jnp.where(growth.presence == 1.0, vector(x), 0.0))

        def of_row(i, sums):
            valid = self.valid(i)
            factor = factor_of(scratch.drift[i] - growth.octaves)
            found = [living(jnp.where(valid > 0, factor, 0.0))]
            found += [living(valid)] * self.geometry.ragged
            return [
                jnp.where(self.lane == i, x, so_far) for x, so_far in zip(found, sums, strict=True)
            ]

        zeros = [vector(0.0)] * (2 if self.geometry.ragged else 1)
        factors, *here = lax.fori_loop(0, GROUP, of_row, zeros)
        here = here[0] if self.geometry.ragged else vector(living(1.0))
        code = to_float(words.code_at(scratch.nu_words, s.turn))
        code = jnp.where(self.nu_scale == 0, 0.0, code)
        valid = self.valid(s.turn)
        dither = self.noise(self.lane, self.first_group).nu
        centred = centring_step(
            living(valid * code), living(valid), living(codes), living(self.size), s.lat, dither
        )
        move = row_step(factors, here, s.lat, dither)
        move += jnp.where(self.lane == s.turn, centred, 0.0)
        moved = self.row + jnp.where(here > 0, move, 0.0)
        # Which rows there are is what the tile's first lane says.
        count = jnp.clip(self.first_left, 0, GROUP)
        known = self.lane < count
        lowest = -jnp.max(jnp.where(known, -moved, -float(ROW_LAST)))
        moved = jnp.clip(moved, lowest, lowest + ROW_LAST)
        row = moved - lowest
        depth = row * (1 / ROW_PER_OCTAVE)
        share = jnp.sum(jnp.where(known, exp2(-2.0 * depth), 0.0)) / count.astype(jnp.float32)
        numbers = self.row, moved, depth, log_share_of(depth, share)
        for what, x in enumerate(numbers):
            scratch.mu_words[what] = lax.bitcast_convert_type(x, jnp.uint32)
        scratch.row_codes[...] = to_code(row).astype(jnp.uint8)
        meet()

    def rows(self, what: int, i: jax.Array) -> jax.Array:
        """What `move_rows` found of row i."""
        return lax.bitcast_convert_type(self.scratch.mu_words[what, i], jnp.float32)

    def fetch_params(self, params: Any) -> None:
        """They may come where the gradients were, whose last use this is, unless the rule asks for
        them again."""
        self.gradient_in_turn = self.gradient(self.s.turn)
        if self.geometry.params:
            meet()
            self.geometry.params.fetch(
                params, self.scratch.out, *self.corner, self.scratch.params_arrived
            )

    def step_codes(self, growth: Growth) -> jax.Array:
        """nu's codes move with the drift of their elements. Per group: the largest, negated."""
        s, scratch = self.s, self.scratch

        def element(i, nu_code):
            row, drift = self.rows(OLD, i), scratch.drift[i]
            old = self.second(nu_code, row, i)
            down = (self.rows(NEW, i) - row) * (1 / ROW_PER_OCTAVE)
            own = drift - growth.octaves + down
            code = stepped(old.codes, own, s.lat, self.noise(i, self.group).nu)
            scratch.codes[i] = code
            scratch.drift[i] = old.log_root + drift
            return (-code,)

        def of_word(r):
            nu = words.codes(scratch.nu_words, r)
            return [element(r + 8 * q, nu[q]) for q in QUARTERS]

        return fold(of_word, (jnp.maximum,), (vector(-jnp.inf),))[0]

    def place_codes(self, highest: jax.Array, last: jax.Array) -> jax.Array:
        """nu's codes counted from the group's largest root, packed. Per group: decoded energy."""
        scratch = self.scratch

        def element(i):
            code = jnp.minimum(scratch.codes[i] + highest, last)
            root = exp2(-(self.rows(DEPTH, i) + self.s.lat.delta * code))  # over the group's base
            scratch.codes[i] = root
            return code, (root * root * self.valid(i),)

        def of_word(r):
            parts = [element(r + 8 * q) for q in QUARTERS]
            words.put_codes(scratch.nu_words, r, [to_code(code) for code, _ in parts])
            return [energy for _, energy in parts]

        return fold(of_word, (jnp.add,), (vector(0.0),))[0]

    def result(
        self, i: jax.Array, g: jax.Array, growth: Growth, rounded: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Of an element: its update, v as that used it, 1 / sigma as coded, spread."""
        s, scratch = self.s, self.scratch
        log_share = self.rows(LOG_SHARE, i)
        spread, v_used = shrunk(scratch.drift[i], growth.log_mean, log_share, s.lat)
        update = self.geometry.rule.direction(g, scratch.mu[i], v_used, s.rule)
        # One element that is not finite shows in its whole group, at once.
        update *= 1.0 + 0.0 * growth.presence
        inverse_root = exp2(-rounded) / scratch.codes[i]
        return update, v_used, inverse_root, spread

    def sample(self, growth: Growth, rounded: jax.Array) -> dict[str, jax.Array]:
        """What statistics are taken of, of the row in turn, but for mu's codes."""
        i, g, scratch = self.s.turn, self.gradient_in_turn, self.scratch
        update, v_used, inverse_root, spread = self.result(i, g, growth, rounded)
        code, depth = to_float(words.code_at(scratch.nu_words, i)), self.rows(DEPTH, i)
        return {
            "present": self.valid(i) * growth.presence == 1.0,
            "g": g,
            "update": update,
            "nu": v_used,
            "sigma": 1.0 / inverse_root,
            "nu_error": rounded - depth - self.s.lat.delta * code - scratch.drift[i],
            "spread": spread,
            "nu_code": code,
        }

    def direct(self, growth: Growth, rounded: jax.Array) -> tuple[jax.Array, ...]:
        """Updates, and mu over sigma. Of the latter, per group: the largest and the length."""
        scratch, geometry = self.scratch, self.geometry
        if geometry.params:
            plgpu.barrier_wait(scratch.params_arrived)

        def element(i):
            g = self.gradient(i) if geometry.rule.nesterov else jnp.float32(0)
            update, _, inverse_root, _ = self.result(i, g, growth, rounded)
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

    def code_first(self, gain: jax.Array) -> jax.Array:
        """mu's codes, packed. Per group: the decoded length, squared, in scales."""
        s, scratch = self.s, self.scratch

        def element(i):
            q = quantized(scratch.mu[i], gain, s.lev, self.noise(i, self.group).mu)
            level = level_of(q, s.lev)
            return to_code(q - s.lev.low), (level * level * self.valid(i),)

        def of_word(r):
            parts = [element(r + 8 * q) for q in QUARTERS]
            words.put_codes(scratch.mu_words, r, [code for code, _ in parts])
            return [length for _, length in parts]

        return fold(of_word, (jnp.add,), (vector(0.0),))[0]

    def write(self, mu_scale: jax.Array, nu_scale: jax.Array) -> None:
        """Codes and scales back to where they were read."""
        words.store(self.stored.arena, self.mu_slot, self.scratch.mu_words)
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
        """Statistics of the row in turn, summed over the lanes: in the order in which warps do it,
        not by halves, for which lanes would have to read one another's terms."""
        s, i = self.s, self.s.turn
        e = self.scratch.mu[i]
        q = quantized(e, gain, s.lev, self.noise(i, self.group).mu)
        error = level_of(q, s.lev) * decoded_scale(mu_scale) - e
        sample = sample | {"mu_code": q - s.lev.low, "mu_error": error}
        for k, term in enumerate(terms(sample, self.geometry.rule, s.rule, s.lev, s.lat)):
            sums[self.tile, k] = jnp.sum(vector(term))
