"""One device's part of a leaf: its tiles, and where they lie in the leaf.

Which elements make a group is decided by the whole leaf. A part that is cut between tiles has the
leaf's own tiles, and whatever is computed of them is the same as on one device. A part that cuts
through tiles is laid out as if it were a leaf itself, and its bits depend on the division.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stquant_jax.storage.layout import Cut, Leaf, align, leaf_of
from stquant_jax.storage.planes import GROUP, LANES, TILE
from stquant_jax.storage.settings import Storage

Axes = tuple[tuple[str, ...], ...]


def part_of(leaf: Leaf, axes: Axes, sizes: Mapping[str, int], storage: Storage) -> Leaf:
    """One device's part of a leaf.

    Args:
      leaf: the whole one.
      axes: of the mesh, by which each axis of the leaf is divided.
      sizes: of the mesh's axes.

    Raises:
      ValueError: an axis of the leaf does not divide evenly.
    """
    parts = tuple(math.prod(sizes[name] for name in names) for names in axes)
    for i, (size, n, names) in enumerate(zip(leaf.shape, parts, axes, strict=True)):
        if size % n:
            raise ValueError(
                f"specs divide axis {i} of leaf {leaf.path!r}, shape {leaf.shape}, along mesh axes "
                f"{names} into {n} parts: expected a divisor of {size}"
            )
    shape = tuple(size // n for size, n in zip(leaf.shape, parts, strict=True))
    cut = Cut(leaf.shape, axes, parts, tiles=leaf.tiles)
    if not leaf.tiles:
        return replace(leaf, shape=shape, cut=cut)
    of_kind = {"tiled": _tiled, "folded": _folded, "flat": _flat}[leaf.kind]
    return of_kind(leaf, shape, cut, storage) or _torn(leaf, shape, cut, storage)


class _Side(NamedTuple):
    """What a part has of one side of the matrix, in elements."""

    size: int  # of the whole leaf
    length: int
    run: int  # consecutive ones
    gap: int  # from the end of a run to the next
    steps: tuple[int, ...]  # from part to part, by axis

    def between(self, unit: int) -> bool:
        """It is cut between units of so many elements."""
        return self.run == self.size or self.run % unit == 0


def _side(sizes: Sequence[int], parts: Sequence[int]) -> _Side | None:
    """None where runs are not at equal distances."""
    size = math.prod(sizes)
    steps = tuple(sizes[i] // n * math.prod(sizes[i + 1 :]) for i, n in enumerate(parts))
    divided = [i for i, n in enumerate(parts) if n > 1]
    if not divided:
        return _Side(size, size, size, 0, steps)
    *outer, last = divided
    if any(math.prod(sizes[:i]) > 1 for i in outer):
        return None
    length, run = size // math.prod(parts), steps[last]
    gap = run * (parts[last] - 1) if length > run else 0
    return _Side(size, length, run, gap, steps)


def _sides(leaf: Leaf, cut: Cut) -> tuple[_Side, _Side] | None:
    """The group side and the lane side."""
    rows, columns = (
        _side(leaf.shape[part], cut.parts[part])
        for part in (slice(0, leaf.split), slice(leaf.split, None))
    )
    if rows is None or columns is None:
        return None
    groups, lanes = (columns, rows) if leaf.transposed else (rows, columns)
    return (groups, lanes) if groups.between(GROUP) else None


def _steps(leaf: Leaf, groups: _Side, lanes: _Side) -> tuple[int, ...]:
    """Groups from part to part, by axis."""
    across = tuple(step // GROUP * lanes.size for step in groups.steps)
    return lanes.steps + across if leaf.transposed else across + lanes.steps


def _tiled(leaf: Leaf, shape: tuple[int, ...], cut: Cut, storage: Storage) -> Leaf | None:
    sides = _sides(leaf, cut)
    if not sides or not sides[1].between(LANES):
        return None
    groups, lanes = sides
    cut = replace(
        cut,
        steps=_steps(leaf, groups, lanes),
        lanes=lanes.size,
        band_run=_units(groups.run, GROUP),
        band_gap=groups.gap // GROUP,
        tile_run=_units(lanes.run, LANES),
        lane_gap=lanes.gap,
    )
    tiles = align(_units(groups.length, GROUP) * _units(lanes.length, LANES), storage)
    return replace(
        leaf,
        shape=shape,
        cut=cut,
        groups_along=groups.length,
        lanes_along=lanes.length,
        tiles=tiles,
    )


def _folded(leaf: Leaf, shape: tuple[int, ...], cut: Cut, storage: Storage) -> Leaf | None:
    """Bands lie side by side: a part is some of them, one after the other."""
    sides = _sides(leaf, cut)
    if not sides or sides[0].gap or sides[1].length < sides[1].size:
        return None
    groups, lanes = sides
    along = groups.length // GROUP * lanes.size
    return _in_a_row(leaf, shape, replace(cut, steps=_steps(leaf, groups, lanes)), along, storage)


def _flat(leaf: Leaf, shape: tuple[int, ...], cut: Cut, storage: Storage) -> Leaf | None:
    side = _side(leaf.shape, cut.parts)
    if side is None or side.gap or not side.between(TILE):
        return None
    cut = replace(cut, steps=tuple(step // GROUP for step in side.steps))
    return _in_a_row(leaf, shape, cut, _units(side.length, GROUP), storage)


def _in_a_row(
    leaf: Leaf, shape: tuple[int, ...], cut: Cut, lanes: int, storage: Storage
) -> Leaf | None:
    """A part of consecutive groups."""
    if lanes < leaf.lanes_along and lanes % LANES:
        return None
    tiles = align(_units(lanes, LANES), storage)
    return replace(leaf, shape=shape, cut=cut, lanes_along=lanes, tiles=tiles)


def _torn(leaf: Leaf, shape: tuple[int, ...], cut: Cut, storage: Storage) -> Leaf:
    """A part that is laid out as if it were a leaf; what is too small for that stays exact."""
    part = leaf_of(leaf.path, shape, leaf.dtype, storage)
    count = math.prod(cut.parts)
    note = (
        f"parts {'x'.join(map(str, shape))} of {'x'.join(map(str, leaf.shape))} are no whole tiles"
    )
    cut = replace(cut, tiles=part.tiles * count, whole=not part.tiles)
    if part.tiles:
        # Groups are numbered part after part.
        groups = part.lanes_along * part.bands
        ahead = [math.prod(cut.parts[i + 1 :]) * groups for i in range(len(shape))]
        cut = replace(cut, steps=tuple(ahead), lanes=part.lanes_along)
    return replace(part, cut=cut, reason=f"{note}: {part.reason}")


def _units(length: int, unit: int) -> int:
    return -(-length // unit)


def tile_order(part: Leaf) -> np.ndarray:
    """int[parts x tiles]: which tile of the whole leaf each part's are, part after part."""
    tile = np.arange(part.filled)
    cut = part.cut
    if cut is None:
        return tile
    index = np.indices(cut.parts).reshape(len(cut.parts), -1)
    start = np.array(cut.steps) @ index if cut.steps else np.zeros(1, int)
    if not cut.lanes or not cut.whole:  # consecutive
        ahead = start // LANES if cut.whole else np.arange(len(start)) * part.filled
        return (ahead[:, None] + tile).reshape(-1)
    bands = _units(part.whole.matrix[part.transposed], GROUP)
    lane_tile, band = np.divmod(tile, part.bands)
    lane_tile += lane_tile // cut.tile_run * (cut.lane_gap // LANES)
    band += band // cut.band_run * cut.band_gap
    first_band, first_lane = np.divmod(start, cut.lanes)
    ahead = first_lane // LANES * bands + first_band
    return (ahead[:, None] + lane_tile * bands + band).reshape(-1)
