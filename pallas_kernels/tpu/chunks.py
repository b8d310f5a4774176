"""A leaf cut into chunks of eight tiles: what one step of a kernel's grid works on.

Tiles run along the group axis first, so eight of them are a block of 256 x 128 elements of the
leaf, or of 128 x 256 where the group axis is the last: both are whole tiles of TPU memory, and
the eight rows of each plane are one.
"""

from dataclasses import dataclass

from jax.experimental import pallas as pl

from stquant_jax.storage.layout import Leaf
from stquant_jax.storage.places import Place
from stquant_jax.storage.planes import GROUP, LANES

CHUNK = 8
ROWS = CHUNK * GROUP  # elements of a chunk along the group axis


@dataclass(frozen=True)
class Chunks:
    """The geometry of a leaf's chunks; static, equal for leaves that can share a kernel.

    A leaf whose bands do not come in eights, and one that is folded or flat, is laid out tile by
    tile first, as a matrix [tiles * 32, 128]: its gradient is copied.
    """

    place: Place
    ragged: bool
    staged: bool  # the leaf comes as a matrix [tiles * 32, 128], tile below tile
    transposed: bool
    bands: int  # of the matrix that the kernel sees, a multiple of eight
    lane_tiles: int
    groups: int  # elements of that matrix along the group axis and along the lanes
    lanes: int

    @classmethod
    def of(cls, leaf: Leaf) -> "Chunks":
        staged = leaf.kind != "tiled" or leaf.bands % CHUNK != 0
        if staged:
            matrix = leaf.tiles, 1, leaf.tiles * GROUP, LANES
        else:
            matrix = leaf.bands, leaf.lane_tiles, leaf.groups_along, leaf.lanes_along
        return cls(Place.of(leaf), leaf.ragged, staged, leaf.transposed and not staged, *matrix)

    @property
    def tiles(self) -> int:
        return self.bands * self.lane_tiles

    @property
    def grid(self) -> tuple[int, int]:
        return self.lane_tiles, self.bands // CHUNK

    @property
    def padded(self) -> bool:
        """Blocks reach beyond the matrix, where memory holds anything."""
        return self.groups % ROWS != 0 or self.lanes % LANES != 0

    @property
    def block(self) -> pl.BlockSpec:
        """Of the gradients, the updates and the parameters."""
        if self.transposed:
            return pl.BlockSpec((LANES, ROWS), lambda lane_tile, i, *_: (lane_tile, i))
        return pl.BlockSpec((ROWS, LANES), lambda lane_tile, i, *_: (i, lane_tile))
