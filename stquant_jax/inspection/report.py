"""What is stored where, and why: `plan` before training, `report` during it."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from stquant_jax.backends import settle
from stquant_jax.engine.checks import check_mask, check_precision
from stquant_jax.engine.finding import find
from stquant_jax.engine.planning import (
    capacity_for,
    layout_for,
    restarted,
    rows_and_rest,
    schedule_bytes,
    slots_for,
)
from stquant_jax.engine.state_checks import check_concrete
from stquant_jax.inspection.tables import LeafReport, Report
from stquant_jax.precision import Budget, Policy
from stquant_jax.sharding.specs import Sharding, sharding_for
from stquant_jax.storage import arena as rows
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.paths import masked, unboxed
from stquant_jax.storage.settings import Storage


def plan(
    params: Any,
    precision: Policy = Budget(5.0),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
    *,
    mask: Any = None,
) -> Report:
    """What the state of these parameters will hold: bytes per leaf and device, and why each leaf
    got its format.

    Args:
      params: arrays or ShapeDtypeStructs; nothing is allocated on a device.
      precision, storage, sharding: as for `scale_by_adam_q`.
      mask: as for `optax.masked`, a tree of booleans or a function of the parameters that returns
        one: the parameters of this optimizer, where others have other ones.

    Raises:
      ValueError: as `scale_by_adam_q` and its ``init``.
    """
    check_precision(precision, storage)
    check_mask(mask)
    params = unboxed(params)
    here = sharding_for(params, sharding)
    layout = layout_for(masked(params, mask), precision, storage, here)
    whole = layout_for(params, precision, storage, here)
    free, small = rows_and_rest(layout, precision)
    widths = precision.first_widths(slots_for(layout, precision), free)
    report = _report(
        layout, widths, capacity_for(layout, precision), schedule_bytes(layout, precision), storage
    )
    return replace(report, small_bytes=small, others=whole.size - layout.size)


def report(
    state: Any,
    params: Any,
    precision: Policy = Budget(),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
    *,
    mask: Any = None,
) -> Report:
    """What a state holds now: widths and bytes of every leaf, on each device.

    Args:
      state: a concrete `ScaleByAdamQState`, or an optimizer's state that holds one.
      params: arrays or ShapeDtypeStructs; shapes only.
      precision, storage, sharding: those the optimizer was made with; of the first only pins
        matter, and the first plan of a state that was reset to zeros.
      mask: as for `plan`.

    Raises:
      ValueError: the state was built for other parameters or another storage, is traced, or holds
        no `ScaleByAdamQState`, or several.
    """
    check_mask(mask)
    advice = "; where it is for part of them, pass mask="
    _, own, _, layout, _ = find(state, params, precision, storage, sharding, mask, advice)
    check_concrete(own, "report")
    state = restarted(own, layout, precision)
    schedule = sum(x.nbytes for x in jax.tree.leaves((state.count, state.precision)))
    schedule += 8 * (layout.exact_columns - layout.exact_size)
    tally = state.precision.tally  # of which each device has its own
    schedule -= tally.digits.nbytes - tally.digits.nbytes // layout.devices
    widths = np.asarray(state.precision.plan.widths)
    capacity = state.arena.shape[0] // layout.devices
    return _report(layout, widths, capacity, schedule, storage)


def _report(
    layout: Layout, widths: np.ndarray, capacity: int, schedule_bytes: int, storage: Storage
) -> Report:
    pairs = iter(widths.reshape(-1, 2).tolist())
    leaves = []
    for leaf in layout.leaves:
        mu, nu = next(pairs) if leaf.tiles else (32, 32)
        size = (
            leaf.tiles * (rows.TILE_SCALE_BYTES + rows.ROW_BYTES * (mu + nu))
            if leaf.tiles
            else 8 * leaf.size
        )
        where = leaf.path, leaf.whole.shape, leaf.shape, leaf.all_axes
        leaves.append(LeafReport(*where, leaf.kind, leaf.reason, mu, nu, size))
    used = int(np.sum(widths * rows.slot_tiles(layout)))
    return Report(
        tuple(leaves),
        schedule_bytes,
        (capacity - used) * rows.ROW_BYTES,
        rows.reference_bytes(layout),
        str(settle(storage).backend),
        layout.devices,
    )
