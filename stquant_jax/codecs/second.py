"""Second moment, kept as sigma = sqrt(v), on a lattice in log2:

    log2 sigma_ij = base_j - row_i / 32 - delta * n_ij,    n_ij in 0..2**width - 1,    delta =
    window / 2**width octaves

for element i of group j. ``base`` is the group's two-byte scale; ``row`` is a byte that the 128
groups of a tile share, since elements at one place of neighbouring groups (one input feature, say)
are large or small together. It leaves a narrow window to the codes, and at width 0, where there are
none, it is what tells a group's elements apart: v is then the product of two factors, and all that
is needed of its elements are sums. With b2 = 0.999 an element drifts by a thousandth
of an octave a step. Rounded to the nearest it would never move, and rounded at random off the
lattice it would be a random walk; here stored values stay on a lattice that moves with the group's
common growth, and an element takes a step with the small probability that its own drift asks for.
The error is proportional to delta.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stquant_jax.codecs.lattices import (
    BASE_NOT_FINITE,
    BASE_PER_OCTAVE,
    ROW_LAST,
    Lattice,
    base_of,
    centring_step,
    decoded_base,
    grown,
    last_code,
    part_of,
    pull,
    root_of,
    root_of_row,
    row_step,
    settled,
    stepped,
)
from stquant_jax.codecs.ops import Ops, group_max, group_min, group_sum, take_row
from stquant_jax.storage.numerics import TINY, exp2, log2, to_code, to_float
from stquant_jax.storage.planes import GROUP


class Second(NamedTuple):
    """A decoded second moment, with what encoding its successor needs.

    A group of zeros has the shape that its rows tell: that is what it grows out of.
    """

    v: jax.Array  # [..., 32, n], zero where absent
    root: jax.Array  # over the group's base; zero in padding alone
    base: jax.Array  # [..., 1, n], zero where absent, NaN where not finite
    shape: jax.Array  # root squared
    codes: Any  # float; None where there are none


def decode_second(
    codes: jax.Array | None,
    scale: jax.Array,
    row: jax.Array,
    valid: jax.Array,
    lat: Lattice,
    ops: Ops = Ops(),  # noqa: B008
) -> Second:
    """Second moment from codes uint32[..., 32, n], scales uint32[..., 1, n] and rows of a tile.

    Rows are float32[..., 32, 1]. ``valid`` is 1 for elements, 0 for padding: it has no energy. At
    width 0 codes may be None, which saves all that is done with them. Elementwise.
    """
    base, root = ops.hold((decoded_base(scale), root_of_row(row)))
    return decoded_second(codes, base, root, valid, lat, ops)


def decoded_second(
    codes: jax.Array | None,
    base: jax.Array,
    root: jax.Array,
    valid: jax.Array,
    lat: Lattice,
    ops: Ops = Ops(),  # noqa: B008
) -> Second:
    """The same from a group's base and the roots that its rows stand for."""
    if codes is not None:
        root = root_of(codes, lat) * root
        codes = to_float(codes)
    root = ops.hold(root * valid)
    shape = root * root
    return Second(shape * (base * base), root, base, shape, codes)


class SecondCode(NamedTuple):
    """An encoded second moment, with what the update and the first moment need."""

    codes: Any  # uint32; None where there are none
    scale: jax.Array  # uint32
    row: jax.Array  # [..., 32, 1] float, whole
    v_used: jax.Array  # v shrunk to what group and row predict: for the update
    inverse_root: jax.Array  # 1 / sigma as decoded from the new codes
    presence: jax.Array  # [..., 1, n]: 0, 1 or NaN
    mean: jax.Array  # [..., 1, n]: what its group predicts of v; NaN if it is not finite
    share: jax.Array  # [..., 32, 1]: and its row, a factor


def encode_second(
    v: jax.Array,
    old: Second,
    row: jax.Array,
    round_row: jax.Array,
    valid: jax.Array,
    lat: Lattice,
    dither: jax.Array,
    coin: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
) -> SecondCode:
    """Move a group's base with its energy, rows with what their elements do beyond that, and
    elements by their own drift.

    Args:
      v: new second moment float32[..., 32, n], zero where ``valid`` is.
      old: what ``v`` grew out of.
      row: rows that the old codes are relative to, float32[..., 32, 1].
      round_row: the row whose codes are centred, 0..31, scalar.
      dither: uniform on [0, 1) per element, or per row where there are no codes. coin: the same
        per group.
    """
    hold = ops.hold
    energy, count = group_sum(v, ops), group_sum(valid, ops)
    growth = grown(energy, count, group_sum(old.shape, ops), ops)
    # Where lattices are by tile, some have no codes: zeros are there in their place.
    by_tile = lat.last.ndim > 0
    coded = old.codes is not None and (lat.last > 0 if by_tile else True)
    now = hold(part_of(v, growth))
    before: Any = None
    if old.shape.shape[-1] == 1:  # no codes, no padding: elements of a row were alike
        lanes = old.shape * over_lanes(growth.before)
    else:
        before = hold(old.shape * growth.before)
        lanes = over_lanes(before)
    of_row = dither[..., :1]
    moved = row + row_step(over_lanes(now), lanes, of_row, coded)
    if old.codes is not None:
        step = _centring(old.codes, valid, count, growth.presence, round_row, lat, of_row, ops)
        moved += jnp.where(coded, step, 0.0) if by_tile else step
    first = valid[..., :1]  # of the tile's groups; where tiles only align it has no elements
    size = jnp.maximum(group_sum(first, ops), 1.0)
    most, total = partial(group_max, ops=ops), partial(group_sum, ops=ops)
    rows = settled(row, moved, first > 0, size, most, total, lat, ops)

    root, codes = rows.root, None
    if old.codes is not None:
        codes = hold(stepped(old.codes, now, before, rows.down, lat, dither))
        codes = jnp.minimum(codes - hold(group_min(codes, ops)), last_code(growth, lat))
        codes = hold(to_code(codes))
        root = hold(root_of(codes, lat) * root)
    scale, rounded = base_of(energy, group_sum(root * root * valid, ops), growth, coin)
    inverse_base = hold(exp2(-rounded))
    inverse_root = inverse_base * rows.inverse
    if codes is not None:
        by_codes = inverse_base / root
        inverse_root = jnp.where(coded, by_codes, inverse_root) if by_tile else by_codes
    on_v, on_share = pull(growth.mean, lat)
    return SecondCode(
        codes=codes,
        scale=scale,
        row=rows.row,
        v_used=on_v * v + on_share * rows.share,
        inverse_root=inverse_root,
        presence=growth.presence,
        mean=growth.mean,
        share=rows.share,
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
    round_row = jnp.int32(0)  # of any row, for codes of zero are centred
    return encode_second(v, old, row, round_row, valid, lat, dither, coin, ops)


def _centring(
    codes: jax.Array,
    valid: jax.Array,
    count: jax.Array,
    present: jax.Array,
    round_row: jax.Array,
    lat: Lattice,
    dither: jax.Array,
    ops: Ops,
) -> jax.Array:
    """Steps of each row, [..., 32, 1]: none but the round-robin row makes one."""
    alive = jnp.where(present == 1.0, jnp.float32(1), jnp.float32(0))
    tile = over_lanes(alive * group_sum(codes * valid, ops)), over_lanes(alive * count)
    living = alive * take_row(valid, round_row)
    here = over_lanes(living * take_row(codes, round_row)), over_lanes(living)
    step = centring_step(*here, *tile, lat, dither)
    centred = jax.lax.broadcasted_iota(jnp.int32, (GROUP, 1), 0) == round_row
    return jnp.where(centred, step, 0.0)


def over_lanes(x: jax.Array) -> jax.Array:
    """[..., n] -> [..., 1]"""
    return jnp.sum(x, axis=-1, keepdims=True)


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
    root = hold(root_of_row(row))
    before = hold(root_of(codes, old) * root)
    new_codes = jnp.floor(to_float(codes) * (old.delta / new.delta) + dither)
    highest = group_max(jnp.where(valid > 0, -new_codes, -float(ROW_LAST)))
    new_codes = hold(jnp.clip(new_codes + hold(highest), 0.0, new.last))
    after = hold(root_of(to_code(new_codes), new) * root)
    energies = (group_sum(x * x * valid) for x in (before, after))
    old_energy, new_energy = (jnp.maximum(x, TINY) for x in energies)  # groups of padding have none
    growth = 0.5 * log2(old_energy / new_energy)
    moved = to_float(scale) + jnp.floor(growth * BASE_PER_OCTAVE + coin)
    moved = to_code(jnp.clip(moved, 1, BASE_NOT_FINITE - 1))
    kept = (scale == 0) | (scale == BASE_NOT_FINITE)
    return to_code(new_codes), jnp.where(kept, scale, moved)
