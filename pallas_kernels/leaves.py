"""What the kernels of both platforms are given of a leaf: its numbers, and its matrix.

Numbers lie in three small tables with a row for each leaf. They are traced: leaves of one geometry
share a kernel, and nothing is compiled again when they change.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stquant_jax.codecs import Lattice, Levels
from stquant_jax.rules.adam import AdamScalars
from stquant_jax.storage.layout import Layout, Leaf
from stquant_jax.storage.noise import Keys, keys_of
from stquant_jax.storage.places import starts_of
from stquant_jax.storage.planes import GROUP, LANES
from stquant_jax.storage.settings import Storage
from stquant_jax.storage.tiling import from_tiles, to_tiles

SUMS = 16  # places for statistics, of which there are fewer


class Scalars(NamedTuple):
    """Traced numbers of a leaf."""

    round_row: jax.Array  # int32: the row that moves
    mu_first: jax.Array
    mu_width: jax.Array
    nu_first: jax.Array
    nu_width: jax.Array
    first_tile: jax.Array
    start: jax.Array  # the first group, in the leaf on all devices
    keys: Keys
    rule: AdamScalars
    lev: Levels
    lat: Lattice
    rate: jax.Array  # minus the learning rate
    decay: jax.Array


class Tables(NamedTuple):
    """`Scalars` of all leaves, a row for each."""

    whole: jax.Array  # int32[leaves, 7]
    keys: jax.Array  # uint32[leaves, 5]
    real: jax.Array  # float32[leaves, 18]

    @classmethod
    def of(
        cls,
        layout: Layout,
        storage: Storage,
        scalars: AdamScalars,
        count: jax.Array,
        offsets: jax.Array,
        widths: jax.Array,
        lev: Levels,
        lat: Lattice,
        rate: jax.Array | float = 0.0,
        decay: jax.Array | float = 0.0,
    ) -> "Tables":
        """Offsets and widths are of slots, levels, lattice and decay of leaves."""
        leaves = jnp.arange(len(layout.quantized), dtype=jnp.int32)
        mu, nu = slice(0, None, 2), slice(1, None, 2)
        spans = offsets[mu], widths[mu], offsets[nu], widths[nu]
        first_tile, start = jnp.array(layout.first_tile), starts_of(layout.quantized)
        keys = jax.vmap(lambda leaf: keys_of(storage.seed, leaf, count))(leaves)

        def table(values, dtype):
            columns = (jnp.broadcast_to(jnp.asarray(x, dtype), leaves.shape) for x in values)
            return jnp.stack(list(columns), axis=1)

        return cls(
            table((count % GROUP, *spans, first_tile, start), jnp.int32),
            table(keys, jnp.uint32),
            table((*scalars, *lev, *lat, rate, decay), jnp.float32),
        )

    def row(self, leaf: jax.Array | int) -> Scalars:
        """One leaf's, in the kernel, where the tables are references."""
        numbers: Any = iter(table[leaf, k] for table in self for k in range(table.shape[1]))

        def take(like):
            return like(*(next(numbers) for _ in like._fields))

        whole = [next(numbers) for _ in range(self.whole.shape[1])]
        parts = [take(like) for like in (Keys, AdamScalars, Levels, Lattice)]
        return Scalars(*whole, *parts, *numbers)


def matrix_of(x: jax.Array, leaf: Leaf, staged: bool) -> jax.Array:
    """A leaf as its kernel sees it: as it is, or tile below tile, [tiles * 32, 128]."""
    return to_tiles(x, leaf).reshape(-1, LANES) if staged else x.reshape(leaf.matrix)


def leaf_of(matrix: jax.Array, leaf: Leaf, staged: bool) -> jax.Array:
    """`matrix_of` undone."""
    x = from_tiles(matrix.reshape(-1, GROUP, LANES), leaf) if staged else matrix
    return x.reshape(leaf.shape)
