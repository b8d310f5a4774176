"""Where an optimizer's state lies, for jit and for checkpointers."""

from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from stquant_jax.checks import check_precision, check_state
from stquant_jax.devices import shardings, spec_of
from stquant_jax.finding import find_state, is_state
from stquant_jax.layout import Storage
from stquant_jax.ownership import name_of, owned_leaves
from stquant_jax.planning import layout_for
from stquant_jax.precision import Budget, Policy
from stquant_jax.sharding import Sharding, sharding_for
from stquant_jax.transform import state_specs


def state_shardings(
    state: Any,
    params: Any,
    precision: Policy = Budget(),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> Any:
    """The sharding of every array in an optimizer's state: for ``out_shardings``, say.

    Args:
      state: a `ScaleByAdamQState`, or an optimizer's state that holds one; arrays, or shapes as
        `jax.eval_shape` makes them of ``tx.init``.
      params: arrays or ShapeDtypeStructs; shapes only.
      precision, storage, sharding: those the optimizer was made with.

    Returns:
      A tree like ``state``. What other transformations keep of a parameter, in an array of its
      shape at the end of a path like its own, lies where the parameter does; all else on every
      device.

    Raises:
      ValueError: the state was built for other parameters, another storage or sharding, or holds no
        `ScaleByAdamQState`, or several; nothing tells the sharding.
    """
    check_precision(precision, storage)
    here = sharding_for(params, sharding)
    layout = layout_for(params, precision, storage, here)
    own = find_state(state)
    check_state(own, layout)
    if here is None:
        where = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: where, state)
    mesh = here.mesh
    owners = {owned.path: owned for owned in owned_leaves(state, params) if owned}

    def of(path, x):
        if is_state(x):
            return shardings(mesh, state_specs(layout), x)
        owned = owners.get(name_of(path))
        if owned and owned.alike:
            return NamedSharding(mesh, spec_of(here.axes_of(owned.param, len(x.shape))))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=is_state)
