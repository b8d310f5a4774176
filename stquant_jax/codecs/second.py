"""Second moment, kept as sigma = sqrt(v), on a lattice in log2:

    log2 sigma_ij = base_j - row_i / 32 - delta * n_ij,    n_ij in 0..2**width - 1,    delta =
    window / 2**width octaves

for element i of group j. ``base`` is the group's two-byte scale; ``row`` is a byte that the 128
groups of a tile share, since elements at one place of neighbouring groups (one input feature, say)
are large or small together. It leaves a narrow window to the codes, and at width 0, where there are
none, it is what tells a group's elements apart. With b2 = 0.999 an element drifts by a thousandth
of an octave a step. Rounded to the nearest it would never move, and rounded at random off the
lattice it would be a random walk; here stored values stay on a lattice that moves with the group's
common growth, and an element takes a step with the small probability that its own drift asks for.
The error is proportional to delta.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from stquant_jax.codecs.blocks import Ops, group_max, group_sum, presence
from stquant_jax.numerics import TINY, exp2, log2, to_code, to_float
from stquant_jax.planes import GROUP

# log2 sigma over the 128 octaves whose squares are float32 numbers, two bytes.
BASE_PER_OCTAVE = 512
BASE_LOWEST = -63.0
BASE_NOT_FINITE = 2**16 - 1

ROW_PER_OCTAVE = 32
ROW_LAST = 2**8 - 1
_CENTRED_MOST = 8.0  # steps that a row's codes may be centred by at once
_CENTRED_PART = 0.25  # of their distance from the tile's that is made up at once


class Lattice(NamedTuple):
    """Numbers of a second moment's slot."""

    delta: jax.Array  # octaves from code to code
    last: jax.Array  # largest code
    # How far an element's root is pulled to what its group and row predict in the update (never in
    # the store): best is lattice noise over lattice noise plus true spread (James and Stein).
    shrinkage: jax.Array


def lattice(width: jax.Array, window: jax.Array, shrinkage: jax.Array) -> Lattice:
    """The lattice of a slot from its width (0..8), window (octaves) and shrinkage (0..1), traced
    scalars."""
    size = to_float(jnp.uint32(1) << width.astype(jnp.uint32))
    return Lattice(window / size, size - 1.0, shrinkage)


class Second(NamedTuple):
    """A decoded second moment, with what encoding its successor needs.

    A group of zeros has the shape that its rows tell: that is what it grows out of.
    """

    v: jax.Array  # [..., 32, n], zero where absent
    sigma: jax.Array  # its root
    log_root: jax.Array  # log2 of its root; of its rows, where absent
    root: jax.Array  # 2**log_root
    codes: jax.Array  # float; 0 where absent


def decode_second(
    codes: jax.Array,
    scale: jax.Array,
    row: jax.Array,
    valid: jax.Array,
    lat: Lattice,
    ops: Ops = Ops(),  # noqa: B008
) -> Second:
    """Second moment from codes uint32[..., 32, n], scales uint32[..., 1, n] and rows of a tile.

    Rows are float32[..., 32, 1]. ``valid`` is 1 for elements, 0 for padding: it has no energy.
    Elementwise.
    """
    dead = scale == 0
    base = BASE_LOWEST + (to_float(scale) - 1.0) * (1 / BASE_PER_OCTAVE)
    base, present, depth = ops.hold(
        (base, presence(scale, BASE_NOT_FINITE), row * (1 / ROW_PER_OCTAVE))
    )
    codes = jnp.where(dead, 0.0, to_float(codes))
    log_root = jnp.where(dead, 0.0, base) - depth - lat.delta * codes
    log_root = jnp.maximum(log_root, BASE_LOWEST)
    root = ops.hold(exp2(log_root))
    sigma = root * present * valid
    return Second(sigma * sigma, sigma, log_root, root, codes)


class SecondCode(NamedTuple):
    """An encoded second moment, with what the update and the first moment need."""

    codes: jax.Array  # float, whole
    scale: jax.Array  # uint32
    row: jax.Array  # [..., 32, 1] float, whole
    v_used: jax.Array  # v shrunk to what group and row predict: for the update
    inverse_root: jax.Array  # 1 / sigma as decoded from the new codes
    presence: jax.Array  # [..., 1, n]: 0, 1 or NaN
    error: jax.Array  # octaves that the decoded sigma is off the true one
    spread: jax.Array  # octaves of sigma from what group and row predict


def encode_second(
    v: jax.Array,
    old: Second,
    row: jax.Array,
    turn: jax.Array,
    valid: jax.Array,
    lat: Lattice,
    dither: jax.Array,
    coin: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
) -> SecondCode:
    """Move a group's lattice with its common growth, rows with what their elements do beyond that,
    and elements by their own drift.

    Args:
      v: new second moment float32[..., 32, n], zero where ``valid`` is.
      old: what ``v`` grew out of.
      row: rows that the old codes are relative to, float32[..., 32, 1].
      turn: the row whose codes are centred, 0..31, scalar.
      dither: uniform on [0, 1) per element. coin: the same per group.
    """
    hold = ops.hold
    drift, before = hold((drift_of(v, old.root), old.root * old.root * valid))
    energy, count = group_sum(v, ops), group_sum(valid, ops)
    growth = grown(energy, count, group_sum(before, ops), ops)

    own = drift - growth.octaves
    in_turn = jax.lax.broadcasted_iota(jnp.int32, (GROUP, 1), 0) == turn
    moved = _move_rows(old.codes, own, row, in_turn, valid, growth, lat, dither, ops)
    lowest = -group_max(jnp.where(valid[..., :1] > 0, -moved, -float(ROW_LAST)), ops)
    moved = jnp.clip(moved, lowest, lowest + ROW_LAST)
    moved, down = hold((moved, (moved - row) * (1 / ROW_PER_OCTAVE)))
    codes = hold(stepped(old.codes, own + down, lat, dither))
    highest = group_max(-codes, ops)
    row = moved - lowest
    highest, row, depth = hold((highest, row, row * (1 / ROW_PER_OCTAVE)))
    codes = jnp.minimum(codes + highest, last_code(growth, lat))

    relative = hold(exp2(-(depth + lat.delta * codes)))
    scale, rounded = base_of(energy, group_sum(relative * relative * valid, ops), growth, coin)

    share = group_sum(exp2(-2.0 * depth) * valid[..., :1], ops) / group_sum(valid[..., :1], ops)
    inverse, log_share = hold((exp2(-rounded), log_share_of(depth, share)))
    log_sigma = old.log_root + drift
    spread, v_used = shrunk(log_sigma, growth.log_mean, log_share, lat)
    return SecondCode(
        codes=codes,
        scale=scale,
        row=row,
        v_used=v_used,
        inverse_root=inverse / relative,
        presence=growth.presence,
        error=rounded - depth - lat.delta * codes - log_sigma,
        spread=spread,
    )


def encode_second_anew(
    v: jax.Array,
    valid: jax.Array,
    lat: Lattice,
    dither: jax.Array,
    coin: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
) -> SecondCode:
    """Codes, scales and rows of a second moment float32[..., 32, n] of which nothing is stored.

    Arguments as for `encode_second`. Groups keep their energy to the scale's rounding, elements
    their root on average, but for those beyond the window.
    """
    nothing = jnp.zeros(v.shape, jnp.uint32)
    row = jnp.zeros((*v.shape[:-1], 1), jnp.float32)
    old = decode_second(nothing, nothing[..., :1, :], row, valid, lat, ops)
    turn = jnp.int32(0)  # of any row, for codes of zero are centred
    return encode_second(v, old, row, turn, valid, lat, dither, coin, ops)


# --- the formulas of encode_second, in their order ---


class Growth(NamedTuple):
    """Of a group, from step to step."""

    octaves: jax.Array  # of its root
    log_mean: jax.Array  # log2 of its mean v
    presence: jax.Array  # 0, 1 or NaN
    finite: jax.Array
    dead: jax.Array


def grown(
    energy: jax.Array,
    count: jax.Array,
    before: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
) -> Growth:
    """A group from its energy, its number of elements and its energy before, that of its rows'
    shape where it was zero."""
    finite = energy < jnp.inf
    dead = energy < TINY
    present = jnp.where(finite, jnp.where(dead, 0.0, 1.0), jnp.nan)
    octaves = 0.5 * log2(jnp.maximum(energy, TINY) / jnp.maximum(before, TINY))
    log_mean = log2(jnp.clip(energy / count, TINY, 2.0**127))
    octaves, log_mean, present = ops.hold((octaves, log_mean, present))
    return Growth(octaves, log_mean, present, finite, dead)


def drift_of(v: jax.Array, root: jax.Array) -> jax.Array:
    """Octaves that an element's root moved."""
    return 0.5 * log2(jnp.maximum(v / (root * root), TINY))


def _move_rows(
    codes: jax.Array,
    own: jax.Array,
    row: jax.Array,
    in_turn: jax.Array,
    valid: jax.Array,
    growth: Growth,
    lat: Lattice,
    dither: jax.Array,
    ops: Ops,
) -> jax.Array:
    """Rows of each tile after a step."""

    def lane_sum(x):
        return jnp.sum(x, axis=-1, keepdims=True)

    weight = jnp.where(growth.presence == 1.0, valid, 0.0)
    factor, coded = ops.hold((jnp.where(weight > 0, factor_of(own), 0.0), weight * codes))
    living, coded = lane_sum(weight), lane_sum(coded)
    tile = group_sum(coded, ops), group_sum(living, ops)
    dither = dither[..., :1]
    move = row_step(lane_sum(factor), living, lat, dither)
    move += jnp.where(in_turn, centring_step(coded, living, *tile, lat, dither), 0.0)
    return row + jnp.where(living > 0, move, 0.0)


def factor_of(own: jax.Array) -> jax.Array:
    """By how much an element's v grew more than its group's, from octaves of the root."""
    return exp2(jnp.clip(2.0 * own, -126.0, 127.0))


def row_step(factors: jax.Array, living: jax.Array, lat: Lattice, dither: jax.Array) -> jax.Array:
    """Steps by which a row follows its elements, from the sum of factors over those that live.

    It follows the mean of v, not of its logarithm: a row that one zero pulled down would make the
    steps of all others too long. Without codes nobody else follows the elements, so it is rounded
    stochastically. With codes, which are rounded again when a row moves, it is rounded to the
    nearest: whole steps are taken, and the rest is left to the codes.
    """
    octaves = 0.5 * log2(jnp.maximum(factors / jnp.maximum(living, 1.0), TINY))
    move = jnp.floor(jnp.where(lat.last > 0, 0.5, dither) - octaves * ROW_PER_OCTAVE)
    return jnp.clip(move, -float(ROW_LAST), float(ROW_LAST))


def centring_step(
    codes: jax.Array,
    living: jax.Array,
    tile_codes: jax.Array,
    tile_living: jax.Array,
    lat: Lattice,
    dither: jax.Array,
) -> jax.Array:
    """Steps by which a row makes up part of the distance of its mean code from its tile's, from
    sums over its living elements and over the tile's: none without codes."""
    far = codes / jnp.maximum(living, 1.0) - tile_codes / jnp.maximum(tile_living, 1.0)
    move = _CENTRED_PART * lat.delta * far * ROW_PER_OCTAVE
    return jnp.floor(jnp.clip(move, -_CENTRED_MOST, _CENTRED_MOST) + dither)


def stepped(codes: jax.Array, own: jax.Array, lat: Lattice, dither: jax.Array) -> jax.Array:
    """Codes after a drift of ``own`` octaves against group and row, rounded stochastically."""
    return codes - jnp.floor(own * (1.0 / lat.delta) + dither)


def last_code(growth: Growth, lat: Lattice) -> jax.Array:
    """A group's largest code: a group of zeros has none, so that its planes are the same on every
    backend, padding included."""
    return jnp.where(growth.dead, 0.0, lat.last)


def base_of(
    energy: jax.Array, decoded: jax.Array, growth: Growth, coin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The scale that gives the decoded group the energy of the true one, uint32, and its octaves.

    ``decoded`` is the energy relative to the base.
    """
    base = 0.5 * log2(jnp.maximum(energy, TINY) / decoded)
    scale = jnp.floor((base - BASE_LOWEST) * BASE_PER_OCTAVE + 1.0 + coin)
    scale = jnp.clip(scale, 1, BASE_NOT_FINITE - 1)
    rounded = BASE_LOWEST + (scale - 1.0) * (1 / BASE_PER_OCTAVE)
    code = jnp.where(growth.finite, jnp.where(growth.dead, 0, to_code(scale)), BASE_NOT_FINITE)
    return code.astype(jnp.uint32), rounded


def log_share_of(depth: jax.Array, share: jax.Array) -> jax.Array:
    """log2 of a row's part of v, where ``share`` is the mean part of the tile's rows."""
    return -2.0 * depth - log2(share)


def shrunk(
    log_sigma: jax.Array, log_mean: jax.Array, log_share: jax.Array, lat: Lattice
) -> tuple[jax.Array, jax.Array]:
    """Octaves from the product of the group's mean and the row's share of it, and v pulled toward
    that product (James and Stein)."""
    spread = log_sigma - 0.5 * (log_mean + log_share)
    log_used = 2.0 * (log_sigma - lat.shrinkage * spread)
    return spread, exp2(jnp.clip(log_used, -126.0, 127.0))


def recode_second(
    codes: jax.Array,
    scale: jax.Array,
    row: jax.Array,
    valid: jax.Array,
    old: Lattice,
    new: Lattice,
    dither: jax.Array,
    coin: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales on another lattice, rounded stochastically: roots stay on average, the
    group's energy stays. Both uint32, like those given."""
    hold = ops.hold
    depth = hold(row * (1 / ROW_PER_OCTAVE))
    before = hold(exp2(-(depth + old.delta * to_float(codes))))
    new_codes = jnp.floor(to_float(codes) * (old.delta / new.delta) + dither)
    highest = group_max(jnp.where(valid > 0, -new_codes, -float(ROW_LAST)))
    new_codes = hold(jnp.clip(new_codes + hold(highest), 0.0, new.last))
    after = hold(exp2(-(depth + new.delta * new_codes)))
    growth = 0.5 * log2(group_sum(before * before * valid) / group_sum(after * after * valid))
    moved = to_float(scale) + jnp.floor(growth * BASE_PER_OCTAVE + coin)
    moved = to_code(jnp.clip(moved, 1, BASE_NOT_FINITE - 1))
    kept = (scale == 0) | (scale == BASE_NOT_FINITE)
    return to_code(new_codes), jnp.where(kept, scale, moved)
