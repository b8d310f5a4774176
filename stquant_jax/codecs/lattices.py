"""The lattice of the second moment, and the formulas of `encode_second` on it, in their order:
elementwise, or of a group or a row from its sums."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stquant_jax.codecs.ops import Ops, presence
from stquant_jax.storage.numerics import (
    EXP2_FIXED_ONE,
    TINY,
    Arithmetic,
    exp2,
    exp2_of_fixed,
    log2,
    log2_of_ratio,
    or_nan,
    to_code,
    to_float,
)

# log2 sigma over the 128 octaves whose squares are float32 numbers, two bytes.
BASE_PER_OCTAVE = 512
BASE_LOWEST = -63.0
BASE_NOT_FINITE = 2**16 - 1
# A prediction that would be flushed to zero pulls nothing.
_LEAST_PULL = 2.0**-120
# A group of more energy is not finite: twice the reciprocal of what is less is a normal number.
MOST_ENERGY = 2.0**127

ROW_PER_OCTAVE = 32
ROW_LAST = 2**8 - 1
_CENTRED_MOST = 8.0  # steps that a row's codes may be centred by at once
_CENTRED_PART = 0.25  # of their distance from the tile's that is made up at once
# Predictions keep a group's energy, and the root of a mean is more than the mean of roots: steps by
# predictions alone are 2 to 5% short on the streams of benchmarks/codec/gain.py. This part of v
# makes up for it.
_SHORT = 0.05
# In the first step there is nothing but an element's own gradient. The pull grows faster than the
# memory of nu fills, what makes up for its shortness faster still: rows are still to be found.
_YOUNG, _SHORTLY = 10.0, 100.0


class Lattice(NamedTuple):
    """Numbers of a second moment's slot."""

    delta: jax.Array  # octaves from code to code
    last: jax.Array  # largest code
    # How far v is pulled to what its group and row predict in the update (never in the store): best
    # is lattice noise over lattice noise plus true spread (James and Stein).
    shrinkage: jax.Array
    length: jax.Array  # factor of v in the update, by which predictions are not too short


def lattice(
    width: jax.Array,
    window: jax.Array,
    shrinkage: jax.Array,
    left: jax.Array | float = 0.0,
) -> Lattice:
    """The lattice of a slot, traced scalars.

    Args:
      width: 0..8. window: whole octaves. shrinkage: 0..1, once nu is old.
      left: b2**(t - 1), what is left of the first step's weight.
    """
    size = to_float(jnp.uint32(1) << width.astype(jnp.uint32))
    pull, length = shrinkage * (1.0 - left**_YOUNG), shrinkage * (1.0 - left**_SHORTLY)
    octaves = jnp.maximum(window, 1).astype(jnp.float32)  # none where there are no codes
    return Lattice(octaves / size, size - 1.0, pull, 1.0 - _SHORT * length)


# --- the formulas ---


def decoded_base(scale: jax.Array) -> jax.Array:
    """What a scale code stands for: 0 for a group of zeros, NaN for one that is not finite."""
    octaves = BASE_LOWEST + (to_float(scale) - 1.0) * (1 / BASE_PER_OCTAVE)
    return exp2(octaves) * presence(scale, BASE_NOT_FINITE)


def root_of_row(row: jax.Array) -> jax.Array:
    return exp2(row * (-1 / ROW_PER_OCTAVE))


def root_of(codes: jax.Array, lat: Lattice) -> jax.Array:
    """The root of codes, uint32, over that of code 0."""
    step = (lat.delta * EXP2_FIXED_ONE).astype(jnp.int32)
    return exp2_of_fixed(lax.bitcast_convert_type(codes, jnp.int32) * step)


class Growth(NamedTuple):
    """Of a group, from step to step."""

    now: jax.Array  # what v is divided by, to compare groups: two over the energy, or 0
    before: jax.Array  # the same for what it grew out of
    mean: jax.Array  # of v
    presence: jax.Array  # 0, 1 or NaN
    finite: jax.Array
    dead: jax.Array


def grown(
    energy: jax.Array,
    count: jax.Array,
    before: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
) -> Growth:
    """A group from its energy, its number of elements and the energy before, over its base: a group
    of zeros grows out of the shape that its rows tell."""
    finite = energy < MOST_ENERGY
    dead = energy < TINY
    alive = jnp.where(dead, jnp.float32(0), jnp.float32(1))
    living = jnp.where(finite, alive, 0.0)
    sound = jnp.where(living > 0, energy, 1.0)
    now = living * (2.0 / sound)
    then = living * (2.0 / jnp.maximum(before, TINY))
    mean = energy / jnp.maximum(count, 1.0)
    now, then, mean, present = ops.hold((now, then, or_nan(mean, finite), or_nan(alive, finite)))
    return Growth(now, then, mean, present, finite, dead)


def part_of(v: jax.Array, growth: Growth) -> jax.Array:
    """An element's part of its group's energy, doubled; 0 in groups that count for nothing."""
    return jnp.where(growth.now > 0, v * growth.now, 0.0)


def row_step(
    now: jax.Array, before: jax.Array, dither: jax.Array, coded: bool | jax.Array = True
) -> jax.Array:
    """Steps by which a row follows its elements, from the sums of their parts over the lanes.

    As in iterative proportional fitting, of which it is a step: a row's elements together grow as
    much as their row. Without codes nobody else follows the elements, so it is rounded
    stochastically. With codes, which are rounded again when a row moves, it is rounded to the
    nearest: whole steps are taken, and the rest is left to the codes.
    """
    here = before > 0
    ratio = jnp.maximum(now, TINY) / jnp.where(here, before, 1.0)
    octaves = 0.5 * log2(jnp.clip(ratio, TINY, 2.0**126))
    rounding = (
        (0.5 if coded else dither) if isinstance(coded, bool) else jnp.where(coded, 0.5, dither)
    )
    move = jnp.floor(rounding - octaves * ROW_PER_OCTAVE)
    return jnp.where(here, jnp.clip(move, -float(ROW_LAST), float(ROW_LAST)), 0.0)


def centring_step(
    codes: jax.Array,
    living: jax.Array,
    tile_codes: jax.Array,
    tile_living: jax.Array,
    lat: Lattice,
    dither: jax.Array,
) -> jax.Array:
    """Steps by which a row makes up part of the distance of its mean code from its tile's, from
    sums over its living elements and over the tile's."""
    far = codes / jnp.maximum(living, 1.0) - tile_codes / jnp.maximum(tile_living, 1.0)
    move = _CENTRED_PART * lat.delta * far * ROW_PER_OCTAVE
    move = jnp.floor(jnp.clip(move, -_CENTRED_MOST, _CENTRED_MOST) + dither)
    return jnp.where(living > 0, move, 0.0)


class Rows(NamedTuple):
    """A tile's rows after a step, each number of every row."""

    down: jax.Array  # codes that it moved
    row: jax.Array
    root: jax.Array
    inverse: jax.Array  # of its root
    share: jax.Array  # of what its group's mean predicts of v
    energy: jax.Array  # sum of all roots squared, of the tile


def settled(
    row: jax.Array,
    moved: jax.Array,
    known: jax.Array,
    size: jax.Array,
    most: Callable[[jax.Array], jax.Array],
    total: Callable[[jax.Array], jax.Array],
    lat: Lattice,
    ops: Ops = Ops(),  # noqa: B008
) -> Rows:
    """Rows that have ``moved``, counted from the tile's lowest, at most ROW_LAST above it.

    Args:
      known: the rows that there are; size: how many, 1 at least.
      most, total: reduce over the tile's rows.
    """
    lowest = -most(jnp.where(known, -moved, -float(ROW_LAST)))
    moved = jnp.clip(moved, lowest, lowest + ROW_LAST)
    down = (moved - row) * (1 / (ROW_PER_OCTAVE * lat.delta))
    row = moved - lowest
    down, row, root, inverse = ops.hold((down, row, root_of_row(row), root_of_row(-row)))
    energy = total(jnp.where(known, root * root, 0.0))
    share = ops.hold(root * root / jnp.maximum(energy / size, TINY))
    return Rows(down, row, root, inverse, share, energy)


def stepped(
    codes: jax.Array,
    now: jax.Array,
    before: jax.Array,
    down: jax.Array,
    lat: Lattice,
    dither: jax.Array,
    arithmetic: Arithmetic = Arithmetic(),  # noqa: B008
) -> jax.Array:
    """Codes after a drift against group and row, rounded stochastically.

    Args:
      now, before: the element's part of the group's energy.
      down: codes that its row moved.
    """
    drift = log2_of_ratio(arithmetic.divide(now, jnp.maximum(before, TINY)))
    return codes - jnp.floor(drift * (0.5 / lat.delta) + (down + dither))


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


def pull(mean: jax.Array, lat: Lattice) -> tuple[jax.Array, jax.Array]:
    """Factors of v and of its row's share, whose sum is used in the update: v pulled toward the
    product of its group's mean and its row's share of it (James and Stein)."""
    part = jnp.where(lat.shrinkage * mean < _LEAST_PULL, 0.0, lat.shrinkage)
    return lat.length * (1.0 - part), lat.length * part * mean


def pull_of_part(
    growth: Growth, energy: jax.Array, lat: Lattice
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v over its `part_of`, and `pull` where the part stands for v."""
    half = jnp.where(growth.now > 0, 0.5 * energy, 0.0)
    on_v, on_share = pull(growth.mean, lat)
    return half, on_v * half, on_share
