"""A chunk in VMEM: elements tile by tile, and numbers of groups and of rows, of all eight tiles at
once.

A vector register holds 8 x 128 numbers. Of a tile's elements that is a quarter; of its groups there
are only 128 and of its rows 32, so a formula of these, tile by tile, would leave most of every
register empty, and each would wait for the one before. Here numbers of groups are [8, 128], a tile
in each row, and numbers of rows [32, 8], a tile in each column. Groups are reduced in the order of
`by_halves`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.leaves import SUMS, Scalars
from pallas_kernels.tpu.chunks import CHUNK, ROWS, Chunks
from pallas_kernels.tpu.planes import WORDS, words_of_tile
from stquant_jax.rules.adam import Adam
from stquant_jax.storage.noise import Dither
from stquant_jax.storage.planes import GROUP, LANES, codes_of, words_of

SUBLANES = CHUNK  # of a register, which holds a number of each group of a chunk
# Numbers of rows, in `Scratch.rows`: of the old ones, sums over their lanes, of the new ones.
BEFORE, NOW, THEN, DOWN, ROOT, INVERSE, SHARE = range(7)


class Scratch(NamedTuple):
    """A chunk in VMEM. Rows run along the first axis, 32 of each tile."""

    data: Any  # float32[256, 128]: gradients, then updates or new parameters
    params: Any  # float32[256, 128]
    words: Any  # `WORDS`
    mu: Any  # float32[256, 128]: mu, then mu over roots
    v: Any  # float32[256, 128]: v, then its parts of the groups' energies
    shapes: Any  # float32[256, 128]: old roots squared, the same for these; nu's new codes
    rows: Any  # float32[7, 32, 8]: numbers of rows
    groups: Any  # float32[4, 8, 128]: numbers of groups that a pass needs
    places: Any  # int32[2, 8, 128]: index of each group, and how many elements it has
    parts: Any  # float32[3, 64, 128]: of three sums, for each tile a register yet to be reduced
    terms: Any  # float32[128, 128]: statistics, by kind and tile

    @classmethod
    def types(cls) -> list[Any]:
        """What to allocate."""
        block, registers = (ROWS, LANES), (CHUNK, LANES)
        shapes = dict.fromkeys(("data", "params", "mu", "v", "shapes"), block)
        shapes |= {
            "rows": (7, GROUP, CHUNK),
            "groups": (4, *registers),
            "places": (2, *registers),
            "parts": (3, CHUNK * SUBLANES, LANES),
            "terms": (SUMS * CHUNK, LANES),
        }
        dtypes = {"places": jnp.int32}
        return [
            WORDS if name == "words" else pltpu.VMEM(shapes[name], dtypes.get(name, jnp.float32))
            for name in cls._fields
        ]


class Chunk:
    """A chunk of a leaf. Numbers of groups are float32[8, 128], of rows [32, 8]."""

    def __init__(self, rule: Adam, chunks: Chunks, s: Scalars, chunk: jax.Array, scratch: Scratch):
        self.rule, self.chunks, self.s, self.chunk, self.scratch = rule, chunks, s, chunk, scratch
        self.coded = s.nu_width > 0
        self.place = chunks.place._replace(start=s.start)
        tiles = chunk * CHUNK + lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 0)
        lanes = lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 1)
        self.group, left = self.place.of_lanes(tiles, lanes)
        left = jnp.broadcast_to(left, (CHUNK, LANES))
        scratch.places[0] = lax.bitcast_convert_type(self.group, jnp.int32)
        scratch.places[1] = left
        self.size = jnp.full((CHUNK, LANES), GROUP, jnp.float32)
        if chunks.ragged:
            self.size = jnp.clip(left, 0, GROUP).astype(jnp.float32)
        self.coins = Dither(s.keys, self.group, jnp.uint32(0))
        self.element = lax.broadcasted_iota(jnp.int32, (GROUP, CHUNK), 0)  # of rows

    def each_tile(self, body: Callable[[Any], None]) -> None:
        pl.loop(0, CHUNK, unroll=True)(lambda k: body(Tile(self, k)))

    def each_tile_by_program(self, body: Callable[[Any, bool], None]) -> None:
        """``body(tile, coded)``: with codes of nu, or without."""
        for coded in (True, False):
            run = partial(self.each_tile, partial(lambda coded, t: body(t, coded), coded))
            pl.when(self.coded == coded)(run)

    def keep(self, *numbers: jax.Array) -> None:
        """Numbers of groups for a pass to come: `Tile.of_groups`."""
        for i, x in enumerate(numbers):
            self.scratch.groups[i] = x

    def reduced(self, i: int, combine: Callable) -> jax.Array:
        """Of groups, what `Tile.reduce` left of them: by halves."""
        parts = self.scratch.parts.at[i]
        rows = [parts[pl.ds(r, CHUNK, stride=SUBLANES)] for r in range(SUBLANES)]
        while len(rows) > 1:
            half = len(rows) // 2
            rows = [combine(rows[r], rows[r + half]) for r in range(half)]
        return rows[0]

    def of_columns(self, x: jax.Array) -> jax.Array:
        """A number of each tile, [1, 8], as one of its groups: [8, 1]."""
        return jnp.sum(jnp.where(self._same, x, 0.0), axis=1, keepdims=True)

    def of_rows(self, x: jax.Array) -> jax.Array:
        """The other way round."""
        return jnp.sum(jnp.where(self._same, x, 0.0), axis=0, keepdims=True)

    @property
    def _same(self) -> jax.Array:
        at = partial(lax.broadcasted_iota, jnp.int32, (CHUNK, CHUNK))
        return at(0) == at(1)

    @property
    def has_round_row(self) -> jax.Array:
        """1 for groups that have an element there, 0 for others."""
        return jnp.where(self.s.round_row < self.size.astype(jnp.int32), 1.0, 0.0)

    def round_row(self, block: Any) -> jax.Array:
        """The round-robin row of every tile, [8, ...]."""
        return block[pl.ds(self.s.round_row, CHUNK, stride=GROUP)]

    def if_coded(self, x: jax.Array) -> jax.Array:
        """What nobody has computed where nu has no codes is zero."""
        return jnp.where(self.coded, x, 0.0)


class Tile:
    """A tile of a chunk."""

    def __init__(self, chunk: Chunk, k: jax.Array):
        self.chunk, self.scratch, self.k = chunk, chunk.scratch, k
        self.here = pl.ds(pl.multiple_of(k * GROUP, GROUP), GROUP)
        self.element = lax.bitcast_convert_type(
            lax.broadcasted_iota(jnp.int32, (GROUP, LANES), 0), jnp.uint32
        )

    def of_groups(self, n: int) -> list[jax.Array]:
        """What was kept of groups, [1, 128]."""
        return [self.scratch.groups[i, pl.ds(self.k, 1)] for i in range(n)]

    def of_rows(self, what: int) -> jax.Array:
        """A number of the tile's rows, [32, 1]."""
        return self.scratch.rows[what, :, pl.ds(self.k, 1)]

    def sum_rows(self, what: int, x: jax.Array) -> None:
        """Over the lanes."""
        self.scratch.rows[what, :, pl.ds(self.k, 1)] = jnp.sum(x, axis=1, keepdims=True)

    @property
    def group(self) -> jax.Array:
        return lax.bitcast_convert_type(self.scratch.places[0, pl.ds(self.k, 1)], jnp.uint32)

    @property
    def noise(self) -> Dither:
        return Dither(self.chunk.s.keys, self.group, self.element)

    @property
    def valid(self) -> Any:
        """1 for elements, 0 for padding."""
        if not self.chunk.chunks.ragged:
            return jnp.float32(1)
        left = self.scratch.places[1, pl.ds(self.k, 1)]
        element = lax.broadcasted_iota(jnp.int32, (GROUP, LANES), 0)
        return jnp.where(element < left, 1.0, 0.0)

    def codes(self, moment: int) -> jax.Array:
        return codes_of(self.scratch.words.at[moment][words_of_tile(self.k)])

    def put_codes(self, moment: int, codes: jax.Array) -> None:
        self.scratch.words.at[moment][words_of_tile(self.k)] = words_of(codes)

    def reduce(self, i: int, combine: Callable, x: jax.Array) -> None:
        """A group's 32 elements to eight, for `Chunk.reduced`."""
        while len(x) > SUBLANES:
            x = combine(x[: len(x) // 2], x[len(x) // 2 :])
        at = pl.ds(pl.multiple_of(self.k * SUBLANES, SUBLANES), SUBLANES)
        self.scratch.parts[i, at] = x


def rows_of(x: jax.Array) -> jax.Array:
    """Of rows, [1, 256] as they are stored: [32, 8]."""
    return jnp.concatenate([x[:, k * GROUP : (k + 1) * GROUP] for k in range(CHUNK)]).T


def stored_rows(x: jax.Array) -> jax.Array:
    """`rows_of` undone."""
    return jnp.concatenate([x.T[k : k + 1] for k in range(CHUNK)], axis=1)
