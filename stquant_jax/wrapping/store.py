"""Moments that stand alone, each with a width of its own: from float32 to what is stored, and back.

An arena as that of `stquant_jax.storage.arena`, but a slot is any array, signed or unsigned, not
one of a pair, and widths never change: offsets are static.
"""

import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
from stquant_jax.precision.policy import DEFAULT_WINDOW
from stquant_jax.storage import planes
from stquant_jax.storage.indexing import indexed
from stquant_jax.storage.layout import Layout, Leaf
from stquant_jax.storage.noise import Dither, keys_of
from stquant_jax.storage.numerics import or_nan, to_code, to_float
from stquant_jax.storage.places import Place, start_of
from stquant_jax.storage.planes import GROUP, LANES, PLANES
from stquant_jax.storage.tiling import from_tiles, to_tiles

SCALE_BYTES = 2 * LANES  # of a tile
UNSIGNED_BYTES = GROUP  # of its rows, if it is unsigned


class Store(NamedTuple):
    """What is stored; sharded, of all devices, one after the other."""

    arena: jax.Array  # uint32[rows, 128]
    scale: jax.Array  # uint16[tiles, 128]
    row: jax.Array  # uint8[32 * tiles of unsigned slots]


@dataclass(frozen=True)
class Format:
    """How an array is stored: equal for arrays that share a program."""

    leaf: Leaf  # its geometry
    unsigned: bool
    width: int  # bits of a code


class Start(NamedTuple):
    """Where an array's part of a `Store` begins; numbers, traced or not."""

    index: Any  # of the slot, which seeds its noise
    row: Any  # of the arena
    tile: Any
    unsigned_tile: Any


class Slot(NamedTuple):
    """An array that is stored."""

    format: Format
    start: Start


@dataclass(frozen=True)
class StoreLayout:
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
            geometry = replace(leaf, path="", reason="", dtype=None)
            start = Start(*np.array([i, row, tile, unsigned_tile]).astype(np.int32))
            found.append(Slot(Format(geometry, self.unsigned[i], self.widths[i]), start))
            row, tile = row + self.widths[i] * leaf.tiles, tile + leaf.tiles
            unsigned_tile += leaf.tiles * self.unsigned[i]
        return tuple(found)

    @cached_property
    def fingerprint(self) -> int:
        """Of what the bits of a store mean, on any number of devices; never 0."""
        shapes = [leaf.whole.shape for leaf in self.layout.quantized]
        of = self.layout.devices, shapes, self.unsigned, self.widths
        return zlib.crc32(repr(of).encode()) or 1

    def empty(self) -> Store:
        """All slots are zero. No array is empty, for Orbax saves none that is."""
        if not self.slots:
            one = jnp.zeros((1, 1), jnp.uint32)
            return Store(one, one.astype(jnp.uint16), jnp.zeros((1,), jnp.uint8))
        tiles = np.array(self.layout.tiles_of_leaves, int)
        height, unsigned = (int(np.sum(tiles * x)) for x in (self.widths, self.unsigned))
        return Store(
            jnp.zeros((max(1, height), LANES), jnp.uint32),
            indexed(jnp.zeros((self.layout.tiles, LANES), jnp.uint16), self.layout.tiles),
            jnp.zeros((max(1, unsigned * GROUP),), jnp.uint8),
        )


def decode(form: Format, start: Start, store: Store) -> jax.Array:
    """A slot's values, float32[*shape]; NaN in groups that are not finite."""
    leaf, slot = form.leaf, Slot(form, start)

    def body(size, tile, data):
        codes, scale, row = _read(slot, store, tile, size, lambda x: x)
        _, valid = Place.of(leaf).of_tiles(tile, size, leaf.ragged)
        if form.unsigned:
            x = decode_second(codes, scale, row, valid, _lattice(form)).v
        else:
            x = decode_signed(codes, scale, valid, levels(jnp.int32(form.width)))
        return put(data, x, tile)

    # A zero that has to wait for the store: of a constant XLA makes all slots' buffers at once.
    zero = store.scale[0, 0].astype(jnp.float32) * 0.0
    blank = jnp.full((leaf.tiles, GROUP, LANES), zero)
    return from_tiles(over_leaf(leaf, body, blank), leaf)


def encode(
    form: Format,
    start: Start,
    store: Store,
    x: jax.Array,
    seed: int,
    count: jax.Array,
    *,
    anew: bool = False,
) -> Store:
    """The store with a slot written.

    Args:
      x: [*shape], of any real floating dtype. An element that is not finite, or negative in an
        unsigned slot, marks its group.
      seed: of the rounding. count: int32[], updates done.
      anew: x did not grow out of what is stored.
    """
    leaf, slot, x = form.leaf, Slot(form, start), x.astype(jnp.float32)
    if form.unsigned:
        x = or_nan(x, x >= 0)
    tiles, hold = to_tiles(x, leaf), holder(count >= 0)
    keys, place = keys_of(seed, jnp.asarray(start.index), count), Place.of(leaf, start_of(leaf.cut))

    def body(size, tile, store):
        # All that is read is read before anything is written.
        new = hold(lax.dynamic_slice_in_dim(tiles, tile, size))
        old = None if anew else _read(slot, store, tile, size, hold)
        group, valid = place.of_tiles(tile, size, leaf.ragged)
        noise = Dither(keys, group, jnp.arange(GROUP, dtype=jnp.uint32)[None, :, None])
        if form.unsigned:
            codes = _unsigned_codes(form, new, old, valid, noise, count % GROUP, Ops(hold))
        else:
            codes = _signed_codes(form, new, old, valid, noise, Ops(hold))
        return _write(slot, store, tile, *codes, hold)

    return over_leaf(leaf, body, store, again=False)


# --- tiles ---


def _read(
    slot: Slot, store: Store, tile: jax.Array, size: int, hold: Hold
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes uint32[size, 32, 128], scales uint32[size, 1, 128] and rows float32[size, 32, 1]."""
    form, start = slot
    first, stride = start.row + tile, form.leaf.tiles
    words = [
        lax.dynamic_slice_in_dim(store.arena, first + p * stride, size) for p in range(form.width)
    ]
    scale = lax.dynamic_slice_in_dim(store.scale, start.tile + tile, size)
    row = jnp.zeros((size * GROUP,), jnp.uint8)
    if form.unsigned:
        at = (start.unsigned_tile + tile) * GROUP
        row = lax.dynamic_slice_in_dim(store.row, at, size * GROUP)
    words, scale, row = hold((words, scale, row))
    nothing = [jnp.zeros((size, LANES), jnp.uint32)] * (PLANES - form.width)
    codes = planes.unpack(jnp.stack([*words, *nothing]))
    row = to_float(row.reshape(size, GROUP, 1).astype(jnp.uint32))
    return codes, scale[:, None].astype(jnp.uint32), row


def _write(
    slot: Slot,
    store: Store,
    tile: jax.Array,
    codes: Any,  # None where there are none
    scale: jax.Array,
    row: jax.Array | None,
    hold: Hold,
) -> Store:
    form, start = slot
    words, arena = hold(planes.pack(codes)) if form.width else (), store.arena
    for p in range(form.width):
        arena = put(arena, words[p], start.row + tile + p * form.leaf.tiles)
    store = store._replace(arena=arena, scale=put(store.scale, scale[:, 0], start.tile + tile))
    if row is None:
        return store
    at = (start.unsigned_tile + tile) * GROUP
    return store._replace(row=put(store.row, to_code(row).reshape(-1), at))


def _lattice(form: Format) -> Lattice:
    """Without shrinkage: what is decoded is what is to go on, not what an update is made of."""
    window = jnp.float32(DEFAULT_WINDOW[form.width])
    return lattice(jnp.int32(form.width), window, jnp.float32(0))


def _unsigned_codes(
    form: Format,
    x: jax.Array,
    old: tuple | None,
    valid: jax.Array,
    noise: Dither,
    round_row: jax.Array,
    ops: Ops,
) -> tuple[Any, jax.Array, jax.Array | None]:
    lat = _lattice(form)
    if old is None:
        new = encode_second_anew(x, valid, lat, noise.nu, noise.nu_coin, ops)
    else:
        codes, scale, row = old
        codes, dither = (codes, noise.nu) if form.width else (None, noise.nu_row)
        second = decode_second(codes, scale, row, valid, lat, ops)
        new = encode_second(x, second, row, round_row, valid, lat, dither, noise.nu_coin, ops)
    return new.codes, new.scale, new.row


def _signed_codes(
    form: Format,
    x: jax.Array,
    old: tuple | None,
    valid: jax.Array,
    noise: Dither,
    ops: Ops,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    lev, before = levels(jnp.int32(form.width)), jnp.full_like(x, jnp.inf)
    if old is not None:
        codes, scale, _ = old
        before = decode_signed(codes, scale, valid, lev, ops)
    return *encode_signed(x, before, valid, lev, noise.nu, noise.nu_coin, ops), None
