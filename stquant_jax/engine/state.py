"""The state of `scale_by_adam_q`: its arrays, the first of them, and how they are divided."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stquant_jax.engine.planning import capacity_for, rows_for, slots_for
from stquant_jax.precision import Policy, PrecisionState
from stquant_jax.precision.tally import Tally
from stquant_jax.sharding.devices import spec_of
from stquant_jax.storage import arena as rows
from stquant_jax.storage.indexing import indexed
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.planes import GROUP, LANES


class ScaleByAdamQState(NamedTuple):
    """State of `scale_by_adam_q`: arrays only, so jit, scan, donation, tree maps and checkpoints
    need no special care.

    Sharded, every device has rows, tiles and exact moments of its own, and these arrays hold all
    devices', one after the other. The rest is the same on all.

    Attributes:
      count: int32[], updates done.
      arena: uint32[rows, 128], the codes of all quantized leaves as bit-planes.
      mu_scale: uint8[tiles, 128], one per group of 32.
      nu_scale: uint16[tiles, 128].
      nu_row: uint8[tiles * 32], one per row of a tile.
      exact: float32[2, n], mu and nu of the small leaves, one after the other; n is 1 if there are
        none.
      precision: the plan (widths and windows of all slots), statistics, the policy's memory.
    """

    count: jax.Array
    arena: jax.Array
    mu_scale: jax.Array
    nu_scale: jax.Array
    nu_row: jax.Array
    exact: jax.Array
    precision: PrecisionState


def is_state(x: Any) -> bool:
    """x is the state of `scale_by_adam_q` itself, not one that contains it."""
    return all(hasattr(x, field) for field in ScaleByAdamQState._fields)


def packed_of(state: Any) -> rows.Packed:
    """What a state has stored of the quantized leaves."""
    return rows.Packed(state.arena, state.mu_scale, state.nu_scale, state.nu_row)


def first_state(layout: Layout, precision: Policy) -> ScaleByAdamQState:
    """Of one device, after no update."""
    return ScaleByAdamQState(
        count=indexed(jnp.zeros((), jnp.int32), layout.tiles),
        arena=jnp.zeros((capacity_for(layout, precision), LANES), jnp.uint32),
        mu_scale=jnp.zeros((layout.tiles, LANES), rows.SCALE_DTYPES["mu"]),
        nu_scale=jnp.zeros((layout.tiles, LANES), rows.SCALE_DTYPES["nu"]),
        nu_row=jnp.zeros((layout.tiles * GROUP,), jnp.uint8),
        exact=jnp.zeros((len(rows.MOMENTS), layout.exact_columns), jnp.float32),
        precision=precision.init(slots_for(layout, precision), rows_for(layout, precision)),
    )


def state_specs(layout: Layout) -> ScaleByAdamQState:
    """How a state is divided among devices: a `PartitionSpec` for each field."""
    by_device: Any = spec_of((layout.axes,))
    same: Any = P()
    return ScaleByAdamQState(
        same,
        *packed_specs(layout.axes),
        exact=spec_of(((), layout.axes)),  # pyright: ignore[reportArgumentType]
        precision=PrecisionState(
            plan=same,
            observed=same,
            tally=Tally(by_device, same, same),
            memory=same,
        ),
    )


def packed_specs(axes: tuple[str, ...]) -> rows.Packed:
    """How all that is stored of the quantized leaves is divided, along these axes of the mesh."""
    by_device: Any = spec_of((axes,))
    return rows.Packed(by_device, by_device, by_device, by_device)
