"""What a kernel is made for: static geometry, and the shared memory of a tile."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.folding import BLOCK, PARTS
from pallas_kernels.gpu.windows import ALIGNMENT, Window
from stquant_jax.rules.adam import Adam
from stquant_jax.storage.layout import Leaf
from stquant_jax.storage.places import Place
from stquant_jax.storage.planes import GROUP, LANES, PLANES


@dataclass(frozen=True)
class Geometry:
    """What is static of a leaf's kernel. Leaves of one geometry share it."""

    tiles: int
    bands: int
    place: Place
    ragged: bool  # some groups are only partly filled
    staged: bool  # the leaf comes as a matrix [tiles * 32, 128], tile below tile
    rule: Adam
    gradients: Window
    params: Window | None  # that updates are applied to, if they are
    rounds: bool  # parameters are rounded stochastically

    @property
    def out(self) -> Window:
        """Of what the kernel puts out: updates or new parameters."""
        return self.params or self.gradients

    @classmethod
    def of(
        cls, leaf: Leaf, rule: Adam, gradients: Any, params: Any = None, rounds: bool = False
    ) -> "Geometry":
        """``gradients`` and ``params`` are dtypes.

        A leaf is updated where it is if its rows are aligned as the copy engine needs them.
        """
        dtypes = [jnp.dtype(x) for x in (gradients, params) if x is not None]
        aligned = all(leaf.matrix[1] * dtype.itemsize % ALIGNMENT == 0 for dtype in dtypes)
        staged = leaf.kind != "tiled" or not aligned
        windows = [Window(dtype, leaf.transposed and not staged) for dtype in dtypes]
        return cls(
            leaf.tiles,
            leaf.bands,
            Place.of(leaf),
            leaf.ragged,
            staged,
            rule,
            windows[0],
            windows[1] if len(windows) > 1 else None,
            rounds,
        )


class Scratch(NamedTuple):
    """Shared memory of a tile."""

    gradients: Any
    out: Any  # in the memory of the gradients, unless the rule asks for both at once
    mu: Any  # float32[32, 128]: mu, then mu over roots
    v: Any  # `BLOCK`: v, then its parts of the groups' energies
    shapes: Any  # `BLOCK`: old roots squared, the same for these; nu's new codes
    roots: Any  # float32[128]: of the tile's old rows
    row_codes: Any  # uint8[128], 32 of them used: the rows, before and after, in their place
    mu_words: Any  # uint32[8, 128]
    of_rows: Any  # float32[4, 128]: numbers of the tile's rows; this and parts while mu is decoded
    parts: Any  # two of `PARTS`
    nu_words: Any  # uint32[8, 128]
    arrived: Any  # barrier of gradients and rows
    params_arrived: Any  # barrier

    @classmethod
    def types(cls, geometry: Geometry) -> tuple[Any, ...]:
        """What to allocate."""
        gradients, out = geometry.gradients.scratch, geometry.out.scratch
        if geometry.gradients == geometry.out and not _both(geometry):
            held: Any = (gradients,)
        else:
            held = (gradients, out) if _both(geometry) else plgpu.RefUnion(gradients, out)
        words, f32 = plgpu.SMEM((PLANES, LANES), jnp.uint32), jnp.float32
        parts = plgpu.SMEM(PARTS, f32)
        return (
            held,
            plgpu.SMEM((GROUP, LANES), f32),
            plgpu.SMEM((2, *BLOCK), f32),  # in one: every array has whole kilobytes
            plgpu.RefUnion(plgpu.SMEM((LANES,), f32), plgpu.SMEM((LANES,), jnp.uint8)),
            plgpu.RefUnion(words, plgpu.SMEM((4, LANES), f32), [parts, parts]),
            words,
            plgpu.Barrier(num_arrivals=geometry.gradients.copies + 1),
            plgpu.Barrier(num_arrivals=geometry.out.copies),
        )

    @classmethod
    def of(cls, held: Any, *others: Any) -> "Scratch":
        """From references to what `types` lists."""
        held = tuple(held)
        mu, blocks, rows, words, *rest = others
        return cls(held[0], held[-1], mu, blocks.at[0], blocks.at[1], *rows, *words, *rest)


def _both(geometry: Geometry) -> bool:
    """Whether gradients are still asked for when parameters are there."""
    return geometry.params is not None and geometry.rule.nesterov
