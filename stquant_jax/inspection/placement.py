"""Where an optimizer's state lies, for jit and for checkpointers."""

from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from stquant_jax.engine.finding import find
from stquant_jax.engine.state import is_state, state_specs
from stquant_jax.precision import Budget, Policy
from stquant_jax.sharding.devices import shardings, spec_of
from stquant_jax.sharding.specs import Sharding
from stquant_jax.storage.settings import Storage
from stquant_jax.wrapping.ownership import owned_leaves


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
    state, _, params, layout, here = find(state, params, precision, storage, sharding)
    if here is None:
        where = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: where, state)
    mesh = here.mesh
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_state)

    def of(owned, x):
        if is_state(x):
            return shardings(mesh, state_specs(layout), x)
        if owned and owned.alike:
            return NamedSharding(mesh, spec_of(here.axes_of(owned.param, len(x.shape))))
        return NamedSharding(mesh, P())

    return treedef.unflatten(map(of, owned_leaves(state, params, is_state), leaves))
