"""States that outlive the mesh they were made on: leaf by leaf, in the order of the leaf itself.

An arena is laid out for one way to divide the parameters among devices. A portable state is not:
codes lie one to a byte, in an array shaped like their leaf, scales and rows by the tiles of the
whole leaf. It is a dictionary of arrays, for any checkpointer. Nothing is rounded, so that training
goes on bit for bit, on the same mesh or on another.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from stquant_jax.conversion.moments import leaf_by_leaf
from stquant_jax.conversion.records import (
    read,
    read_exact,
    record_specs,
    torn,
    write,
    write_exact,
)
from stquant_jax.engine.checks import check_precision
from stquant_jax.engine.finding import find, replaced
from stquant_jax.engine.planning import layout_for, restarted, rows_for, slots_for
from stquant_jax.engine.state import ScaleByAdamQState, is_state, packed_of, state_specs
from stquant_jax.engine.state_checks import check_concrete, check_like
from stquant_jax.engine.transform import scale_by_adam_q
from stquant_jax.inspection.placement import state_shardings
from stquant_jax.precision import Budget, Plan, Policy, PrecisionState
from stquant_jax.precision.statistics import Observed
from stquant_jax.precision.tally import Tally, gathered, scattered
from stquant_jax.sharding.devices import divided, mesh_of, per_device, shardings
from stquant_jax.sharding.specs import Sharding, sharding_for
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.paths import unboxed
from stquant_jax.storage.settings import Storage

VERSION = 1
_MARK = "stquant_version"


def to_portable(
    state: Any,
    params: Any,
    precision: Policy = Budget(),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> Any:
    """The state without its mesh, to be saved: `from_portable` has the way back, to any mesh.

    Args:
      state: a `ScaleByAdamQState`, or an optimizer's state that holds one; concrete, or all of it
        ShapeDtypeStructs as `jax.eval_shape` makes them of ``tx.init``.
      params: arrays or ShapeDtypeStructs; shapes only.
      precision, storage, sharding: those the optimizer was made with.

    Returns:
      ``state`` with a dictionary in place of the `ScaleByAdamQState`. It has for each leaf, by its
      path, codes of both moments ``uint8[*shape]``, divided as the leaf's state is, scales uint8
      and uint16[tiles, 128], rows uint8[tiles, 32] and a checksum, or exact moments
      ``float32[*shape]``; plan, statistics and count. It takes about 2.1 bytes per parameter beside
      the state, and one leaf's codes in 32 bits while it is made. Of ShapeDtypeStructs:
      ShapeDtypeStructs, with shardings: what a checkpointer is to restore.

    Raises:
      ValueError: the state was built for other parameters, another storage or sharding, is traced,
        or holds no `ScaleByAdamQState`, or several.
    """
    state, old, params, layout, here = find(state, params, precision, storage, sharding)
    mesh = mesh_of(here)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(old)):
        state = _on(state, state_shardings(state, params, precision, storage, here))
        return replaced(state, is_state, _shapes(old, layout, mesh))
    check_concrete(old, "to_portable")
    old = restarted(old, layout, precision)
    return replaced(state, is_state, _portable(old, layout, mesh))


def from_portable(
    portable: Any,
    params: Any,
    precision: Policy = Budget(),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> Any:
    """A portable state, laid out for a mesh: what the optimizer goes on with, bit for bit.

    That holds wherever the leaves are divided into whole tiles. Of a leaf that is not
    (`stquant.plan` names them) the state fits the same division alone; `to_optax` and `from_optax`
    have a way from any to any, which rounds.

    Args:
      portable: what `to_portable` returned, as saved and restored by any checkpointer.
      params: arrays or ShapeDtypeStructs; shapes only.
      precision, storage, sharding: those of the optimizer that is to go on; a budget of at least
        the bits that it was saved with, and the same policy. `stquant.resize` changes it then.

    Returns:
      ``portable`` with the dictionary in it replaced by a `ScaleByAdamQState`, on the mesh.

    Raises:
      ValueError: no portable state, or one of another version; one of other parameters, pins,
        storage or policy; a plan that does not fit; arrays that are not what was saved.
    """
    check_precision(precision, storage)
    params = unboxed(params)
    given = _find_portable(portable)
    here = sharding_for(params, sharding)
    layout, mesh = layout_for(params, precision, storage, here), mesh_of(here)
    tx = scale_by_adam_q(precision=precision, storage=storage, sharding=here)
    new: Any = tx.init(params)
    given = given | {"leaves": _renamed(given.get("leaves"), layout)}
    kind = "what was saved of these parameters, with the same policy, pins and storage"
    check_like("portable", given, _shapes(new, layout, mesh), kind)
    _check_plan(given, layout, precision)
    return replaced(portable, _is_portable, _restored(given, new, layout, mesh))


# --- the whole ---


def _portable(old: ScaleByAdamQState, layout: Layout, mesh: Any) -> dict[str, Any]:
    packed = packed_of(old)
    plan, observed, tally, memory = old.precision

    def read_leaf(leaf, at, packed, _):
        return packed, read(leaf, mesh, layout.axes, at, packed)

    _, quantized = leaf_by_leaf(read_leaf, layout, plan, packed)
    exact = read_exact(layout, mesh, old.exact)
    leaves = layout.merge(quantized, exact)
    return {
        _MARK: divided(jnp.int32(VERSION), mesh, P()),  # of all processes, as all else
        "count": old.count,
        "leaves": {leaf.path: x for leaf, x in zip(layout.leaves, leaves, strict=True)},
        "plan": plan._asdict(),
        "observed": observed._asdict(),
        "tally": gathered(tally)._asdict() if layout.quantized else {},
        "memory": memory._asdict(),
    }


def _restored(given: dict, new: ScaleByAdamQState, layout: Layout, mesh: Any) -> ScaleByAdamQState:
    plan, observed = Plan(**given["plan"]), Observed(**given["observed"])
    plan = jax.tree.map(jnp.asarray, plan)
    packed = packed_of(new)
    leaves = [given["leaves"][leaf.path] for leaf in layout.leaves]
    quantized, exact = layout.split(leaves)

    def write_leaf(leaf, at, packed, x):
        arrays = {name: x[name] for name in record_specs(leaf)}
        return write(leaf, mesh, layout.axes, at, packed, arrays)

    packed, sums = leaf_by_leaf(write_leaf, layout, plan, packed, quantized)
    vectors, found = write_exact(layout, mesh, exact) if layout.exact_size else (new.exact, [])
    _check_sums(layout, sums, found, quantized, exact)
    tally = new.precision.tally
    if layout.quantized:
        tally = Tally(**given["tally"])
        scatter = per_device(
            partial(scattered, axes=layout.axes),
            mesh,
            (P(),),
            state_specs(layout).precision.tally,
        )
        tally = jax.jit(scatter)(tally)
    memory = type(new.precision.memory)(**given["memory"])
    schedule = PrecisionState(plan, observed, tally, memory)
    state = ScaleByAdamQState(given["count"], *packed, exact=vectors, precision=schedule)
    if mesh is None:
        return jax.tree.map(jnp.asarray, state)
    return jax.device_put(state, shardings(mesh, state_specs(layout), state))


# --- checks ---


def _shapes(state: ScaleByAdamQState, layout: Layout, mesh: Any) -> dict[str, Any]:
    """The portable state's shapes, with shardings."""
    like = jax.eval_shape(partial(_portable, layout=layout, mesh=mesh), state)
    if mesh is None:
        where = SingleDeviceSharding(jax.local_devices()[0])
        return _on(like, jax.tree.map(lambda _: where, like))
    specs = jax.tree.map(lambda _: P(), like)
    for leaf in layout.leaves:
        specs["leaves"][leaf.path] |= record_specs(leaf)
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
    return _on(like, named)


def _on(tree: Any, where: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
    )


def _renamed(leaves: Any, layout: Layout) -> Any:
    """Leaves by their names; version 0.1 left those of Flax's variables in their boxes."""
    if not isinstance(leaves, dict):
        return leaves
    boxed = {f"{leaf.path}.value": leaf.path for leaf in layout.leaves}
    return {boxed.get(name, name): x for name, x in leaves.items()}


def _is_portable(x: Any) -> bool:
    return isinstance(x, dict) and _MARK in x


def _find_portable(tree: Any) -> dict[str, Any]:
    found = [x for x in jax.tree.leaves(tree, is_leaf=_is_portable) if _is_portable(x)]
    if len(found) != 1:
        raise ValueError(
            f"portable is {type(tree).__name__}: expected what to_portable returned, or an "
            f"optimizer's state that holds one of it, not {len(found) or 'none'}"
        )
    check_concrete(found[0], "from_portable", "portable")
    version = found[0][_MARK]
    if np.ndim(version) or version != VERSION:
        raise ValueError(f"portable is of version {version}: expected {VERSION}")
    return found[0]


def _check_plan(given: dict[str, Any], layout: Layout, precision: Policy) -> None:
    slots = slots_for(layout, precision)
    widths = np.asarray(given["plan"]["widths"])
    if np.any(widths < np.where(slots.moment == 0, 2, 0)) or np.any(widths > 8):
        raise ValueError(
            f"portable['plan']['widths'] is {widths}: expected 2 to 8 bits for mu, 0 to 8 for nu"
        )
    need, free = int(np.sum(widths * slots.tiles)), rows_for(layout, precision)
    if need > free:
        raise ValueError(
            f"portable['plan'] takes {need} rows of an arena, precision={precision} has {free}: "
            "expected the budget that it was saved with, or a larger one; stquant.resize makes it "
            "smaller then"
        )
    if int(given["count"]) < 0:
        raise ValueError(f"portable['count'] is {given['count']}: expected a number of updates")
    for leaf in layout.quantized:
        got = np.asarray(given["leaves"][leaf.path]["torn"])
        if not np.array_equal(got, torn(leaf)):
            raise ValueError(
                f"portable['leaves'][{leaf.path!r}] was divided into {got} parts, zeros for any, "
                f"and is to be divided into {torn(leaf)}: parts that are no whole tiles fit the "
                "same division alone; go by to_optax and from_optax"
            )


def _check_sums(
    layout: Layout, sums: list, exact_sums: list, quantized: list[dict], exact: list[dict]
) -> None:
    found = [*((leaf, *x) for leaf, x in zip(layout.quantized, sums, strict=True))]
    found += [(leaf, x, 0) for leaf, x in zip(layout.exact, exact_sums, strict=False)]
    want = [x["checksum"] for x in (*quantized, *exact[: len(exact_sums)])]
    for (leaf, got, odd), need in zip(jax.device_get(found), jax.device_get(want), strict=True):
        if got != need or odd:
            raise ValueError(
                f"portable['leaves'][{leaf.path!r}] is not what was saved: its checksum is "
                f"{int(got)}, expected {int(need)}; {int(odd)} of its codes do not fit their width"
            )
