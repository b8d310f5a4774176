"""The TPU backend: a kernel for each leaf, in the leaves' order, the arena handed from one to the
next."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels import tpu
from stquant_jax.backends.block import slot_numbers, terms_of_sample
from stquant_jax.precision import Plan, Sums
from stquant_jax.precision.tally import by_leaf, no_sums
from stquant_jax.rules.adam import Adam, AdamScalars
from stquant_jax.rules.apply import Apply
from stquant_jax.storage import arena as rows
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.planes import GROUP
from stquant_jax.storage.settings import Storage

# The identity, where a program is lowered for a TPU. What it is traced for is not known earlier.
_on_tpu = Primitive("stquant_on_tpu")
_on_tpu.def_abstract_eval(lambda x: x)
_on_tpu.def_impl(jax.jit(_on_tpu.bind))
mlir.register_lowering(_on_tpu, lambda _, x: [x], platform="tpu")


def _refuse(context: Any, x: Any) -> Any:
    platforms = ", ".join(context.module_context.platforms)
    raise ValueError(
        f"Storage(backend='pallas_tpu') cannot run on {platforms}: expected a TPU, or to be "
        "compiled for one; backend=None or 'xla', or interpret=True to debug the kernels"
    )


mlir.register_lowering(_on_tpu, _refuse)


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
    if not layout.quantized:
        return [], packed, no_sums(0)
    count = count if storage.interpret else _on_tpu.bind(count)
    tables = tpu.Tables.of(
        layout,
        storage,
        scalars,
        count,
        rows.offsets(plan.widths, layout),
        plan.widths,
        *slot_numbers(plan, scalars, count),
        *((apply.rate, apply.decay) if apply else ()),
    )
    # As the kernel reads them, a chunk's in one row: bytes are not stored apart on a TPU.
    shape = layout.tiles // tpu.CHUNK, 1, tpu.CHUNK * GROUP
    stored = packed._replace(nu_row=packed.nu_row.astype(jnp.int32).reshape(shape))
    results, sums = [], []
    for i, (leaf, g) in enumerate(zip(layout.quantized, grads, strict=True)):
        chunks = tpu.Chunks.of(leaf)
        p = apply.params[i] if apply else None
        result, stored, part = tpu.update_leaf(
            rule,
            terms_of_sample,
            chunks,
            tpu.Tables(*(table[i : i + 1] for table in tables)),
            tpu.matrix_of(g, leaf, chunks.staged),
            stored,
            None if p is None else tpu.matrix_of(p, leaf, chunks.staged),
            stochastic=bool(apply and apply.rounds(apply.params[i])),
            interpret=storage.interpret,
        )
        results.append(tpu.leaf_of(result, leaf, chunks.staged))
        sums.append(part)
    nu_row = stored.nu_row.reshape(-1).astype(packed.nu_row.dtype)
    sums = jnp.concatenate(sums)[:, : len(Sums._fields)].swapaxes(0, 1)
    sums = sums.reshape(-1, layout.tiles) * weights[:, None]
    return results, stored._replace(nu_row=nu_row), by_leaf(sums, layout.tiles_of_leaves)
