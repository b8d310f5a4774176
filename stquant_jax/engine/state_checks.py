"""Checks of states and of other trees of arrays; messages as in `stquant_jax.engine.checks`."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from stquant_jax.engine.state import is_state
from stquant_jax.precision import Fixed, Policy, PrecisionState, Slots
from stquant_jax.storage import arena as rows
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.planes import GROUP, LANES

RESTORE = (
    "what a checkpointer restored without a target, a dict or a list, has to be restored into it"
)


def check_moments(name: str, moments: Any, params: Any) -> None:
    """Raise ValueError unless a moment's tree is one of real floating arrays, shaped like the
    parameters."""
    got, want = (
        {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (moments, params)
    )
    if jax.tree.structure(moments) != jax.tree.structure(params):
        different = sorted(got.keys() ^ want.keys())[:5] or [str(jax.tree.structure(moments))]
        raise ValueError(
            f"{name} is unlike params, in {', '.join(different)}: expected the tree of the "
            "parameters that the optimizer was made for"
        )
    for path, x in got.items():
        shape = tuple(want[path].shape)
        if np.shape(x) != shape:
            raise ValueError(
                f"{name}{path} has shape {np.shape(x)}: expected {shape}, as in params"
            )
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name}{path} has dtype {dtype.name}: expected a real floating dtype")


def check_concrete(state: Any, function: str, name: str = "state") -> None:
    """Raise ValueError inside a transformation, for functions that read values on the host."""
    check_arrays(state, name)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(state)):
        raise ValueError(f"{name} is traced: expected concrete arrays; call {function} outside jit")


def check_arrays(tree: Any, name: str) -> None:
    """Raise ValueError where only shapes are given."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
        raise ValueError(f"{name} has ShapeDtypeStructs: expected arrays, or a call in eval_shape")


def check_count(count: Any) -> None:
    """Raise ValueError unless a concrete count is one of updates."""
    whole = np.ndim(count) == 0 and jnp.issubdtype(jnp.result_type(count), jnp.integer)
    if not whole or not 0 <= int(count) < 2**31:
        raise ValueError(f"state.count is {count}: expected a number of updates, below 2**31")


def check_state(state: Any, layout: Layout, tree: str = "params", advice: str = "") -> None:
    """Raise ValueError if a state was built for other parameters or another storage.

    Args:
      tree: what the layout is of. advice: what else may be the matter.
    """
    if not is_state(state):
        raise ValueError(
            f"state is {type(state).__name__}: expected the ScaleByAdamQState that init returned; "
            f"{RESTORE}"
        )
    if not isinstance(state.precision, PrecisionState) or any(
        np.ndim(x) != dim for x, dim in ((state.arena, 2), (state.mu_scale, 2), (state.exact, 2))
    ):
        raise ValueError(
            f"state is a {type(state).__name__} of other arrays: expected what init and update "
            "return"
        )
    check_codes("state.arena", state.arena)
    got = np.shape(state.mu_scale)[0], np.shape(state.exact)[1], len(state.precision.plan.widths)
    n = layout.devices
    want = (n * layout.tiles, n * layout.exact_columns, 2 * len(layout.quantized))
    if got != want:
        among = f", divided among {n} devices" if n > 1 else ""
        raise ValueError(
            f"the state holds {got[0]} tiles, {got[1]} exact elements and {got[2]} slots, but "
            f"these {tree} need {want[0]}, {want[1]} and {want[2]}{among}: expected {tree} of the "
            "tree and shapes given to init, the same sharding, the same storage and the same pins "
            f"to 'exact'{advice}"
        )
    tiles, columns = n * layout.tiles, n * layout.exact_columns
    arrays = {
        "count": ((), "int32"),
        "arena": ((len(state.arena), LANES), "uint32"),
        "mu_scale": ((tiles, LANES), "uint8"),
        "nu_scale": ((tiles, LANES), "uint16"),
        "nu_row": ((tiles * GROUP,), "uint8"),
        "exact": ((2, columns), "float32"),
    }
    check_like(
        "state",
        {name: getattr(state, name) for name in arrays} | {"precision": state.precision[:3]},
        {name: jax.ShapeDtypeStruct(*x) for name, x in arrays.items()}
        | {"precision": _schedule(len(layout.quantized), n)},
        "what init and update return",
    )
    if not any(isinstance(x, (Tracer, jax.ShapeDtypeStruct)) for x in jax.tree.leaves(state)):
        check_count(state.count)
        widths = np.asarray(state.precision.plan.widths)
        used, held = int(np.sum(widths * rows.slot_tiles(layout))), len(state.arena) // n
        if used > held:
            raise ValueError(
                f"the state's plan takes {used} rows of an arena, which has {held}: expected the "
                "arena that init or stquant.resize made for it"
            )


def check_codes(name: str, arena: Any) -> None:
    """Raise ValueError if codes have been computed with as if they were numbers."""
    dtype = jnp.result_type(arena)
    if jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} is {dtype.name}{list(np.shape(arena))}: expected the uint32 that init and "
            "update return. States are no numbers to cast, scale or average: do that to what "
            "stquant.to_optax makes of them, and go on with stquant.from_optax"
        )


@cache
def _schedule(leaves: int, devices: int) -> tuple[Any, ...]:
    """Shapes of the precision state of so many quantized leaves, but for the policy's memory."""
    slots = Slots(np.ones(2 * leaves, int), ("",) * 2 * leaves)
    plan, observed, tally, _ = jax.eval_shape(lambda: Fixed().init(slots, 0))
    if tally:
        digits = tally.digits
        shape = (devices, *digits.shape[1:])
        tally = tally._replace(digits=jax.ShapeDtypeStruct(shape, digits.dtype))
    return plan, observed, tally


def check_like(name: str, got: Any, want: Any, kind: str) -> None:
    """Raise ValueError at the first array that is missing, too many or of another shape."""
    have, need = (
        {
            jax.tree_util.keystr(path): f"{jnp.result_type(x)}{list(np.shape(x))}"
            for path, x in jax.tree.leaves_with_path(tree)
        }
        for tree in (got, want)
    )
    for path in sorted(have.keys() | need.keys()):
        if have.get(path) != need.get(path):
            raise ValueError(
                f"{name}{path} is {have.get(path, 'missing')}: expected "
                f"{need.get(path, 'nothing of that name')}, in {kind}"
            )


def check_policy(
    state: Any, layout: Layout, capacity: int, slots: Slots, precision: Policy
) -> None:
    """Raise ValueError if a state is not the policy's: its arena of so many rows on each device,
    its memory.

    Where plans never change that is no matter: the state's own one fits its arena.
    """
    if precision.interval is None:
        return
    got, want = len(state.arena), layout.devices * capacity
    if got != want:
        held, asked = (
            32 * (rows.fixed_bytes(layout) + rows.ROW_BYTES * n) / rows.reference_bytes(layout)
            for n in (got // layout.devices, capacity)
        )
        raise ValueError(
            f"the state's arena has {got} rows, about {held:.2f} bits per state element, but "
            f"precision={precision!r} fills {want}, about {asked:.2f} bits: expected a state of "
            "the same precision; stquant.resize(state, params, precision) makes one of another"
        )
    memory = jax.eval_shape(lambda: precision.first_memory(slots))
    kind = f"a state of precision={precision!r}; stquant.resize(state, params, precision) makes one"
    check_like("state.precision.memory", state.precision.memory, memory, kind)
