"""The TPU backend: a kernel for each leaf, in the leaves' order, the arena handed from one to the
next."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tpu
from stquant_jax import arena as rows
from stquant_jax.apply import Apply
from stquant_jax.backends.fused import Codes, slot_numbers, update_block
from stquant_jax.codecs import Lattice, Levels, Ops
from stquant_jax.layout import Layout, Storage
from stquant_jax.noise import keys_of
from stquant_jax.planes import GROUP
from stquant_jax.precision import Plan, Sums
from stquant_jax.rules import Adam, AdamScalars


@dataclass(frozen=True)
class Body:
    """A tile's arithmetic, from a flat list of numbers; equal for equal rules, so that leaves of
    one shape share a kernel."""

    rule: Adam

    def __call__(self, numbers, g, codes, valid, noise, turn, row):
        first, second, end = np.cumsum([len(x._fields) for x in (AdamScalars, Levels, Lattice)])
        scalars, lev = AdamScalars._make(numbers[:first]), Levels._make(numbers[first:second])
        lat, codes = Lattice._make(numbers[second:end]), Codes._make(codes)
        return update_block(
            self.rule, scalars, g, codes, valid, lev, lat, noise, turn, Ops(row=row)
        )


def step(
    layout: Layout,
    storage: Storage,
    rule: Adam,
    scalars: AdamScalars,
    count: jax.Array,
    grads: list[jax.Array],
    packed: rows.Packed,
    plan: Plan,
    apply: Apply | None = None,
) -> tuple[list[jax.Array], rows.Packed, Sums]:
    """As `stquant_jax.backends.xla.step`."""
    if not layout.quantized:
        return [], packed, Sums(*jnp.zeros((len(Sums._fields), 0), jnp.float32))
    offsets = rows.offsets(plan.widths, layout)
    lev, lat = slot_numbers(plan)
    chunks_in_all = layout.tiles // tpu.CHUNK
    stored = tpu.Buffers(
        packed.arena,
        packed.mu_scale,
        packed.nu_scale,
        # As the kernel reads them, a chunk's in one row: bytes are not stored apart on a TPU.
        packed.nu_row.astype(jnp.int32).reshape(chunks_in_all, 1, tpu.CHUNK * GROUP),
    )
    results, sums = [], []
    for i, (leaf, g) in enumerate(zip(layout.quantized, grads, strict=True)):
        mu, nu = 2 * i, 2 * i + 1
        floats = [*scalars, *(x[i] for x in (*lev, *lat))]
        if apply is not None:
            floats += [apply.rate, apply.decay[i]]
        numbers = tpu.Numbers(
            first_chunk=jnp.int32(layout.first_tile[i] // tpu.CHUNK),
            mu_row=offsets[mu],
            nu_row=offsets[nu],
            mu_width=plan.widths[mu],
            nu_width=plan.widths[nu],
            turn=count % GROUP,
            keys=keys_of(storage.seed, jnp.int32(i), count),
            floats=jnp.stack([jnp.float32(x) for x in floats]),
        )
        chunks = tpu.Chunks.of(leaf)
        param = apply.params[i] if apply else None
        result, stored, terms = tpu.update_leaf(
            Body(rule),
            chunks,
            numbers,
            chunks.matrix(g, leaf),
            stored,
            None if param is None else chunks.matrix(param, leaf),
            stochastic=bool(apply and apply.rounds(apply.params[i])),
            interpret=storage.interpret,
        )
        results.append(chunks.leaf(result, leaf))
        sums.append(jnp.sum(terms, axis=-1))
    packed = rows.Packed(
        stored.arena,
        stored.mu_scale,
        stored.nu_scale,
        stored.nu_row.reshape(-1).astype(packed.nu_row.dtype),
    )
    return results, packed, Sums(*jnp.stack(sums, axis=-1)[: len(Sums._fields)])
