"""Statistics of many steps, added exactly: the same bits in any order, on any number of devices.

Floating-point sums depend on their order, and with it on how tiles are spread over devices. So each
tile's value is taken as a whole number of units of 2**-80, and these are added as integers of eight
digits, base 2**16. Every step adds to the digits where its tiles are; devices compare theirs only
when the sums are asked for.

In 32 bits a digit has room to spare: 65535 of them add up, and a carry on top, before one has to
carry.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax.precision.statistics import Sums

DIGITS = 8
BITS = 16  # of a digit
UNIT = -80  # exponent of the lowest
MOST = 2.0**24  # that a tile adds to a sum
_TOP = 2**BITS - 1
_ADDENDS = 2**BITS - 1  # tiles between two carries
_BLOCK = 32  # tiles that are added up regardless of leaves

# Of a float32 as an integer.
_INFINITE = 0x7F800000
_LARGEST = 0x4B800000  # 2**24
_IMPLIED = 1 << 23
_BIAS = 127 + 23


class Tally(NamedTuple):
    """Sums over tiles and steps.

    Attributes:
      digits: uint16[devices, statistics, leaves, 8], lowest first: what each device has added. 1
        where all tiles are on one.
      steps: int32[], steps in it.
      decays: float32[2], of mu and nu at the last step.
    """

    digits: jax.Array
    steps: jax.Array
    decays: jax.Array


def nothing_tallied(leaves: int) -> Tally:
    """Where there are no leaves all of it is empty, so that it takes no byte."""
    return Tally(
        jnp.zeros((1, len(Sums._fields), leaves, DIGITS), jnp.uint16),
        jnp.zeros(() if leaves else 0, jnp.int32),
        jnp.zeros((2 if leaves else 0,), jnp.float32),
    )


def add(tally: Tally, new: jax.Array, decays: tuple, counted: jax.Array | None = None) -> Tally:
    """One step more, of the tiles that are here.

    Args:
      tally: of this device, uint16[1, statistics, leaves, 8].
      new: uint32[8, statistics, leaves], digits of each leaf's sums.
      decays: of mu and nu.
      counted: bool[leaves], False where another device adds the same tiles; None where none does.
    """
    if counted is not None:
        new = jnp.where(counted, new, jnp.uint32(0))
    old = jnp.moveaxis(tally.digits[0], -1, 0).astype(jnp.uint32)
    digits = jnp.moveaxis(_carried(old + new), 0, -1)[None]
    return Tally(digits.astype(jnp.uint16), tally.steps + 1, jnp.stack(decays).astype(jnp.float32))


def total(tally: Tally, axes: tuple[str, ...] = ()) -> Sums:
    """float32[leaves] of each statistic: the mean over the steps, of all devices' tiles.

    Args:
      axes: of the mesh, where the leading axis of ``digits`` is spread over devices and this is
        called on each of them.
    """
    digits = jnp.sum(tally.digits, axis=0, dtype=jnp.uint32)
    if axes:
        digits = lax.psum(digits, axes)
    digits = _carried(jnp.moveaxis(digits, -1, 0)).astype(jnp.int32)
    value = jnp.zeros(digits.shape[1:], jnp.float32)
    for k in reversed(range(DIGITS)):  # the product is exact, fused into the sum or not
        value += digits[k].astype(jnp.float32) * 2.0 ** (UNIT + BITS * k)
    return Sums(*value / jnp.maximum(tally.steps, 1).astype(jnp.float32))


def cleared(tally: Tally) -> Tally:
    return tally._replace(digits=jnp.zeros_like(tally.digits), steps=jnp.zeros_like(tally.steps))


def gathered(tally: Tally) -> Tally:
    """All devices' digits in one, uint16[1, statistics, leaves, 8]."""
    digits = jnp.moveaxis(jnp.sum(tally.digits, axis=0, dtype=jnp.uint32), -1, 0)
    digits = jnp.moveaxis(_carried(digits), 0, -1)[None]
    return tally._replace(digits=digits.astype(jnp.uint16))


def scattered(tally: Tally, axes: tuple[str, ...]) -> Tally:
    """`gathered` undone: the first device has it all; called on each of them."""
    first = jnp.array(True)
    for name in axes:
        first &= lax.axis_index(name) == 0
    return tally._replace(digits=jnp.where(first, tally.digits, jnp.uint16(0)))


def no_sums(leaves: int) -> jax.Array:
    """Digits of sums to which nothing was added, uint32[8, statistics, leaves]."""
    return jnp.zeros((DIGITS, len(Sums._fields), leaves), jnp.uint32)


def joined(digits: jax.Array, sums: jax.Array) -> jax.Array:
    """The digits of a leaf, uint32[8, statistics], with the sums of some more of its tiles, at most
    2**15 of them, float32[statistics, tiles]."""
    return _carried(digits + jnp.sum(_digits(sums), axis=-1, dtype=jnp.uint32))


def by_leaf(x: jax.Array, tiles: tuple[int, ...]) -> jax.Array:
    """Digits of each leaf's sums, uint32[8, statistics, leaves], all below 2**16.

    Args:
      x: float32[statistics, tiles], at least 0. What is below 2**-80 is dropped, what is above
        2**24 counts as that, NaN as 0.
      tiles: how many of them each leaf has, in their order.
    """
    pieces = [
        (leaf, min(_ADDENDS, n - start))
        for leaf, n in enumerate(tiles)
        for start in range(0, max(n, 1), _ADDENDS)
    ]
    leaf, sizes = np.array(pieces, int).reshape(-1, 2).T
    sums = _carried(_stretches(x, sizes))
    if len(pieces) == len(tiles):
        return sums
    sums = jax.ops.segment_sum(jnp.moveaxis(sums, -1, 0), jnp.asarray(leaf), len(tiles))
    return _carried(jnp.moveaxis(sums, 0, -1))


def _stretches(x: jax.Array, sizes: np.ndarray) -> jax.Array:
    """Digits of float32[..., tiles] added up over consecutive stretches, uint32[8, ..., stretches].

    A stretch is the difference of what there is up to its ends, of which each is whole blocks and a
    part of one. Integers wrap around, so that only the difference has to fit.
    """
    ends = np.cumsum(np.append(0, sizes))
    block, rest = (jnp.asarray(part) for part in np.divmod(ends, _BLOCK))
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, _BLOCK - ends[-1] % _BLOCK)])
    x = x.reshape(*x.shape[:-1], -1, _BLOCK)
    whole = jnp.sum(_digits(x), axis=-1, dtype=jnp.uint32)
    before = jnp.cumsum(whole, axis=-1, dtype=jnp.uint32) - whole
    part = jnp.where(jnp.arange(_BLOCK)[None] < rest[:, None], x[..., block, :], 0.0)
    up_to = before[..., block] + jnp.sum(_digits(part), axis=-1, dtype=jnp.uint32)
    return up_to[..., 1:] - up_to[..., :-1]


def _digits(x: jax.Array) -> jax.Array:
    """float32[...] of at least 0 -> uint32[8, ...], each below 2**16, by shifting the mantissa."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)[None]
    # Above infinity are NaN, and what is negative.
    bits = jnp.where(bits > _INFINITE, jnp.uint32(0), jnp.minimum(bits, jnp.uint32(_LARGEST)))
    # An exponent of 0 implies no such bit, but is far below the unit.
    mantissa = bits & jnp.uint32(_IMPLIED - 1) | jnp.uint32(_IMPLIED)
    k = jnp.arange(DIGITS).reshape(DIGITS, *[1] * x.ndim)
    shift = (bits >> 23).astype(jnp.int32) - (_BIAS + UNIT + BITS * k)
    left = jnp.clip(shift, 0, BITS).astype(jnp.uint32)
    right = jnp.clip(-shift, 0, 24).astype(jnp.uint32)
    return mantissa << left >> right & jnp.uint32(_TOP)


def _carried(digits: jax.Array) -> jax.Array:
    """uint32[8, ...] with every digit below 2**16; the highest stops there."""
    carry, out = jnp.zeros(digits.shape[1:], jnp.uint32), []
    for digit in digits[:-1]:
        here = digit + carry
        out.append(here & jnp.uint32(_TOP))
        carry = here >> BITS
    return jnp.stack([*out, jnp.minimum(digits[-1] + carry, jnp.uint32(_TOP))])
