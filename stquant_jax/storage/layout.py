"""Geometry: how a leaf becomes tiles of 32 x 128 elements, and where its tiles lie.

A leaf is seen as a matrix [rows, columns], leading axes folded into the rows, the others into the
columns, nearest to a square: a kernel [features, heads, head size] has a row for each feature.
Groups run along the shorter of the two sides (ties: along the rows), lanes along the longer: token
and vocabulary axes never fall inside a group, and a sharding that cuts an axis in multiples of the
tile leaves every group whole. Where padding would waste more than 1/8, the bands of 32 are folded:
laid side by side along the lanes, so that only the end is padded. Where the group axis does not
divide into groups, the flat view is used: 32 consecutive elements a group. Small leaves stay exact
float32.

All of it is static, computed from shapes at trace time; the state holds arrays only.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stquant_jax.storage.paths import leaf_names
from stquant_jax.storage.planes import GROUP, LANES, TILE
from stquant_jax.storage.settings import Storage

MAX_WASTE = 1 / 8
PINNED = "pinned"  # the reason of a leaf that is exact by a pin


@dataclass(frozen=True)
class Cut:
    """How a leaf is divided among the devices of a mesh, and where the tiles of a part lie in it.

    On each side of the leaf's matrix a part is one run of consecutive indices, or several of one
    length at equal distances. Group ``band * lanes + lane`` of a part is in the leaf the one of

        band + band // band_run * band_gap,    lane + lane tile // tile_run * lane_gap

    in a matrix of ``lanes`` lanes, and beyond them what the index of the part adds.
    """

    shape: tuple[int, ...]  # of the whole leaf
    axes: tuple[tuple[str, ...], ...]  # of the mesh, by which each axis of the leaf is divided
    parts: tuple[int, ...]  # their number along each axis of the leaf
    tiles: int  # of the whole leaf
    whole: bool = True  # tiles, or elements: their bits do not depend on the division
    steps: tuple[int, ...] = ()  # groups from part to part, by axis of the leaf
    lanes: int = 0
    band_run: int = 1
    band_gap: int = 0
    tile_run: int = 1  # of lanes, in tiles
    lane_gap: int = 0


@dataclass(frozen=True)
class Leaf:
    """One parameter array: its format, why, and its tiles.

    A tile is (lane tile, band): ``band`` counts groups of 32 along the group axis and runs fastest,
    so that consecutive tiles are a block of the leaf whose sides are multiples of 128 in both
    orientations: what a TPU can fetch and transpose.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    kind: str  # "tiled", "folded", "flat" or "exact"
    reason: str
    split: int = 0  # axes that are folded into the rows
    groups_along: int = 0  # elements along the group axis, unpadded
    lanes_along: int = 0  # groups side by side, unpadded; folded or flat, all of the leaf's groups
    transposed: bool = False  # the group axis is the last one
    tiles: int = 0  # alignment included
    cut: Cut | None = None  # this is one device's part of a leaf

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def small(self) -> bool:
        """Too small to be quantized, not pinned."""
        return self.kind == "exact" and self.reason != PINNED

    @property
    def whole(self) -> "Leaf":
        """The leaf that this is a part of, with all the tiles that its parts have."""
        if self.cut is None:
            return self
        return replace(self, shape=self.cut.shape, tiles=self.cut.tiles, cut=None)

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """Axes of the mesh by which each axis of the leaf is divided."""
        return self.cut.axes if self.cut else ((),) * len(self.shape)

    @property
    def all_axes(self) -> tuple[str, ...]:
        return tuple(name for names in self.axes for name in names)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return math.prod(self.shape[: self.split]), math.prod(self.shape[self.split :])

    @property
    def ragged(self) -> bool:
        """Some groups are only partly filled."""
        return (self.groups_along if self.kind == "tiled" else self.size) % GROUP != 0

    @property
    def filled(self) -> int:
        """Tiles without those of alignment."""
        return self.bands * self.lane_tiles

    @property
    def lane_tiles(self) -> int:
        return -(-self.lanes_along // LANES)

    @property
    def bands(self) -> int:
        return -(-self.groups_along // GROUP)


@dataclass(frozen=True)
class Layout:
    """All leaves of a tree, in tree order, and the tiles of those that are quantized: of one
    device, where leaves are divided."""

    leaves: tuple[Leaf, ...]
    axes: tuple[str, ...] = ()  # of the mesh, along which any leaf is divided
    devices: int = 1  # that hold different parts

    @cached_property
    def quantized(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.tiles)

    @cached_property
    def whole(self) -> "Layout":
        """All devices' parts together: what a policy decides on."""
        return Layout(tuple(leaf.whole for leaf in self.leaves)) if self.axes else self

    @cached_property
    def exact(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.leaves if not leaf.tiles)

    @cached_property
    def tiles(self) -> int:
        return sum(self.tiles_of_leaves)

    @cached_property
    def tiles_of_leaves(self) -> tuple[int, ...]:
        """Of each quantized leaf."""
        return tuple(leaf.tiles for leaf in self.quantized)

    @cached_property
    def first_tile(self) -> tuple[int, ...]:
        """Where each quantized leaf's tiles begin."""
        return tuple(int(n) for n in np.cumsum([0, *self.tiles_of_leaves])[:-1])

    @property
    def exact_size(self) -> int:
        return sum(leaf.size for leaf in self.exact)

    @property
    def exact_columns(self) -> int:
        """Of the array that holds them: one at least, since Orbax saves no empty arrays."""
        return max(1, self.exact_size)

    @property
    def size(self) -> int:
        return sum(leaf.size for leaf in self.leaves)

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Values in leaf order -> those of quantized and those of exact leaves."""
        pairs = list(zip(self.leaves, leaves, strict=True))
        return [x for leaf, x in pairs if leaf.tiles], [x for leaf, x in pairs if not leaf.tiles]

    def split_exact(self, vector: jax.Array) -> list[jax.Array]:
        """[..., exact_size] -> an array [..., *shape] for each exact leaf."""
        if not self.exact:
            return []
        ends = np.cumsum([leaf.size for leaf in self.exact])
        parts = jnp.split(vector[..., : self.exact_size], ends[:-1], axis=-1)
        shapes = [(*vector.shape[:-1], *leaf.shape) for leaf in self.exact]
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def merge(self, quantized: Sequence[Any], exact: Sequence[Any]) -> list[Any]:
        """The inverse of `split`."""
        sources = {True: iter(quantized), False: iter(exact)}
        return [next(sources[bool(leaf.tiles)]) for leaf in self.leaves]


def layout_of(
    tree: Any, storage: Storage, pinned_exact: Callable[[str], bool] = lambda path: False
) -> Layout:
    """The layout of a tree of arrays or ShapeDtypeStructs.

    Args:
      tree: arrays or anything with a shape and a dtype.
      storage: which leaves are small enough to stay exact.
      pinned_exact: of a leaf's path, whether it is to stay exact whatever its size.

    Raises:
      ValueError: a leaf is not a real floating-point array; two have one path.
    """
    leaves = []
    for name, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise ValueError(
                f"leaf {name!r} is {type(x).__name__}: expected an array or ShapeDtypeStruct"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
            advice = (
                "split it into real and imaginary parts, as optax.contrib.split_real_and_imaginary "
                "does"
                if is_complex
                else "leave it out with optax.masked, it is nothing to train"
            )
            raise ValueError(
                f"leaf {name!r} has dtype {x.dtype}: expected a real floating dtype; {advice}"
            )
        leaf = leaf_of(name, tuple(x.shape), x.dtype, storage)
        if leaf.tiles and pinned_exact(name):
            leaf = Leaf(name, leaf.shape, leaf.dtype, "exact", PINNED)
        leaves.append(leaf)
    for name, times in Counter(leaf.path for leaf in leaves).items():
        if times > 1:
            raise ValueError(
                f"leaf {name!r} is there {times} times: expected paths that differ when their keys "
                "are joined by dots"
            )
    return Layout(tuple(leaves))


def leaf_of(path: str, shape: tuple[int, ...], dtype: Any, storage: Storage) -> Leaf:
    """The format of one array, by its shape."""
    size = math.prod(shape)
    if size == 0:
        return Leaf(path, shape, dtype, "exact", "empty")
    if size < storage.min_size:
        return Leaf(
            path, shape, dtype, "exact", f"{size} elements, fewer than min_size={storage.min_size}"
        )

    split = _split(shape)
    rows, columns = math.prod(shape[:split]), math.prod(shape[split:])
    transposed = columns < rows
    groups, lanes = (columns, rows) if transposed else (rows, columns)
    tiles = -(-groups // GROUP) * -(-lanes // LANES)
    waste = 1 - size / (tiles * TILE)
    if groups >= GROUP and waste <= MAX_WASTE:
        kind, reason = (
            "tiled",
            f"groups along the {'columns' if transposed else 'rows'} of {rows} x {columns}",
        )
    else:
        kind, reason = "flat", f"shorter axis of {groups}, less than a group of {GROUP}"
        if groups % GROUP == 0:
            kind, reason = "folded", f"tiles of {rows} x {columns} would waste {waste:.0%}"
        elif groups > GROUP:
            reason = (
                f"tiles of {rows} x {columns} would waste {waste:.0%}, and {groups} is no multiple "
                f"of {GROUP}"
            )
        if kind == "flat":
            transposed = True
        groups, lanes = GROUP, -(-size // GROUP)
        tiles = -(-lanes // LANES)
    return Leaf(
        path,
        shape,
        dtype,
        kind,
        reason,
        split,
        groups,
        lanes,
        transposed,
        align(tiles, storage),
    )


def _split(shape: tuple[int, ...]) -> int:
    """How many axes make the rows: the matrix nearest to a square; of two, the one of more rows."""
    splits = range(len(shape) - 1, 0, -1)
    return min(splits, key=lambda k: max(math.prod(shape[:k]), math.prod(shape[k:])), default=0)


def align(tiles: int, storage: Storage) -> int:
    """So many tiles, rounded up to what the storage's alignment asks for."""
    alignment = storage.row_alignment or 1
    return -(-tiles // alignment) * alignment
