"""`quantize_state`: any Optax transformation, its state in a few bits per element between steps.

state -> decode -> the transformation's own update -> encode -> state
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stquant_jax.engine.checks import check_precision, check_xla_only
from stquant_jax.engine.differentiation import constant
from stquant_jax.engine.state_checks import check_arrays
from stquant_jax.precision import Budget, Policy
from stquant_jax.sharding.specs import Sharding, ShardingResolver
from stquant_jax.storage.layout import layout_of
from stquant_jax.storage.paths import trained
from stquant_jax.storage.settings import Storage
from stquant_jax.wrapping.packing import Packing, masked
from stquant_jax.wrapping.programs import check_leafwise, zero_outputs
from stquant_jax.wrapping.state import QuantizedState
from stquant_jax.wrapping.store import Store

# Fields of Optax's states that are never negative: averages and sums of squares.
UNSIGNED = r"(^|\.)(nu|nu_max|sum_of_squares|e_g|e_x)$"


def quantize_state(
    tx: optax.GradientTransformation,
    precision: Policy = Budget(8.0),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
    *,
    unsigned: str = UNSIGNED,
    leafwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Keep the state of any Optax transformation in a few bits per element between steps.

    Arrays of the state that have the shape of their parameter (its path ends like the parameter's)
    and a real floating dtype are quantized: decoded to their own dtype before ``tx.update``,
    encoded after it. All else stays as it is, and so do those of fewer than ``storage.min_size``
    elements and those pinned to ``"exact"``.

    Unsigned moments are stored as the second moment of `scale_by_adam_q`. Signed ones have uniform
    levels up to the largest of 32 elements, and a two-byte scale that keeps their length; an
    element that moves by less than half a level is rounded stochastically.

    XLA only: there are no kernels for it. The moments exist in full while ``tx.update`` runs: all
    of them, or with ``leafwise`` those of one parameter at a time.

    Args:
      tx: the transformation.
      precision: `Budget` or `Fixed`, signed moments having the widths of mu, unsigned ones those of
        nu. Budgets are bits per element of the quantizable state, all that ``tx`` keeps included.
        Widths stay those of the first step, whatever the policy's interval: how an error of
        some state moves an update is known for `scale_by_adam_q` only. Pins are found in paths of
        the state, such as ``"0.mu.layer.kernel"``.
      storage: which leaves stay exact, seed of the rounding; backend None or "xla".
      sharding: see `scale_by_adam_q`; without a zero axis.
      unsigned: regular expression, found in the path to the parameters' tree within the state
        (``"0.nu"``): moments that are never negative. A negative element in one of them makes its
        group NaN. All others are signed.
      leafwise: ``tx`` treats every parameter by itself, as Adam does and clipping by the global
        norm does not: decode, update and encode one at a time.

    Returns:
      A gradient transformation whose state is a `QuantizedState`.

    Raises:
      ValueError: an argument out of range; at ``init`` and ``update``, a budget below the floor, a
        pin that matches nothing, complex or integer parameters, a sharding that does not fit them
        or that nothing tells; at ``update``, ``leafwise`` with a transformation in which one
        parameter depends on another, a state of other parameters or another precision (under jit,
        where its values cannot be read, its moments are NaN).

    Examples:
      >>> import jax, jax.numpy as jnp, optax, stquant_jax as stquant
      >>> tx = stquant.quantize_state(optax.lion(1e-4), stquant.Budget(8.0))
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((256, 512))}, state, params)
      >>> sum(x.nbytes for x in jax.tree.leaves(state)) <= 8 / 32 * params["kernel"].nbytes
      True
    """
    _check_arguments(tx, precision, storage, unsigned, leafwise)
    storage = replace(storage, backend="xla")
    tx = optax.with_extra_args_support(tx)
    resolver, checked = ShardingResolver(sharding), set()
    if sharding and sharding.zero_axes:
        raise ValueError(
            f"Sharding(zero_axis={sharding.zero_axis!r}): expected None, since moments have to be "
            "where the parameters are; it is for scale_by_adam_q"
        )

    def packing_of(tree: Any, here: Sharding | None) -> Packing:
        state = jax.eval_shape(tx.init, tree)
        return Packing.of(state, tree, precision, storage, here, unsigned)

    @partial(jax.jit, static_argnums=0)  # nothing that is zero is ever there
    def first(here: Sharding | None, params: optax.Params) -> QuantizedState:
        packing, zero = packing_of(params, here), zero_outputs(tx.init, params)
        slots = [slot for slot in packing.all_slots if not zero[packing.where[slot]]]
        leaves, count = jax.tree.leaves(tx.init(params)), jnp.zeros((), jnp.int32)
        store = packing.encoded(slots, packing.empty(), leaves, count, anew=True)
        return packing.state(count, leaves, store)

    def init(params: optax.Params) -> QuantizedState:
        layout_of(params, storage)  # raises what is wrong with them, of which jit makes arrays
        return first(resolver.at_init(params), params)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuantizedState]:
        check_arrays(updates, "updates")
        here = resolver.at_update(updates)
        params = trained(params, updates)
        packing = packing_of(updates if params is None else params, here)
        leaves = packing.leaves_of(state)
        store = packing.checked(state)
        count = jnp.asarray(optax.safe_increment(state.steps))
        if packing.where:
            updates, leaves, params, store = constant((updates, leaves, params, store))
        run = partial(tx.update, **extra_args)
        if leafwise and jax.tree.leaves(updates):
            key = jax.tree.structure((updates, packing.template, params))
            if key not in checked:
                owners = [owned and owned.index for owned in packing.owners]
                inner = packing.treedef.unflatten(packing.template)
                check_leafwise(run, updates, inner, params, owners)
                checked.add(key)
            by = _one_by_one
        else:
            by = _all_at_once
        new_updates, leaves, store = by(packing, run, updates, leaves, params, store, count)
        return new_updates, packing.state(count, leaves, store)

    return optax.GradientTransformationExtraArgs(init, update)


def _all_at_once(
    packing: Packing,
    run: Callable,
    updates: Any,
    leaves: list,
    params: Any,
    store: Store,
    count: jax.Array,
) -> tuple[Any, list, Store]:
    inner = packing.treedef.unflatten(packing.filled(leaves, packing.all_slots, store))
    updates, inner = run(updates, inner, params)
    leaves = packing.treedef.flatten_up_to(inner)
    return updates, leaves, packing.encoded(packing.all_slots, store, leaves, count)


def _one_by_one(
    packing: Packing,
    run: Callable,
    updates: Any,
    leaves: list,
    params: Any,
    store: Store,
    count: jax.Array,
) -> tuple[Any, list, Store]:
    """Every parameter by itself, the others masked out as `optax.masked` does it."""
    owners = [owned and owned.index for owned in packing.owners]
    treedef = jax.tree.structure(updates)
    out, new = [None] * treedef.num_leaves, list(leaves)
    for i in range(treedef.num_leaves):

        def only(tree, i=i):
            parts = treedef.flatten_up_to(tree)
            return treedef.unflatten([masked(x, j == i) for j, x in enumerate(parts)])

        slots = [slot for slot, k in enumerate(packing.where) if owners[k] == i]
        inner = [
            masked(x, owner in (None, i))
            for x, owner in zip(packing.filled(leaves, slots, store), owners, strict=True)
        ]
        own = None if params is None else only(params)
        update, inner = run(only(updates), packing.treedef.unflatten(inner), own)
        out[i] = treedef.flatten_up_to(update)[i]
        after = packing.treedef.flatten_up_to(inner)
        new = [
            x if owner in (None, i) else before
            for x, before, owner in zip(after, new, owners, strict=True)
        ]
        store = packing.encoded(slots, store, new, count)
    return treedef.unflatten(out), new, store


def _check_arguments(tx: Any, precision: Any, storage: Any, unsigned: Any, leafwise: Any) -> None:
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"tx={tx!r}: expected an optax.GradientTransformation")
    check_precision(precision, storage)
    check_xla_only(storage, "the state of other transformations")
    try:
        re.search(unsigned, "")
    except (TypeError, re.error) as error:
        raise ValueError(
            f"unsigned={unsigned!r}: expected a regular expression ({error})"
        ) from None
    if not isinstance(leafwise, bool):
        raise ValueError(f"leafwise={leafwise!r}: expected True or False")
