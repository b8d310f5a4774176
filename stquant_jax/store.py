"""Moments that stand alone, each with a width of its own: from float32 to what is stored, and back.

An arena as that of `stquant_jax.arena`, but a slot is any array, signed or unsigned, not one of a
pair, and widths never change: offsets are static.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax import planes
from stquant_jax.backends.loops import holder, over_leaf, put
from stquant_jax.codecs import (
    Hold,
    Lattice,
    Ops,
    decode_second,
    decode_signed,
    encode_second,
    encode_second_anew,
    encode_signed,
    lattice,
    levels,
)
from stquant_jax.layout import Layout, Leaf, from_tiles, to_tiles
from stquant_jax.noise import Dither, dither, keys_of
from stquant_jax.numerics import to_code, to_float
from stquant_jax.places import Place, start_of
from stquant_jax.planes import GROUP, LANES, PLANES
from stquant_jax.precision.policy import DEFAULT_WINDOW

SCALE_BYTES = 2 * LANES  # of a tile
UNSIGNED_BYTES = GROUP  # of its rows, if it is unsigned


class Store(NamedTuple):
    """What is stored; sharded, of all devices, one after the other."""

    arena: jax.Array  # uint32[rows, 128]
    scale: jax.Array  # uint16[tiles, 128]
    row: jax.Array  # uint8[32 * tiles of unsigned slots]


@dataclass(frozen=True)
class Slot:
    """An array, and where its part of a `Store` begins."""

    leaf: Leaf
    unsigned: bool
    width: int  # bits of a code
    index: int  # seeds its noise
    row: int  # of the arena
    tile: int
    unsigned_tile: int


@dataclass(frozen=True)
class Shelves:
    """All slots: what a `Store` holds, on one device.

    Attributes:
      layout: of its quantized leaves each is a slot.
      unsigned, widths: of each slot.
    """

    layout: Layout
    unsigned: tuple[bool, ...]
    widths: tuple[int, ...]

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        found, row, tile, unsigned_tile = [], 0, 0, 0
        for i, leaf in enumerate(self.layout.quantized):
            found.append(Slot(leaf, self.unsigned[i], self.widths[i], i, row, tile, unsigned_tile))
            row, tile = row + self.widths[i] * leaf.tiles, tile + leaf.tiles
            unsigned_tile += leaf.tiles * self.unsigned[i]
        return tuple(found)

    @cached_property
    def fingerprint(self) -> int:
        """Of what the bits of a store mean, on any number of devices."""
        of = [
            (slot.leaf.whole.path, slot.leaf.whole.shape, slot.unsigned, slot.width)
            for slot in self.slots
        ]
        return zlib.crc32(repr((self.layout.devices, of)).encode())

    def empty(self) -> Store:
        """All slots are zero. No array is empty, for Orbax saves none that is."""
        if not self.slots:
            one = jnp.zeros((1, 1), jnp.uint32)
            return Store(one, one.astype(jnp.uint16), jnp.zeros((1,), jnp.uint8))
        tiles = np.array([slot.leaf.tiles for slot in self.slots], int)
        height, unsigned = (int(np.sum(tiles * x)) for x in (self.widths, self.unsigned))
        return Store(
            jnp.zeros((max(1, height), LANES), jnp.uint32),
            jnp.zeros((self.layout.tiles, LANES), jnp.uint16),
            jnp.zeros((max(1, unsigned * GROUP),), jnp.uint8),
        )


def decode(slot: Slot, store: Store) -> jax.Array:
    """A slot's values, float32[*shape]; NaN in groups that are not finite."""
    leaf = slot.leaf

    def body(size, tile, data):
        codes, scale, row = _read(slot, store, tile, size, lambda x: x)
        _, valid = Place.of(leaf).of_tiles(tile, size, leaf.ragged)
        if slot.unsigned:
            x = decode_second(codes, scale, row, valid, _lattice(slot)).v
        else:
            x = decode_signed(codes, scale, valid, levels(jnp.int32(slot.width)))
        return put(data, x, tile)

    # A zero that has to wait for the store: of a constant XLA makes all slots' buffers at once.
    zero = store.scale[0, 0].astype(jnp.float32) * 0.0
    blank = jnp.full((leaf.tiles, GROUP, LANES), zero)
    return from_tiles(over_leaf(leaf, body, blank), leaf)


def encode(
    slot: Slot, store: Store, x: jax.Array, seed: int, count: jax.Array, *, anew: bool = False
) -> Store:
    """The store with a slot written.

    Args:
      x: [*shape], of any real floating dtype. An element that is not finite, or negative in an
        unsigned slot, marks its group.
      seed: of the rounding. count: int32[], updates done.
      anew: x did not grow out of what is stored.
    """
    leaf, x = slot.leaf, x.astype(jnp.float32)
    if slot.unsigned:
        x = jnp.where(x < 0, jnp.nan, x)
    tiles, hold = to_tiles(x, leaf), holder(count >= 0)
    keys, place = keys_of(seed, jnp.int32(slot.index), count), Place.of(leaf, start_of(leaf.cut))

    def body(size, tile, store):
        # All that is read is read before anything is written.
        new = hold(lax.dynamic_slice_in_dim(tiles, tile, size))
        old = None if anew else _read(slot, store, tile, size, hold)
        group, valid = place.of_tiles(tile, size, leaf.ragged)
        noise = dither(keys, group, jnp.arange(GROUP, dtype=jnp.uint32)[:, None])
        if slot.unsigned:
            codes = _unsigned_codes(slot, new, old, valid, noise, count % GROUP, Ops(hold))
        else:
            codes = _signed_codes(slot, new, old, valid, noise, Ops(hold))
        return _write(slot, store, tile, *codes, hold)

    return over_leaf(leaf, body, store, again=False)


# --- tiles ---


def _read(
    slot: Slot, store: Store, tile: jax.Array, size: int, hold: Hold
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes uint32[size, 32, 128], scales uint32[size, 1, 128] and rows float32[size, 32, 1]."""
    first, stride = slot.row + tile, slot.leaf.tiles
    words = [
        lax.dynamic_slice_in_dim(store.arena, first + p * stride, size) for p in range(slot.width)
    ]
    scale = lax.dynamic_slice_in_dim(store.scale, slot.tile + tile, size)
    row = jnp.zeros((size * GROUP,), jnp.uint8)
    if slot.unsigned:
        at = (slot.unsigned_tile + tile) * GROUP
        row = lax.dynamic_slice_in_dim(store.row, at, size * GROUP)
    words, scale, row = hold((words, scale, row))
    nothing = [jnp.zeros((size, LANES), jnp.uint32)] * (PLANES - slot.width)
    codes = planes.unpack(jnp.stack([*words, *nothing]))
    row = to_float(row.reshape(size, GROUP, 1).astype(jnp.uint32))
    return codes, scale[:, None].astype(jnp.uint32), row


def _write(
    slot: Slot,
    store: Store,
    tile: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    row: jax.Array | None,
    hold: Hold,
) -> Store:
    words, arena = hold(planes.pack(codes)), store.arena
    for p in range(slot.width):
        arena = put(arena, words[p], slot.row + tile + p * slot.leaf.tiles)
    store = store._replace(arena=arena, scale=put(store.scale, scale[:, 0], slot.tile + tile))
    if row is None:
        return store
    at = (slot.unsigned_tile + tile) * GROUP
    return store._replace(row=put(store.row, to_code(row).reshape(-1), at))


def _lattice(slot: Slot) -> Lattice:
    """Without shrinkage: what is decoded is what is to go on, not what an update is made of."""
    window = jnp.float32(DEFAULT_WINDOW[slot.width])
    return lattice(jnp.int32(slot.width), window, jnp.float32(0))


def _unsigned_codes(
    slot: Slot,
    x: jax.Array,
    old: tuple | None,
    valid: jax.Array,
    noise: Dither,
    turn: jax.Array,
    ops: Ops,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    lat = _lattice(slot)
    if old is None:
        new = encode_second_anew(x, valid, lat, noise.nu, noise.nu_coin, ops)
    else:
        codes, scale, row = old
        second = decode_second(codes, scale, row, valid, lat, ops)
        new = encode_second(x, second, row, turn, valid, lat, noise.nu, noise.nu_coin, ops)
    return to_code(new.codes), new.scale, new.row


def _signed_codes(
    slot: Slot,
    x: jax.Array,
    old: tuple | None,
    valid: jax.Array,
    noise: Dither,
    ops: Ops,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    lev, before = levels(jnp.int32(slot.width)), jnp.full_like(x, jnp.inf)
    if old is not None:
        codes, scale, _ = old
        before = decode_signed(codes, scale, valid, lev, ops)
    return *encode_signed(x, before, valid, lev, noise.nu, noise.nu_coin, ops), None
