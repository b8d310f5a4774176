"""A leaf's elements in the order of its tiles, and back."""

import jax
import jax.numpy as jnp

from stquant_jax.storage.layout import Leaf
from stquant_jax.storage.planes import GROUP, LANES


def to_tiles(x: jax.Array, leaf: Leaf) -> jax.Array:
    """[*shape] -> [tiles, 32, 128], padded with zeros."""
    groups = _to_groups(x, leaf)
    bands, lane_tiles = leaf.bands, leaf.lane_tiles
    tiles = _pad_to(groups, bands * GROUP, lane_tiles * LANES)
    tiles = tiles.reshape(bands, GROUP, lane_tiles, LANES).transpose(2, 0, 1, 3)
    tiles = tiles.reshape(-1, GROUP, LANES)
    return jnp.pad(tiles, ((0, leaf.tiles - len(tiles)), (0, 0), (0, 0)))


def from_tiles(tiles: jax.Array, leaf: Leaf) -> jax.Array:
    """[tiles, 32, 128] -> [*shape]. The inverse of `to_tiles`."""
    bands, lane_tiles = leaf.bands, leaf.lane_tiles
    tiles = tiles[: bands * lane_tiles].reshape(lane_tiles, bands, GROUP, LANES)
    groups = tiles.transpose(1, 2, 0, 3).reshape(bands * GROUP, lane_tiles * LANES)
    groups = groups[: leaf.groups_along, : leaf.lanes_along]
    return _from_groups(groups, leaf)


def _to_groups(x: jax.Array, leaf: Leaf) -> jax.Array:
    """[*shape] -> [groups_along, lanes_along]: the group axis first, the lane axis last."""
    if leaf.kind == "flat":
        return (
            jnp.pad(x.reshape(-1), (0, leaf.lanes_along * GROUP - leaf.size)).reshape(-1, GROUP).T
        )
    matrix = x.reshape(leaf.matrix)
    groups = matrix.T if leaf.transposed else matrix
    if leaf.kind == "folded":
        return groups.reshape(-1, GROUP, groups.shape[1]).swapaxes(0, 1).reshape(GROUP, -1)
    return groups


def _from_groups(groups: jax.Array, leaf: Leaf) -> jax.Array:
    if leaf.kind == "flat":
        return groups.T.reshape(-1)[: leaf.size].reshape(leaf.shape)
    if leaf.kind == "folded":
        lanes = leaf.matrix[not leaf.transposed]
        groups = groups.reshape(GROUP, -1, lanes).swapaxes(0, 1).reshape(-1, lanes)
    return (groups.T if leaf.transposed else groups).reshape(leaf.shape)


def _pad_to(matrix: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.pad(matrix, ((0, rows - matrix.shape[0]), (0, columns - matrix.shape[1])))
