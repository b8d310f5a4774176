"""Planes of a chunk between the arena in HBM and buffers in VMEM: one copy for each plane, as many
as the slot is wide, of one chunk while another one is computed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.chunks import CHUNK
from stquant_jax.storage.planes import LANES, PLANES, transpose8x8

MOMENTS = 2
# Two chunks in flight; of each both moments' planes, eight rows in each.
BUFFER = pltpu.VMEM((2, MOMENTS, PLANES, CHUNK, LANES), jnp.uint32)
SEMAPHORES = pltpu.SemaphoreType.DMA((2,))
# Row 8 r + k: word r of tile k.
WORDS = pltpu.VMEM((MOMENTS, PLANES * CHUNK, LANES), jnp.uint32)


class Copies(NamedTuple):
    """Copies of planes in one direction."""

    arena: Any
    buffer: Any
    semaphores: Any
    first: tuple[jax.Array, jax.Array]  # rows of the arena, of mu and nu
    widths: tuple[jax.Array, jax.Array]
    tiles: int
    inward: bool

    def start(self, chunk: jax.Array) -> None:
        self._each(chunk, lambda copy: copy.start())

    def wait(self, chunk: jax.Array) -> None:
        self._each(chunk, lambda copy: copy.wait())

    def _each(self, chunk: jax.Array, act: Callable[[Any], None]) -> None:
        here = lax.rem(chunk, 2)
        for moment in range(MOMENTS):

            @pl.loop(0, self.widths[moment])
            def _(plane, moment=moment):
                row = self.first[moment] + plane * self.tiles + chunk * CHUNK
                there = self.arena.at[pl.ds(pl.multiple_of(row, CHUNK), CHUNK)]
                buffer = self.buffer.at[here, moment, plane]
                ends = (there, buffer) if self.inward else (buffer, there)
                act(pltpu.make_async_copy(*ends, self.semaphores.at[here]))


def unpack_chunk(buffer: Any, chunk: jax.Array, widths: tuple, words: Any) -> None:
    """Planes that have arrived to whole codes, four in a word."""
    for moment in range(MOMENTS):
        planes = buffer.at[lax.rem(chunk, 2), moment]
        stored = [jnp.where(p < widths[moment], planes[p], jnp.uint32(0)) for p in range(PLANES)]
        for r, word in enumerate(transpose8x8(stored)):
            words[moment, CHUNK * r : CHUNK * (r + 1)] = word


def pack_chunk(words: Any, chunk: jax.Array, buffer: Any) -> None:
    """`unpack_chunk` undone; planes above the width are not copied to the arena."""
    for moment in range(MOMENTS):
        whole = [words[moment, CHUNK * r : CHUNK * (r + 1)] for r in range(PLANES)]
        for p, plane in enumerate(transpose8x8(whole)):
            buffer[lax.rem(chunk, 2), moment, p] = plane


def words_of_tile(tile: jax.Array) -> Any:
    """Where a tile's words lie: an index of [64, 128]."""
    return pl.ds(tile, PLANES, stride=CHUNK)
