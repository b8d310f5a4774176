"""Where the elements of a tile lie in their leaf: what noise is seeded by, and what is padding."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stquant_jax.layout import Leaf
from stquant_jax.planes import GROUP, LANES


class Place(NamedTuple):
    """A leaf's geometry as numbers, so that a traced leaf index can pick one out of a table."""

    bands: jax.Array | int
    lanes: jax.Array | int
    limit: (
        jax.Array | int
    )  # elements on the group axis; of the whole leaf where bands are folded or flat
    flat: jax.Array | int

    @classmethod
    def of(cls, leaf: Leaf) -> "Place":
        flat = leaf.kind != "tiled"
        return cls(
            leaf.bands, leaf.lanes_along, leaf.size if flat else leaf.groups_along, int(flat)
        )

    def of_tiles(self, tile: jax.Array, size: int, ragged: bool) -> tuple[jax.Array, jax.Array]:
        """Group index uint32[size, 1, 128] in the leaf, and 1 for elements, 0 for padding,
        float32[size, 32, 128].

        Where no leaf is ragged the latter is a constant: groups are either full or, at the end of
        the lanes, all padding, which reads as a group of zeros.
        """
        tiles = tile + jnp.arange(size, dtype=jnp.int32)[:, None, None]
        group, left = self.of_lanes(tiles, jnp.arange(LANES, dtype=jnp.int32))
        if not ragged:
            return group, jnp.ones((1, GROUP, 1), jnp.float32)
        return group, (jnp.arange(GROUP, dtype=jnp.int32)[:, None] < left).astype(jnp.float32)

    def of_lanes(self, tile: jax.Array, lane: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Group index uint32 of lanes 0..127 of tiles int32, any shapes that broadcast, and how
        many elements there are from the group's first on, int32: 32 or more if it is full."""
        lane_tile = jax.lax.div(
            tile, jnp.broadcast_to(jnp.int32(self.bands), tile.shape)
        )  # both are positive
        band = tile - lane_tile * self.bands
        lane = lane_tile * LANES + lane
        # Flat, a group is 32 consecutive elements, so it is the last lane that may be cut short,
        # not the last band.
        left = self.limit - GROUP * jnp.where(self.flat == 1, lane, band)
        return (band * self.lanes + lane).astype(jnp.uint32), left


def places_of(leaves: Sequence[Leaf]) -> Place:
    """A table: int32[leaves] in every field."""
    columns = zip(*map(Place.of, leaves), strict=True)
    return Place(*(jnp.asarray(np.array(column, np.int32)) for column in columns))
