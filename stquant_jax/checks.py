"""Checks at the public border: messages name the argument, what it got and what is accepted."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from stquant_jax.arena import slot_tiles
from stquant_jax.finding import is_state
from stquant_jax.layout import Layout, Storage
from stquant_jax.planes import GROUP, LANES
from stquant_jax.precision import Fixed, Policy, PrecisionState, Slots

# The largest level of the first moment's scale, over any that a sane pair of decays can reach.
_MAX_RATIO = 2.0**8


def check_hyperparameters(b1: Any, b2: Any, eps: Any, eps_root: Any) -> None:
    """Raise ValueError on a hyperparameter out of range, if its value is known when tracing."""
    for name, value in (("b1", b1), ("b2", b2), ("eps", eps), ("eps_root", eps_root)):
        check_fine(name, value)
        if getattr(value, "shape", ()) != ():
            raise ValueError(f"{name} has shape {value.shape}: expected a scalar")
        if not _is_real(value):
            raise ValueError(
                f"{name}={value!r}: expected a number; of schedules optax.inject_hyperparams makes "
                "numbers"
            )
    known = {
        k: float(v)
        for k, v in (("b1", b1), ("b2", b2), ("eps", eps), ("eps_root", eps_root))
        if not isinstance(v, Tracer)
    }
    for name in ("b1", "b2"):
        if name in known and not 0 <= known[name] < 1:
            raise ValueError(f"{name}={known[name]}: expected 0 <= {name} < 1")
        if name in known and np.float32(known[name]) == 1:
            raise ValueError(
                f"{name}={known[name]} rounds to 1 in float32: expected a decay below 1"
            )
    for name in ("eps", "eps_root"):
        if name in known and not (0 <= known[name] <= float(np.finfo(np.float32).max)):
            raise ValueError(
                f"{name}={known[name]}: expected a finite number of at least 0, in float32"
            )
    if "b1" in known and "b2" in known:
        b1, b2 = known["b1"], known["b2"]
        if b1 > 0 and b1 * b1 >= b2:
            raise ValueError(
                f"b1={b1} with b2={b2}: expected b1**2 < b2, or the first moment outlives the root "
                "of the second, by which its codes are measured"
            )
        if (1 - b1) / (1 - b2) ** 0.5 > _MAX_RATIO:
            raise ValueError(
                f"b1={b1} with b2={b2}: expected (1 - b1) / sqrt(1 - b2) of at most "
                f"{_MAX_RATIO:g}, the largest ratio of moments that the first moment's scale can "
                "hold at step 1"
            )


def check_fine(name: str, value: Any) -> None:
    """Raise ValueError on a hyperparameter in a dtype in which 0.999 is 1."""
    dtype = getattr(value, "dtype", None)
    coarse = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if coarse and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} arrived as {jnp.dtype(dtype).name}, in which 0.999 rounds to 1: expected "
            "float32 or a Python number; with optax.inject_hyperparams pass "
            "hyperparam_dtype=jnp.float32"
        )


def _is_real(value: Any) -> bool:
    """A real number, or an array of real numbers, traced or not."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return isinstance(value, (int, float))
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_rate(name: str, value: Any) -> None:
    """Raise ValueError unless this is what `optax.scale_by_learning_rate` and
    `optax.add_decayed_weights` take: a schedule or a real number; None of the former."""
    fits = callable(value) or (_is_real(value) and getattr(value, "shape", ()) == ())
    if not fits and not (value is None and name == "learning_rate"):
        raise ValueError(f"{name}={value!r}: expected a number or a schedule")


def check_mask(mask: Any) -> None:
    """Raise ValueError unless this is what `optax.masked` takes."""
    for x in jax.tree.leaves(mask):
        if not callable(x) and not isinstance(x, (bool, np.bool_)):
            raise ValueError(
                f"mask has {x!r}: expected a tree of True and False, or a function of the "
                "parameters that returns one"
            )


def check_precision(precision: Any, storage: Any) -> None:
    """Raise ValueError unless both are of the library's kinds."""
    if not isinstance(precision, Policy) or type(precision) is Policy:
        raise ValueError(
            f"precision={precision!r}: expected a policy such as stquant.Budget(5.0) or "
            "stquant.Fixed(mu=5, nu=4)"
        )
    if not isinstance(storage, Storage):
        raise ValueError(f"storage={storage!r}: expected a stquant.Storage")


def check_xla_only(storage: Storage, what: str) -> None:
    """Raise ValueError if a storage asks for kernels, or for the rows of an arena that they need,
    where there are none."""
    if storage.backend not in (None, "xla"):
        raise ValueError(
            f"Storage(backend={storage.backend!r}) cannot run {what}, for which there is no "
            "kernel: expected 'xla' or None"
        )
    if storage.row_alignment not in (None, 1):
        raise ValueError(
            f"Storage(row_alignment={storage.row_alignment}) with {what}: expected None, only "
            "kernels need one"
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


def check_state(state: Any, layout: Layout) -> None:
    """Raise ValueError if a state was built for other parameters or another storage."""
    if not is_state(state):
        raise ValueError(
            f"state is {type(state).__name__}: expected the ScaleByAdamQState that init returned"
        )
    if not isinstance(state.precision, PrecisionState) or any(
        np.ndim(x) != dim for x, dim in ((state.arena, 2), (state.mu_scale, 2), (state.exact, 2))
    ):
        raise ValueError(
            f"state is a {type(state).__name__} of other arrays: expected what init and update "
            "return"
        )
    got = np.shape(state.mu_scale)[0], np.shape(state.exact)[1], len(state.precision.plan.widths)
    n = layout.devices
    want = (n * layout.tiles, n * layout.exact_columns, 2 * len(layout.quantized))
    if got != want:
        raise ValueError(
            f"the state holds {got[0]} tiles, {got[1]} exact elements and {got[2]} slots, but "
            f"these gradients need {want[0]}, {want[1]} and {want[2]}, divided among {n} devices: "
            "expected gradients of the tree and shapes given to init, the same sharding, the same "
            "storage and the same pins to 'exact'"
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
        used, rows = int(np.sum(widths * slot_tiles(layout))), len(state.arena) // n
        if used > rows:
            raise ValueError(
                f"the state's plan takes {used} rows of an arena, which has {rows}: expected the "
                "arena that init or stquant.resize made for it"
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
        raise ValueError(
            f"the state's arena has {got} rows, but precision={precision!r} fills {want}: expected "
            "a state of the same precision; stquant.resize(state, params, precision) moves one of "
            "another to it"
        )
    memory = jax.eval_shape(lambda: precision.first_memory(slots))
    kind = f"a state of precision={precision!r}; stquant.resize(state, params, precision) makes one"
    check_like("state.precision.memory", state.precision.memory, memory, kind)
