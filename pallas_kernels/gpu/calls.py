"""Everything that is stored is updated in place, by one launch for up to sixteen leaves of one
geometry: a leaf alone may have fewer tiles than a card takes at once, or a few more.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.geometry import Geometry, Scratch
from pallas_kernels.gpu.instructions import ensure_floor
from pallas_kernels.gpu.kernel import Terms, update_tile
from pallas_kernels.gpu.lanes import COMPILER_PARAMS
from pallas_kernels.leaves import SUMS, Tables, leaf_of, matrix_of
from stquant_jax.rules.adam import Adam
from stquant_jax.rules.apply import Apply
from stquant_jax.storage.arena import Packed
from stquant_jax.storage.layout import Layout

_MOST = 16  # leaves of a launch: each has its own places in the kernel's code to fetch and store


@partial(jax.jit, static_argnums=(0, 1, 2))
def _update_leaves(
    geometry: Geometry,
    terms: Terms,
    interpret: Any,
    leaves: jax.Array,
    tables: Tables,
    gradients: list[jax.Array],
    params: list[jax.Array] | None,
    stored: Packed,
) -> tuple[list[jax.Array], Packed, jax.Array]:
    """Updates of the leaves' matrices or their new parameters, what is stored of all leaves, and
    sums of their tiles. ``leaves`` are int32 indices."""
    n = len(gradients)

    def body(leaves, whole, keys, real, *refs):
        gradients, refs = refs[:n], refs[n:]
        out, refs = (refs[:n], refs[n:]) if in_place is None else (in_place, refs)
        sums, *scratch = refs
        at = lax.axis_index("tile")
        which = at // geometry.tiles
        s = Tables(whole, keys, real).row(leaves[which])
        tile = at - which * geometry.tiles
        update_tile(
            geometry, terms, s, which, tile, gradients, out, sums.at[at], kept, Scratch.of(*scratch)
        )

    kept, in_place = jax.tree.map(
        lambda x: jax.new_ref(x, memory_space=plgpu.GMEM), (stored, params)
    )
    tiles = n * geometry.tiles
    sums = jax.ShapeDtypeStruct((tiles, SUMS), jnp.float32)
    updates = [jax.ShapeDtypeStruct(g.shape, g.dtype) for g in gradients]
    *updates, sums = plgpu.kernel(
        body,
        out_type=(*updates, sums) if params is None else (sums,),
        scratch_types=Scratch.types(geometry),
        grid=(tiles,),
        grid_names=("tile",),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )(leaves, *tables, *gradients)
    kept, new = jax.tree.map(jax.freeze, (kept, in_place))
    return updates if params is None else new, kept, sums


def _batches(geometries: list[Geometry]) -> list[list[int]]:
    """Leaves that are updated together, by their index: evenly, for each number is a kernel."""
    batches = []
    for geometry in dict.fromkeys(geometries):
        alike = [i for i, x in enumerate(geometries) if x == geometry]
        launches = -(-len(alike) // _MOST)
        most = -(-len(alike) // launches)
        batches += [alike[k : k + most] for k in range(0, len(alike), most)]
    return batches


def update(
    layout: Layout,
    rule: Adam,
    terms: Terms,
    tables: Tables,
    grads: list[jax.Array],
    stored: Packed,
    apply: Apply | None = None,
    interpret: Any = False,
) -> tuple[list[jax.Array], Packed, list[jax.Array]]:
    """One update of all quantized leaves.

    Args:
      terms: from a sample of elements (a dict), the rule, its scalars, levels and lattice to what
        each element adds to the statistics: at most 16 vectors.
      grads, and the parameters of ``apply``: float32, bfloat16 or float16.
      interpret: run on a CPU; True, or `plgpu.InterpretGPUParams`.

    Returns:
      Updates, or new parameters where they are applied; what is stored; and for each leaf the
      statistics of its tiles, float32[tiles, 16].
    """
    ensure_floor()
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]
    params: list[Any] = [None] * len(grads) if apply is None else apply.params
    rounded = [False] * len(grads) if apply is None else apply.rounded
    geometries = [
        Geometry.of(leaf, rule, g.dtype, None if p is None else p.dtype, rounds)
        for leaf, g, p, rounds in zip(layout.quantized, grads, params, rounded, strict=True)
    ]
    results: dict[int, jax.Array] = {}
    sums: dict[int, jax.Array] = {}
    for batch in _batches(geometries):
        geometry = geometries[batch[0]]

        def matrices(arrays, batch=batch, staged=geometry.staged):
            return [matrix_of(arrays[i], layout.quantized[i], staged) for i in batch]

        xs, stored, parts = _update_leaves(
            geometry,
            terms,
            interpret or None,
            jnp.array(batch, jnp.int32),
            tables,
            matrices(grads),
            None if apply is None else matrices(params),
            stored,
        )
        for i, x, part in zip(batch, xs, jnp.split(parts, len(batch)), strict=True):
            results[i] = leaf_of(x, layout.quantized[i], geometry.staged)
            sums[i] = part
    leaves = range(len(grads))
    return [results[i] for i in leaves], stored, [sums[i] for i in leaves]
