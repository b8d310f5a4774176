"""From one policy or budget to another in the middle of a run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from stquant_jax.backends.repack import repack
from stquant_jax.engine.finding import find, replaced
from stquant_jax.engine.planning import capacity_for, rows_for, slots_for
from stquant_jax.engine.state import (
    ScaleByAdamQState,
    is_state,
    packed_of,
    packed_specs,
    state_specs,
)
from stquant_jax.engine.state_checks import check_concrete
from stquant_jax.engine.transform import scale_by_adam_q
from stquant_jax.precision import Policy, PrecisionState
from stquant_jax.precision.policy import plan_with
from stquant_jax.precision.slots import MU, NU
from stquant_jax.precision.statistics import forget
from stquant_jax.sharding.devices import mesh_of, per_device, shardings
from stquant_jax.sharding.specs import Sharding
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.settings import Storage


def resize(
    state: Any,
    params: Any,
    precision: Policy,
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> Any:
    """The same moments in an arena of another size: go on with an optimizer of another policy.

    What grows loses nothing, decoded moments stay the same to the bit; what shrinks is rounded
    anew. Slots keep their windows, also under a `Fixed` that names another: it is for their first
    codes. Statistics are renewed and go on, but for the averages of leaves that changed.

    Args:
      state: a `ScaleByAdamQState`, or an optimizer's state that holds one; concrete, on the host.
      params: arrays or ShapeDtypeStructs; shapes only.
      precision: the policy to go on with. Its pins to "exact" must be those so far.
      storage, sharding: those the optimizer was made with.

    Returns:
      ``state`` with the `ScaleByAdamQState` in it replaced. The next update, by an optimizer made
      with ``precision``, compiles anew.

    Raises:
      ValueError: a budget below the floor; a state for other parameters, another storage or other
        exact leaves; a traced one; one that holds no `ScaleByAdamQState`, or several.

    Examples:
      >>> import jax, jax.numpy as jnp, stquant_jax as stquant
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> state = stquant.adamw(1e-3, precision=stquant.Budget(5.0)).init(params)
      >>> state = resize(state, params, stquant.Budget(6.0))
      >>> tx = stquant.adamw(1e-3, precision=stquant.Budget(6.0))  # goes on with it
      >>> 5.9 < stquant.report(state, params).bits <= 6.0
      True
    """
    state, old, params, layout, here = find(state, params, precision, storage, sharding)
    check_concrete(old, "resize")
    if np.any(old.precision.plan.widths) or not layout.quantized:
        new: Any = _resized(old, layout, precision, storage, here)
    else:  # reset to zeros, as good as new
        new = scale_by_adam_q(precision=precision, storage=storage, sharding=here).init(params)
    return replaced(state, is_state, new)


def _resized(
    old: ScaleByAdamQState,
    layout: Layout,
    precision: Policy,
    storage: Storage,
    sharding: Sharding | None,
) -> ScaleByAdamQState:
    capacity, slots = capacity_for(layout, precision), slots_for(layout, precision)
    widths, windows, shrinkage = map(np.asarray, old.precision.plan)
    # what is pinned now may not have been before
    new_widths = precision.refit(slots, rows_for(layout, precision), slots.pinned(widths)).astype(
        np.int32
    )
    nu = slots.moment == NU
    first_codes = nu & (widths == 0) & (new_widths > 0)
    new_windows = np.where(first_codes, precision.first_windows(new_widths), windows)
    plan = plan_with(slots.moment, new_widths, new_windows)
    shrinkage = jnp.where(new_widths == widths, shrinkage, plan.shrinkage)
    plan = plan._replace(shrinkage=shrinkage)

    room = max(capacity, old.arena.shape[0] // layout.devices)  # both plans fit

    def move(packed, count, old_plan):
        spare = room - packed.arena.shape[0]
        packed = packed._replace(arena=jnp.pad(packed.arena, ((0, spare), (0, 0))))
        packed = repack(layout, storage, count, packed, old_plan, plan)
        return packed._replace(arena=packed.arena[:capacity])

    packed = packed_of(old)
    own = packed_specs(layout.axes)
    moved = jax.jit(per_device(move, mesh_of(sharding), (own, P(), P()), own))
    packed = moved(packed, old.count, old.precision.plan)

    changed = (new_widths != widths) | (new_windows != windows)
    # Nothing of the old codes stays in the tally.
    _, observed, tally, _ = old.precision.renewed(old.count)
    observed = forget(observed, jnp.asarray(changed[MU::2] | changed[NU::2]))
    schedule = PrecisionState(plan, observed, tally, precision.first_memory(slots))
    new = ScaleByAdamQState(old.count, *packed, exact=old.exact, precision=schedule)
    if sharding is None:
        return new
    return jax.device_put(new, shardings(sharding.mesh, state_specs(layout), new))
