"""Energy-preserving codecs for the moments of an optimizer, in groups of 32 elements.

What a group's moments do to the update is decided by its energy and by how that energy is split
among its elements. The energy is kept exactly (up to a fine scale), only the split is quantized.

Second moment, kept as sigma = sqrt(v), on a lattice in log2:

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

First moment, relative to the quantized root of the second, e = m / sigma_q, on uniform levels up to
the largest |e|: at four bits and more with an exact zero, at two and three bits on either side of
zero, which is kept on average. Its one-byte scale makes the decoded group as long as the true one:
the length never grows on average, so the loop is stable for every b1 < 1.

All functions work on float32 blocks [..., 32, n], the group along axis -2; values per group have
shape [..., 1, n]. Widths are traced scalars. Scale codes: 0 is a group of zeros, the top code a
group that is not finite (it decodes to NaN).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stquant_jax.numerics import TINY, exp2, log2, to_code, to_float
from stquant_jax.planes import GROUP

# Second moment: log2 sigma over the 128 octaves whose squares are float32 numbers, two bytes.
BASE_PER_OCTAVE = 512
BASE_LOWEST = -63.0
BASE_NOT_FINITE = 2**16 - 1

# First moment: log2 of the scale, one byte. Fine where training lives (the largest |e| of a
# group is near 1/2, and up to 1 / sqrt(1 - b2**t) more while nu is young), coarse where mu fades
# away under an old nu or outruns it.
MU_CENTER = 0.0
MU_FINE_PER_OCTAVE = 24
MU_COARSE_PER_OCTAVE = 5
MU_FINE_REACH = 3.5  # octaves either side of the center
MU_ZERO_CODE = 128  # the code of the center
MU_NOT_FINITE = 2**8 - 1

ROW_PER_OCTAVE = 32
ROW_LAST = 2**8 - 1
_ROW_MOST = 8.0  # steps a row may move at once
_ROW_GAIN = 0.25  # of a row's distance from its tile that it makes up at once

# Below the largest ratio of any group that is not zero; the reciprocal is a float32.
_LEAST_RATIO = 2.0**-70
# Outermost level over the largest |e|, by width: clipping the largest a little serves the others.
_REACH = (1.0, 1.0, 0.85, 1.0, 0.95, 1.0, 1.0, 1.0, 1.0)


Hold = Callable[[Any], Any]  # a pytree to the same pytree


class Lattice(NamedTuple):
    """Numbers of a second moment's slot."""

    delta: jax.Array  # octaves from code to code
    last: jax.Array  # largest code
    # How far an element's root is pulled to what its group and row predict in the update (never in
    # the store): best is lattice noise over lattice noise plus true spread (James and Stein).
    shrinkage: jax.Array


class Levels(NamedTuple):
    """Numbers of a first moment's slot: level of code c is ``(c + low + between) * unit``.

    Every width's levels are among the next one's, so that a slot can grow without losing anything.
    """

    low: jax.Array  # smallest code, signed
    high: jax.Array  # largest code, signed
    between: jax.Array  # 1/2 where levels straddle zero, else 0
    unit: jax.Array  # distance of levels, in scales
    gain: jax.Array  # codes from zero to what the largest |e| is mapped to


def lattice(width: jax.Array, window: jax.Array, shrinkage: jax.Array) -> Lattice:
    """The lattice of a slot from its width (0..8), window (octaves) and shrinkage (0..1), traced
    scalars."""
    size = to_float(jnp.uint32(1) << width.astype(jnp.uint32))
    return Lattice(window / size, size - 1.0, shrinkage)


def levels(width: jax.Array) -> Levels:
    """The levels of a slot from its width (2..8), a traced integer."""
    half = to_float(jnp.uint32(1) << (width.astype(jnp.uint32) - 1))
    straddle = width < 4
    return Levels(
        low=jnp.where(straddle, -half, 1.0 - half),
        high=half - 1.0,
        between=jnp.where(straddle, 0.5, 0.0),
        unit=jnp.where(straddle, 0.25, 1.0 / half),
        # cells, not levels, fill the range where levels straddle zero
        gain=jnp.where(straddle, half, half - 1.0) / jnp.asarray(_REACH, jnp.float32)[width],
    )


def _keep(x: Any) -> Any:
    """The default of ``hold``: a backend may pass a function that keeps values in memory, where its
    compiler would rather compute them again for every use, those of a group for every element."""
    return x


def _by_halves(combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Reduce the group axis by halves: in a fixed order, the same bits everywhere."""
    while (n := x.shape[-2]) > 1:
        x = combine(x[..., : n // 2, :], x[..., n // 2 :, :])
    return x


def group_sum(x: jax.Array) -> jax.Array:
    return _by_halves(jnp.add, x)


def group_max(x: jax.Array) -> jax.Array:
    return _by_halves(jnp.maximum, x)


def _presence(scale: jax.Array, not_finite: int) -> jax.Array:
    """0 for a group of zeros, NaN for one that is not finite, else 1: a factor of its values."""
    return jnp.where(scale == 0, 0.0, jnp.where(scale == not_finite, jnp.nan, 1.0))


class Second(NamedTuple):
    """A decoded second moment, with what encoding its successor needs."""

    v: jax.Array  # [..., 32, n], zero where absent
    sigma: jax.Array  # its root
    log_root: jax.Array  # log2 of its root; 0 where absent
    root: jax.Array  # 2**log_root
    codes: jax.Array  # float; 0 where absent
    dead: jax.Array  # [..., 1, n] bool


def decode_second(
    codes: jax.Array,
    scale: jax.Array,
    row: jax.Array,
    valid: jax.Array,
    lat: Lattice,
    hold: Hold = _keep,
) -> Second:
    """Second moment from codes uint32[..., 32, n], scales uint32[..., 1, n] and rows of a tile.

    Rows are float32[..., 32, 1]. ``valid`` is 1 for elements, 0 for padding: it has no energy.
    """
    dead = scale == 0
    base = BASE_LOWEST + (to_float(scale) - 1.0) * (1 / BASE_PER_OCTAVE)
    base, presence, row = hold(
        (base, _presence(scale, BASE_NOT_FINITE), row * (1 / ROW_PER_OCTAVE))
    )
    log_root = jnp.where(
        dead, 0.0, jnp.maximum(base - row - lat.delta * to_float(codes), BASE_LOWEST)
    )
    root = hold(exp2(log_root))
    sigma = root * presence * valid
    return Second(sigma * sigma, sigma, log_root, root, jnp.where(dead, 0.0, to_float(codes)), dead)


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
    hold: Hold = _keep,
) -> SecondCode:
    """Move a group's lattice with its common growth and its elements by their own drift.

    Args:
      v: new second moment float32[..., 32, n], zero where ``valid`` is.
      old: what ``v`` grew out of.
      row: rows that the old codes are relative to, float32[..., 32, 1].
      turn: the row whose turn it is to move, 0..31, scalar.
      dither: uniform on [0, 1) per element. coin: the same per group.
    """
    energy = group_sum(v)
    finite = energy < jnp.inf
    dead = energy < TINY
    presence = jnp.where(finite, jnp.where(dead, 0.0, 1.0), jnp.nan)

    # A group that was absent starts from its own mean: every element at the base, no common growth.
    count = group_sum(valid)
    before = jnp.where(old.dead, count, group_sum(old.v))
    growth = 0.5 * log2(jnp.maximum(energy, TINY) / jnp.maximum(before, TINY))
    log_mean = log2(jnp.clip(energy / count, TINY, 2.0**127))
    growth, log_mean, presence = hold((growth, log_mean, presence))
    drift = hold(0.5 * log2(jnp.maximum(v / (old.root * old.root), TINY)))
    moved = _move_row(
        old, drift - growth, row, turn, jnp.where(presence == 1.0, valid, 0.0), lat, dither
    )
    lowest = -group_max(jnp.where(valid[..., :1] > 0, -moved, -float(ROW_LAST)))
    moved = jnp.clip(moved, lowest, lowest + ROW_LAST)
    moved, lifted = hold((moved, (moved - row) * (1 / ROW_PER_OCTAVE)))
    down = jnp.where(old.dead, moved * (1 / ROW_PER_OCTAVE), lifted)
    codes = hold(old.codes - jnp.floor((drift - growth + down) * (1.0 / lat.delta) + dither))
    highest = group_max(-codes)
    row = moved - lowest
    highest, row, depth = hold((highest, row, row * (1 / ROW_PER_OCTAVE)))
    codes = jnp.minimum(codes + highest, lat.last)

    # The base that gives the decoded group the energy of the true one.
    relative = hold(exp2(-(depth + lat.delta * codes)))
    decoded = group_sum(relative * relative * valid)
    base = 0.5 * log2(jnp.maximum(energy, TINY) / decoded)
    scale = jnp.floor((base - BASE_LOWEST) * BASE_PER_OCTAVE + 1.0 + coin)
    scale = jnp.clip(scale, 1, BASE_NOT_FINITE - 1)
    rounded = BASE_LOWEST + (scale - 1.0) * (1 / BASE_PER_OCTAVE)
    code = jnp.where(finite, jnp.where(dead, 0, to_code(scale)), BASE_NOT_FINITE)

    # James-Stein: pull to the product of the group's mean and the row's share of it.
    share = group_sum(exp2(-2.0 * depth) * valid[..., :1]) / group_sum(valid[..., :1])
    log_share = -2.0 * depth - log2(share)
    inverse, log_share = hold((exp2(-rounded), log_share))
    log_sigma = old.log_root + drift
    spread = log_sigma - 0.5 * (log_mean + log_share)
    log_used = 2.0 * (log_sigma - lat.shrinkage * spread)
    return SecondCode(
        codes=codes,
        scale=code.astype(jnp.uint32),
        row=row,
        v_used=exp2(jnp.clip(log_used, -126.0, 127.0)),
        inverse_root=inverse / relative,
        presence=presence,
        error=rounded - depth - lat.delta * codes - log_sigma,
        spread=spread,
    )


def recode_second(
    codes: jax.Array,
    scale: jax.Array,
    row: jax.Array,
    valid: jax.Array,
    old: Lattice,
    new: Lattice,
    dither: jax.Array,
    coin: jax.Array,
    hold: Hold = _keep,
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales on another lattice, rounded stochastically: roots stay on average, the
    group's energy stays. Both uint32, like those given."""
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


def _move_row(
    old: Second,
    own: jax.Array,
    row: jax.Array,
    turn: jax.Array,
    weight: jax.Array,
    lat: Lattice,
    dither: jax.Array,
) -> jax.Array:
    """Let one row of each tile follow its elements; in 32 steps every row has its turn.

    With codes, the row makes up part of the distance of its mean code from its tile's. Without, it
    takes the drift of its elements, on average and 32 times over.
    """

    def one(x):
        return jax.lax.dynamic_slice_in_dim(jnp.broadcast_to(x, own.shape), turn, 1, axis=-2)

    def lane_sum(x):
        return jnp.sum(x, axis=-1, keepdims=True)

    living = lane_sum(one(weight))
    here = jnp.maximum(living, 1.0)
    far = lane_sum(one(weight * old.codes)) / here
    far -= lane_sum(group_sum(weight * old.codes)) / jnp.maximum(lane_sum(group_sum(weight)), 1.0)
    drift = lane_sum(one(jnp.where(weight > 0, own, 0.0))) / here
    move = jnp.where(lat.last > 0, _ROW_GAIN * lat.delta * far, -GROUP * drift) * ROW_PER_OCTAVE
    move = jnp.floor(jnp.clip(move, -_ROW_MOST, _ROW_MOST) + one(dither)[..., :1])
    its_turn = (jnp.arange(GROUP)[:, None] == turn) & (living > 0)
    return row + jnp.where(its_turn, move, 0.0)


def decode_first(
    codes: jax.Array, scale: jax.Array, sigma: jax.Array, lev: Levels, hold: Hold = _keep
) -> jax.Array:
    """First moment from codes uint32[..., 32, n], scales uint32[..., 1, n] and the other's root."""
    step = hold(_first_scale(scale) * _presence(scale, MU_NOT_FINITE) * lev.unit)
    return (to_float(codes) + (lev.low + lev.between)) * (sigma * step)


def _first_scale(scale: jax.Array) -> jax.Array:
    """What a scale code of the first moment stands for, were it neither zero nor not finite."""
    n = to_float(scale) - MU_ZERO_CODE
    fine = MU_FINE_REACH * MU_FINE_PER_OCTAVE
    octaves = jnp.minimum(jnp.abs(n), fine) / MU_FINE_PER_OCTAVE
    octaves += jnp.maximum(jnp.abs(n) - fine, 0.0) / MU_COARSE_PER_OCTAVE
    return exp2(MU_CENTER + jnp.sign(n) * octaves)


class FirstCode(NamedTuple):
    """An encoded first moment, relative to the root of the second."""

    codes: jax.Array  # float32[..., 32, n], whole and >= 0
    scale: jax.Array  # uint32[..., 1, n]
    error: jax.Array  # decoded less true, where the group is present


def encode_first(
    e: jax.Array,
    valid: jax.Array,
    presence: jax.Array,
    lev: Levels,
    dither: jax.Array,
    coin: jax.Array,
    hold: Hold = _keep,
) -> FirstCode:
    """Codes and scales of a first moment relative to the quantized root of the second."""
    largest = group_max(jnp.abs(e))
    z = e * hold(lev.gain / jnp.maximum(largest, _LEAST_RATIO))
    # Between the two levels next to zero the choice is random, so that zero stays zero on average:
    # a parameter without gradient in a living group must not drift.
    jitter = jnp.where(jnp.abs(z) < 0.5, dither - 0.5, 0.0)
    q = hold(jnp.clip(jnp.floor(z + jnp.where(lev.between > 0, jitter, 0.5)), lev.low, lev.high))
    level = (q + lev.between) * lev.unit
    length = group_sum(e * e)
    decoded = group_sum(level * level * valid)
    log_scale = 0.5 * log2(jnp.maximum(length, TINY) / jnp.maximum(decoded, TINY))
    scale = jnp.where(length < TINY, 0.0, _round_first_scale(log_scale, coin))
    code = jnp.where(presence == 1.0, to_code(scale), jnp.where(presence == 0.0, 0, MU_NOT_FINITE))
    code = code.astype(jnp.uint32)
    decoded_scale = _first_scale(code) * _presence(code, MU_NOT_FINITE)
    return FirstCode(q - lev.low, code, level * decoded_scale - e)


def _round_first_scale(log_scale: jax.Array, coin: jax.Array) -> jax.Array:
    """Stochastic rounding of a first moment's scale, unbiased in its square: the length is kept."""
    away = jnp.abs(log_scale - MU_CENTER)
    fine = MU_FINE_REACH * MU_FINE_PER_OCTAVE
    n = jnp.minimum(away * MU_FINE_PER_OCTAVE, fine + (away - MU_FINE_REACH) * MU_COARSE_PER_OCTAVE)
    n = jnp.where(log_scale < MU_CENTER, -n, n)
    below = jnp.floor(n)
    # From the step below (4**0) to the step above (4**h), 4**(h f) is reached with this
    # probability.
    edge = jnp.where(below < 0, below + 1.0, below)  # the step's end nearer to the center
    twice = jnp.where(jnp.abs(edge) < fine, 2 / MU_FINE_PER_OCTAVE, 2 / MU_COARSE_PER_OCTAVE)
    chance = (exp2(twice * (n - below)) - 1.0) / (exp2(twice) - 1.0)
    code = below + MU_ZERO_CODE + jnp.where(coin < chance, 1.0, 0.0)
    return jnp.clip(code, 0, MU_NOT_FINITE - 1)


def recode_first(
    codes: jax.Array,
    scale: jax.Array,
    valid: jax.Array,
    old: Levels,
    new: Levels,
    dither: jax.Array,
    coin: jax.Array,
    hold: Hold = _keep,
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales at another width, the group's length kept. Both uint32, like those given."""
    step = hold(_first_scale(scale) * old.unit)
    e = hold((to_float(codes) + (old.low + old.between)) * step * valid)
    code = encode_first(e, valid, _presence(scale, MU_NOT_FINITE), new, dither, coin, hold)
    return to_code(code.codes), code.scale
