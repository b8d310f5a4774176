"""One kernel per quantized leaf, everything that is stored updated in place.

Leaves of one geometry share one traced and lowered function: what differs between them, and from
step to step, are numbers in three small tables.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import floor
from pallas_kernels.gpu.geometry import Geometry, Scalars, Scratch, Stored
from pallas_kernels.gpu.kernel import Terms, update_tile
from pallas_kernels.gpu.lanes import COMPILER_PARAMS
from stquant_jax.apply import Apply
from stquant_jax.codecs import Lattice, Levels
from stquant_jax.layout import Layout, Leaf, Storage, from_tiles, to_tiles
from stquant_jax.noise import Keys, keys_of
from stquant_jax.planes import GROUP, LANES
from stquant_jax.rules import Adam, AdamScalars

SUMS = 16  # statistics of a tile, or fewer


class Tables(NamedTuple):
    """`Scalars` of all leaves, a row for each."""

    whole: jax.Array  # int32[leaves, 6]
    keys: jax.Array  # uint32[leaves, 5]
    real: jax.Array  # float32[leaves, 17]

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
        keys = jax.vmap(lambda leaf: keys_of(storage.seed, leaf, count))(leaves)

        def table(values, dtype):
            columns = (jnp.broadcast_to(jnp.asarray(x, dtype), leaves.shape) for x in values)
            return jnp.stack(list(columns), axis=1)

        return cls(
            table((count % GROUP, *spans, jnp.array(layout.first_tile)), jnp.int32),
            table(keys, jnp.uint32),
            table((*scalars, *lev, *lat, rate, decay), jnp.float32),
        )

    def row(self, leaf: jax.Array) -> Scalars:
        """One leaf's, in the kernel, where the tables are references."""
        numbers: Any = iter(table[leaf, k] for table in self for k in range(table.shape[1]))

        def take(like):
            return like(*(next(numbers) for _ in like._fields))

        whole = [next(numbers) for _ in range(self.whole.shape[1])]
        parts = [take(like) for like in (Keys, AdamScalars, Levels, Lattice)]
        return Scalars(*whole, *parts, *numbers)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _update_leaf(
    geometry: Geometry,
    terms: Terms,
    interpret: Any,
    leaf: jax.Array,
    tables: Tables,
    gradients: jax.Array,
    params: jax.Array | None,
    stored: Stored,
) -> tuple[jax.Array, Stored, jax.Array]:
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
    stored: Stored,
    apply: Apply | None = None,
    interpret: Any = False,
) -> tuple[list[jax.Array], Stored, list[jax.Array]]:
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
    floor.ensure()
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
            _matrix(g, leaf, geometry),
            None if p is None else _matrix(p, leaf, geometry),
            stored,
        )
        if geometry.staged:
            x = from_tiles(x.reshape(-1, GROUP, LANES), leaf)
        results.append(x.reshape(leaf.shape))
        sums.append(part)
    return results, stored, sums


def _matrix(x: jax.Array, leaf: Leaf, geometry: Geometry) -> jax.Array:
    """A leaf as its kernel takes it."""
    return to_tiles(x, leaf).reshape(-1, LANES) if geometry.staged else x.reshape(-1, x.shape[-1])
