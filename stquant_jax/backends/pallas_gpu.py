"""The GPU backend: Mosaic kernels of `pallas_kernels.gpu`, a launch for up to sixteen
leaves of one geometry."""

import jax
import jax.numpy as jnp

from stquant_jax.backends.block import slot_numbers, terms_of_sample
from stquant_jax.precision import Plan, Sums
from stquant_jax.precision.tally import by_leaf, no_sums
from stquant_jax.rules.adam import Adam, AdamScalars
from stquant_jax.rules.apply import Apply, apply_quantized
from stquant_jax.storage import arena as rows
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.settings import Storage

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)  # that the kernels read and write


def unsupported() -> str | None:
    """Why the kernels cannot be built here, if they cannot. No device is asked for."""
    if jax.__version_info__ < (0, 11):
        return f"it needs jax 0.11 or newer, on Python 3.12 or newer; this is {jax.__version__}"
    return None


def step(
    layout: Layout,
    storage: Storage,
    rule: Adam,
    scalars: AdamScalars,
    count: jax.Array,
    grads: list[jax.Array],
    packed: rows.Packed,
    plan: Plan,
    weights: jax.Array,
    apply: Apply | None = None,
) -> tuple[list[jax.Array], rows.Packed, jax.Array]:
    """As `stquant_jax.backends.xla.step`."""
    from pallas_kernels import gpu  # of what it imports, older versions of JAX lack some

    if not layout.quantized:
        return [], packed, no_sums(0)
    inside = apply is None or all(p.dtype in DTYPES for p in apply.params)
    kept = [g if g.dtype in DTYPES and inside else g.astype(jnp.float32) for g in grads]
    tables = gpu.Tables.of(
        layout,
        storage,
        scalars,
        count,
        rows.offsets(plan.widths, layout),
        plan.widths,
        *slot_numbers(plan, scalars, count),
        *((apply.rate, apply.decay) if apply else ()),
    )
    updates, packed, tile_sums = gpu.update(
        layout,
        rule,
        terms_of_sample,
        tables,
        kept,
        packed,
        apply if inside else None,
        storage.interpret,
    )
    if apply is None:
        updates = [u.astype(g.dtype) for u, g in zip(updates, grads, strict=True)]
    elif not inside:
        updates = apply_quantized(layout, storage, count, updates, apply)
    sums = jnp.concatenate(tile_sums)[:, : len(Sums._fields)].T * weights[:, None]
    return updates, packed, by_leaf(sums, layout.tiles_of_leaves)
