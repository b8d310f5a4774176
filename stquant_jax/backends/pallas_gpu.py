"""The GPU backend: Mosaic kernels of `pallas_kernels.gpu`, one launch per quantized leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from stquant_jax import arena as rows
from stquant_jax.backends.fused import Sample, terms_of
from stquant_jax.layout import Layout, Storage
from stquant_jax.precision import Plan, Sums
from stquant_jax.rules import Adam, AdamScalars


def _terms(sample, rule, scalars, lev, lat):
    return terms_of(Sample(**sample), rule, scalars, lev, lat)


def step(
    layout: Layout,
    storage: Storage,
    rule: Adam,
    scalars: AdamScalars,
    count: jax.Array,
    grads: list[jax.Array],
    packed: rows.Packed,
    plan: Plan,
    interpret: Any = None,
) -> tuple[list[jax.Array], rows.Packed, Sums]:
    """As `xla.step`."""
    if not layout.quantized:
        return [], packed, Sums(*jnp.zeros((len(Sums._fields), 0), jnp.float32))
    tables = gpu.Tables.of(
        layout,
        storage,
        scalars,
        count,
        rows.offsets(plan.widths, layout),
        plan.widths,
        plan.windows,
        plan.shrinkage,
    )
    updates, stored, tile_sums = gpu.update(
        layout, rule, _terms, tables, grads, gpu.Stored(*packed), interpret
    )
    sums = jnp.stack([jnp.sum(part[:, : len(Sums._fields)], axis=0) for part in tile_sums])
    return updates, rows.Packed(*stored), Sums(*sums.T)
