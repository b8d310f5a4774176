"""One kernel per quantized leaf, everything that is stored updated in place.

Leaves of one geometry share one traced and lowered function.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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


@partial(jax.jit, static_argnums=(0, 1, 2))
def _update_leaf(
    geometry: Geometry,
    terms: Terms,
    interpret: Any,
    leaf: jax.Array,
    tables: Tables,
    gradients: jax.Array,
    params: jax.Array | None,
    stored: Packed,
) -> tuple[jax.Array, Packed, jax.Array]:
    """Updates of a leaf's matrix or its new parameters, what is stored of all leaves, and sums."""

    def body(leaf, whole, keys, real, gradients, *refs):
        out, sums, *scratch = refs if in_place is None else (in_place, *refs)
        s = Tables(whole, keys, real).row(leaf[0])
        update_tile(geometry, terms, s, gradients, out, sums, kept, Scratch.of(*scratch))

    kept, in_place = jax.tree.map(
        lambda x: jax.new_ref(x, memory_space=plgpu.GMEM), (stored, params)
    )
    sums = jax.ShapeDtypeStruct((geometry.tiles, SUMS), jnp.float32)
    update = jax.ShapeDtypeStruct(gradients.shape, gradients.dtype)
    *update, sums = plgpu.kernel(
        body,
        out_type=(update, sums) if params is None else (sums,),
        scratch_types=Scratch.types(geometry),
        grid=(geometry.tiles,),
        grid_names=("tile",),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )(leaf, *tables, gradients)
    kept, new = jax.tree.map(jax.freeze, (kept, in_place))
    return update[0] if params is None else new, kept, sums


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
    results, sums = [], []
    for i, (leaf, g) in enumerate(zip(layout.quantized, grads, strict=True)):
        p = None if apply is None else apply.params[i]
        rounds = apply is not None and apply.rounds(apply.params[i])
        geometry = Geometry.of(leaf, rule, g.dtype, None if p is None else p.dtype, rounds)
        x, stored, part = _update_leaf(
            geometry,
            terms,
            interpret or None,
            jnp.full(1, i, jnp.int32),
            tables,
            matrix_of(g, leaf, geometry.staged),
            None if p is None else matrix_of(p, leaf, geometry.staged),
            stored,
        )
        results.append(leaf_of(x, leaf, geometry.staged))
        sums.append(part)
    return results, stored, sums
