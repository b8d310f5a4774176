"""To Optax's own state, moments in float32, and back: a run may change its optimizer half way."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from stquant_jax.conversion.moments import decode_leaf, encode_leaf, leaf_by_leaf
from stquant_jax.engine.checks import check_precision
from stquant_jax.engine.finding import find, find_the_one, replaced
from stquant_jax.engine.planning import layout_for
from stquant_jax.engine.state import (
    ScaleByAdamQState,
    is_state,
    packed_of,
    packed_specs,
    state_specs,
)
from stquant_jax.engine.state_checks import (
    check_arrays,
    check_concrete,
    check_count,
    check_moments,
)
from stquant_jax.engine.transform import scale_by_adam_q
from stquant_jax.precision import Budget, Policy
from stquant_jax.sharding.devices import mesh_of, per_device, spec_of, whole_replicas
from stquant_jax.sharding.specs import Sharding, sharding_for
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.paths import unboxed
from stquant_jax.storage.settings import Storage

_SALT = 0x1F83  # of the seed: other numbers than those of steps and of new plans


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="packed")
def _encode(leaf, mesh, axes, slots, seed, count, packed, mu, nu):
    own, part = packed_specs(axes), spec_of(leaf.axes)
    specs = P(), P(), P(), own, part, part
    encode = per_device(partial(encode_leaf, leaf), mesh, specs, own)
    return encode(slots, seed, count, packed, mu, nu)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(leaf, mesh, axes, slots, packed):
    part = spec_of(leaf.axes)
    decode = per_device(partial(decode_leaf, leaf), mesh, (P(), packed_specs(axes)), (part, part))
    return decode(slots, packed)


def from_optax(
    state: Any,
    params: Any,
    precision: Policy = Budget(),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> Any:
    """Go on with `stquant.adamw` where `optax.adamw` stopped: its moments, quantized.

    Each group of 32 elements keeps the energy of nu and the length of mu to the rounding of its
    scales; how they are split among its elements is rounded stochastically, once. The plan is the
    policy's first, and statistics start anew.

    Args:
      state: an `optax.ScaleByAdamState`, or an optimizer's state that holds one, such as that of
        `optax.adamw` or of a chain around it; concrete, on the host. Moments may have any real
        floating dtype (``mu_dtype``).
      params: arrays or ShapeDtypeStructs, as the optimizer sees them; shapes only.
      precision, storage, sharding: those of the optimizer that is to go on.

    Returns:
      ``state`` with the `optax.ScaleByAdamState` in it replaced by a `ScaleByAdamQState`, its count
      kept: what the same chain around `stquant.adamw` goes on with. Where mu or nu is not finite,
      the group is not from then on; a group of nu whose sum is below 2**-126 becomes zero, its mu
      included.

    Raises:
      ValueError: a state that holds no `optax.ScaleByAdamState`, or several; a traced one; moments
        unlike ``params`` in structure or shapes, of another than a real floating dtype, or with
        negative elements in nu; as `scale_by_adam_q` and its ``init``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, stquant_jax as stquant
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> tx = optax.adamw(1e-3)
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> state = stquant.from_optax(state, params, stquant.Budget(5.0))
      >>> tx = stquant.adamw(1e-3, precision=stquant.Budget(5.0))  # goes on with it
      >>> updates, state = tx.update(grads, state, params)
      >>> int(stquant.to_optax(state, params)[0].count)
      2
    """
    check_precision(precision, storage)
    state, params = unboxed(state), unboxed(params)
    old = find_the_one(state, _is_adam, "optax.ScaleByAdamState")
    check_concrete(old, "from_optax")
    check_count(old.count)
    for name in ("mu", "nu"):
        check_moments(f"state.{name}", getattr(old, name), params)
    _check_signs(old.nu, params)
    here = sharding_for(params, sharding)
    layout = layout_for(params, precision, storage, here)
    new: Any = scale_by_adam_q(precision=precision, storage=storage, sharding=here).init(params)
    return replaced(state, _is_adam, _encoded(old, new, layout, storage, mesh_of(here)))


def to_optax(
    state: Any,
    params: Any,
    precision: Policy = Budget(),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> Any:
    """Go on with `optax.adamw` where `stquant.adamw` stopped: its moments, decoded.

    Args:
      state: a `ScaleByAdamQState`, or an optimizer's state that holds one. May be traced.
      params: arrays or ShapeDtypeStructs; shapes only.
      precision, storage, sharding: those the optimizer was made with; of the first only pins
        matter.
      mu_dtype: of mu, if not float32; as in `optax.adamw`.

    Returns:
      ``state`` with the `ScaleByAdamQState` in it replaced by ``optax.ScaleByAdamState(count, mu,
      nu)``, trees like ``params`` in float32 whatever its dtype; of a bare one a bare one. Groups
      that were not finite are NaN.

    Raises:
      ValueError: the state was built for other parameters or another storage, or holds no
        `ScaleByAdamQState`, or several.

    Examples:
      >>> import jax.numpy as jnp, optax, stquant_jax as stquant
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> state = stquant.to_optax(stquant.adamw(1e-3).init(params), params)
      >>> updates, state = optax.adamw(1e-3).update(params, state, params)
    """
    dtype = jnp.float32 if mu_dtype is None else mu_dtype
    if not _is_floating(dtype):
        raise ValueError(f"mu_dtype={mu_dtype!r}: expected None or a real floating dtype")
    state, old, params, layout, here = find(state, params, precision, storage, sharding)
    check_arrays(old, "state")
    mesh = mesh_of(here)
    packed = packed_of(old)

    def decode(leaf, at, packed, _):
        return packed, _decode(leaf, mesh, layout.axes, at, packed)

    _, quantized = leaf_by_leaf(decode, layout, old.precision.plan, packed)
    split = per_device(
        lambda x: [tuple(leaf) for leaf in layout.split_exact(x)],
        mesh,
        (state_specs(layout).exact,),
        [(spec_of(leaf.axes),) * 2 for leaf in layout.exact],
    )
    moments = layout.merge(quantized, split(old.exact))
    treedef = jax.tree.structure(params)
    mu, nu = (whole_replicas([pair[i] for pair in moments], layout, here) for i in range(2))
    mu, nu = (treedef.unflatten(side) for side in ([x.astype(dtype) for x in mu], nu))
    return replaced(state, is_state, optax.ScaleByAdamState(old.count, mu, nu))


def _encoded(
    old: optax.ScaleByAdamState,
    new: ScaleByAdamQState,
    layout: Layout,
    storage: Storage,
    mesh: Any,
) -> ScaleByAdamQState:
    """``new``, which is empty, with the moments of ``old``: leaf by leaf, the arena in place."""
    count = jnp.asarray(old.count, jnp.int32)
    moments = zip(jax.tree.leaves(old.mu), jax.tree.leaves(old.nu), strict=True)
    quantized, exact = layout.split(list(moments))
    packed = packed_of(new)
    seed = jnp.uint32(storage.seed ^ _SALT)

    def encode(leaf, at, packed, moments):
        return _encode(leaf, mesh, layout.axes, at, seed, count, packed, *moments), None

    packed, _ = leaf_by_leaf(encode, layout, new.precision.plan, packed, quantized)
    vectors = new.exact
    if layout.exact_size:
        join = per_device(
            lambda *sides: jnp.stack([_flattened(side) for side in sides]),
            mesh,
            ([spec_of(leaf.axes) for leaf in layout.exact],) * 2,
            state_specs(layout).exact,
        )
        vectors = join(*([pair[i] for pair in exact] for i in range(2)))
    return ScaleByAdamQState(count, *packed, exact=vectors, precision=new.precision)


def _flattened(arrays: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([jnp.asarray(x, jnp.float32).reshape(-1) for x in arrays])


@jax.jit
def _has_negative(x: jax.Array) -> jax.Array:
    return jnp.any(x < 0)


def _check_signs(nu: Any, params: Any) -> None:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    negative = jax.device_get([_has_negative(x) for x in jax.tree.leaves(nu)])
    if np.any(negative):
        raise ValueError(
            f"state.nu{paths[int(np.argmax(negative))]} has negative elements: expected second "
            "moments, which are sums of squares"
        )


def _is_floating(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _is_adam(x: Any) -> bool:
    return isinstance(x, optax.ScaleByAdamState)
