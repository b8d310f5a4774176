"""A tile of a leaf in shared memory, fetched and stored by the copy engine (TMA).

The engine takes a box out of the leaf's own matrix, fills what lies outside of the matrix with
zeros and drops what would be stored there, so ragged edges cost nothing and are never touched.
Shared memory is laid out so that one thread reads one group:

* groups along the rows: the box is [32, 128], element i of all lanes is a row of it;
* groups along the columns (`transposed`): boxes of [128, 16 bytes], side by side. A row of such a
  box is a quarter or an eighth of a lane's group. Elements i of neighbouring lanes are 16 bytes
  apart, which is a four-way bank conflict; one box of [128, 32] would make it 32-way, and the
  engine's swizzles can only be undone by layouts that this kernel's vectors do not have.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from stquant_jax.storage.planes import GROUP, LANES

ALIGNMENT = 16  # bytes: of the rows of a matrix, and the narrowest box


@dataclass(frozen=True)
class Window:
    """How tiles are held: [32, 128], or [32 / n, 128, n] where n elements are 16 bytes."""

    dtype: Any
    transposed: bool

    @property
    def _packet(self) -> int:
        return ALIGNMENT // jnp.dtype(self.dtype).itemsize

    @property
    def scratch(self) -> Any:
        packets = GROUP // self._packet, LANES, self._packet
        return plgpu.SMEM(packets if self.transposed else (GROUP, LANES), self.dtype)

    @property
    def copies(self) -> int:
        """Transfers that a tile takes."""
        return GROUP // self._packet if self.transposed else 1

    def _boxes(self, matrix: Any, held: Any, band: jax.Array, lane_tile: jax.Array):
        """Pairs of a part of the matrix and where it is held."""
        groups, lanes = band * GROUP, pl.ds(lane_tile * LANES, LANES)
        if not self.transposed:
            yield matrix.at[pl.ds(groups, GROUP), lanes], held
            return
        for i in range(self.copies):
            columns = pl.ds(groups + i * self._packet, self._packet)
            yield matrix.at[lanes, columns], held.at[i]

    def fetch(self, matrix, held, band: jax.Array, lane_tile: jax.Array, barrier) -> None:
        """Start to fetch a tile; ``barrier`` counts `copies` arrivals."""
        for box, place in self._boxes(matrix, held, band, lane_tile):
            plgpu.copy_gmem_to_smem(box, place, barrier)

    def store(self, matrix, held, band: jax.Array, lane_tile: jax.Array) -> None:
        """Start to store a tile; what was written to ``held`` must have been committed."""
        for box, place in self._boxes(matrix, held, band, lane_tile):
            plgpu.copy_smem_to_gmem(place, box)

    def _at(self, r: jax.Array, q: int) -> tuple:
        if not self.transposed:
            return (r + 8 * q, slice(None))
        n = self._packet  # a divisor of 8: so much is known before r is
        return (r // n + 8 // n * q, slice(None), r % n)

    def read(self, held, r: jax.Array, q: int = 0) -> jax.Array:
        """Element r + 8 q of every lane's group, [128]."""
        return held[self._at(r, q)]

    def write(self, held, r: jax.Array, q: int, x: jax.Array) -> None:
        held[self._at(r, q)] = x.astype(self.dtype)
