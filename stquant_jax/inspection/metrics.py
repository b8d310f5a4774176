"""What a state tells of itself, for any logger."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stquant_jax.engine.checks import check_mask, check_precision
from stquant_jax.engine.finding import find_the_one
from stquant_jax.engine.planning import layout_for
from stquant_jax.engine.state import is_state
from stquant_jax.engine.state_checks import check_arrays
from stquant_jax.precision import Budget, Policy
from stquant_jax.precision.statistics import distortion
from stquant_jax.solo.state import ScaleBySoloState
from stquant_jax.storage.arena import MOMENTS
from stquant_jax.storage.paths import leaf_parts, masked, name_of, unboxed
from stquant_jax.storage.settings import Storage
from stquant_jax.wrapping.ownership import owned_leaves
from stquant_jax.wrapping.state import Quantized, QuantizedState


def metrics(
    state: Any,
    params: Any = None,
    precision: Policy = Budget(),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    *,
    mask: Any = None,
) -> dict[str, jax.Array]:
    """Widths, estimated errors and statistics of a state, inside `jax.jit` or outside.

    With ``params`` every number has a name, ``"widths/layers.0.kernel/mu"``, and the dictionary is
    what loggers take: ``wandb.log``, TensorBoard's or clu's writers. Without, numbers of one kind
    are an array in the order of ``stquant.plan(...).slots``, or of every second of them.

    Statistics are averages over the last steps; of a leaf whose codes have just changed they start
    from 0. Of a state that was reset to zeros widths are 0 until its next update.

    Args:
      state: a state of any optimizer of this library, or an optimizer's state that holds one.
      params: arrays or ShapeDtypeStructs; names and shapes only.
      precision, storage: those the optimizer was made with; of the first only pins matter.
      mask: where the state is for part of the parameters, which: as for `optax.masked`.

    Returns:
      A dictionary of copies, which outlive a donated state.

      Of every optimizer:

      - ``count``: int32[], updates done.
      - ``megabytes``: float32[], of 10**6 bytes, of the state on all devices.
      - ``widths``: int32[slots], bits of a code.

      Of `scale_by_adam_q` and what is made of it also:

      - ``windows``: int32[slots], octaves that nu's codes span; 0 for mu.
      - ``distortion``: float32[slots], estimated squared error of the update that the slot causes
        in the closed loop, over the energy of its leaf's update; rough for nu until its memory is
        filled, and a guess where it has no codes.
      - ``nu_saturation``: float32[leaves], share of the update's energy where nu's codes are at the
        end of their window.
      - ``mu_zeros``: float32[leaves], share of mu's codes that stand for zero.
      - ``spread``: float32[leaves], error over energy if nu had no codes.
      - what the policy adds, of `Budget` ``unmet``: bool[slots], above ``max_distortion`` with no
        bits left; and ``promise_kept``: bool[], none is.

    Raises:
      ValueError: no state of this library in it, or several; ``params`` that it was not made for.
    """
    state, params = unboxed(state), unboxed(params)
    check_precision(precision, storage)
    check_mask(mask)
    one = find_the_one(state, _is_ours, "state that init of an optimizer of stquant returned")
    check_arrays(one, "state")
    told = {"megabytes": jnp.float32(1e-6 * sum(x.nbytes for x in jax.tree.leaves(one)))}
    told |= _told(one)
    told = {name: jnp.copy(x) for name, x in told.items()}
    if params is None:
        return told
    slots = _slots(one, masked(params, mask), precision, storage)
    if len(slots) != told["widths"].size:
        raise ValueError(
            f"the state has {told['widths'].size} slots, but params need {len(slots)}: expected "
            "the params, storage and pins that it was made for; where it is for part of them, "
            "pass mask="
        )
    return _named(told, slots)


_BY_LEAF = {"nu_saturation", "mu_zeros", "spread"}


def _is_ours(x: Any) -> bool:
    return is_state(x) or isinstance(x, (QuantizedState, ScaleBySoloState))


def _told(state: Any) -> dict[str, jax.Array]:
    if isinstance(state, QuantizedState):
        return {"count": state.steps, "widths": state.widths}
    if isinstance(state, ScaleBySoloState):
        return {"count": state.count, "widths": jnp.array(_solo_widths(state), jnp.int32)}
    return _adam(state)


@jax.jit
def _adam(state: Any) -> dict[str, jax.Array]:
    plan, observed, _, memory = state.precision.renewed(state.count)
    sums = observed.sums
    told = {
        "count": state.count,
        "widths": plan.widths,
        "windows": plan.windows,
        "distortion": distortion(observed, plan.widths[1::2]),
        "nu_saturation": _share(sums.saturated, sums.energy),
        "mu_zeros": _share(sums.zeros, sums.elements),
        "spread": observed.spread,
        **memory._asdict(),
    }
    if "unmet" in told:
        told["promise_kept"] = ~jnp.any(told["unmet"])
    return told


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """0 where nothing is counted yet."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


# --- names ---


def _slots(state: Any, params: Any, precision: Policy, storage: Storage) -> list[str]:
    """Names of all slots, leaf and moment."""
    if isinstance(state, ScaleBySoloState):
        names = [name_of(parts) for parts in leaf_parts(state.mu_scale)]
        return [f"{name}/{moment}" for name in names for moment in MOMENTS]
    if isinstance(state, QuantizedState):
        return _quantized_slots(state, params)
    layout = layout_for(params, precision, storage)
    return [f"{leaf.path}/{moment}" for leaf in layout.quantized for moment in MOMENTS]


def _quantized_slots(state: QuantizedState, params: Any) -> list[str]:
    """A moment is called by its field, or where that is not enough by the whole way to it."""

    def is_slot(x):
        return isinstance(x, Quantized)

    leaves = jax.tree.leaves(state.inner, is_leaf=is_slot)
    owners = owned_leaves(state.inner, params, is_slot)
    found = [owned for owned, x in zip(owners, leaves, strict=True) if is_slot(x) and owned]
    short = [f"{owned.param}/{owned.prefix.rpartition('.')[2]}" for owned in found]
    times = Counter(short)
    return [
        name if times[name] == 1 else f"{owned.param}/{owned.prefix}"
        for name, owned in zip(short, found, strict=True)
    ]


def _solo_widths(state: ScaleBySoloState) -> list[int]:
    """Of every leaf that has scales, mu and nu: planes of its codes."""
    quantized = leaf_parts(state.mu_scale)
    trees = [
        dict(zip(leaf_parts(tree), jax.tree.leaves(tree), strict=True))
        for tree in (state.mu, state.nu)
    ]
    return [len(tree[parts]) for parts in quantized for tree in trees]


def _named(told: dict[str, jax.Array], slots: list[str]) -> dict[str, jax.Array]:
    """Scalars by their own name, entries of arrays by leaf or by slot."""
    leaves, named = [slot.rpartition("/")[0] for slot in slots[::2]], {}
    for name, x in told.items():
        columns = leaves if name in _BY_LEAF else slots
        for index in np.ndindex(*x.shape):
            if name == "windows" and index[0] % 2 == 0:
                continue  # mu has none
            keys = list(map(str, index))
            if keys and x.shape[-1] == len(columns):
                keys[-1] = columns[index[-1]]
            named["/".join([name, *keys])] = x[index]
    return named
