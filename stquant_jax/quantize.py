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

from stquant_jax.checks import check_arrays, check_precision, check_xla_only
from stquant_jax.holding import Holding, QuantizedState, masked
from stquant_jax.layout import Storage
from stquant_jax.precision import Budget, Policy
from stquant_jax.programs import check_leafwise, zero_outputs
from stquant_jax.sharding import Sharding, Whereabouts
from stquant_jax.store import Store

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
    whereabouts = Whereabouts(sharding)
    if sharding and sharding.zero_axes:
        raise ValueError(
            f"Sharding(zero_axis={sharding.zero_axis!r}): expected None, since moments have to be "
            "where the parameters are; it is for scale_by_adam_q"
        )

    def holding(tree: Any, here: Sharding | None) -> Holding:
        state = jax.eval_shape(tx.init, tree)
        return Holding.of(state, tree, precision, storage, here, unsigned)

    def init(params: optax.Params) -> QuantizedState:
        held = holding(params, whereabouts.at_init(params))
        zero = zero_outputs(tx.init, params)
        slots = [slot for slot in held.every if not zero[held.where[slot]]]

        def make(params):
            leaves, count = jax.tree.leaves(tx.init(params)), jnp.zeros((), jnp.int32)
            store = held.encoded(slots, held.empty(), leaves, count, anew=True)
            return held.state(count, leaves, store)

        return jax.jit(make)(params)  # nothing that is zero is ever there

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuantizedState]:
        check_arrays(updates, "updates")
        here = whereabouts.at_update(updates)
        held = holding(updates if params is None else params, here)
        leaves = held.leaves_of(state)
        store = held.known(state)
        count = jnp.asarray(optax.safe_increment(state.steps))
        run = partial(tx.update, **extra_args)
        by = _one_by_one if leafwise and jax.tree.leaves(updates) else _all_at_once
        new_updates, leaves, store = by(held, run, updates, leaves, params, store, count)
        return new_updates, held.state(count, leaves, store)

    return optax.GradientTransformationExtraArgs(init, update)


def _all_at_once(
    held: Holding,
    run: Callable,
    updates: Any,
    leaves: list,
    params: Any,
    store: Store,
    count: jax.Array,
) -> tuple[Any, list, Store]:
    inner = held.treedef.unflatten(held.filled(leaves, held.every, store))
    updates, inner = run(updates, inner, params)
    leaves = held.treedef.flatten_up_to(inner)
    return updates, leaves, held.encoded(held.every, store, leaves, count)


def _one_by_one(
    held: Holding,
    run: Callable,
    updates: Any,
    leaves: list,
    params: Any,
    store: Store,
    count: jax.Array,
) -> tuple[Any, list, Store]:
    """Every parameter by itself, the others masked out as `optax.masked` does it."""
    owners = [owned and owned.index for owned in held.owners]
    check_leafwise(run, updates, held.treedef.unflatten(held.template), params, owners)
    treedef = jax.tree.structure(updates)
    out, new = [None] * treedef.num_leaves, list(leaves)
    for i in range(treedef.num_leaves):

        def only(tree, i=i):
            parts = treedef.flatten_up_to(tree)
            return treedef.unflatten([masked(x, j == i) for j, x in enumerate(parts)])

        slots = [slot for slot, k in enumerate(held.where) if owners[k] == i]
        inner = [
            masked(x, owner in (None, i))
            for x, owner in zip(held.filled(leaves, slots, store), owners, strict=True)
        ]
        own = None if params is None else only(params)
        update, inner = run(only(updates), held.treedef.unflatten(inner), own)
        out[i] = treedef.flatten_up_to(update)[i]
        after = held.treedef.flatten_up_to(inner)
        new = [
            x if owner in (None, i) else before
            for x, before, owner in zip(after, new, owners, strict=True)
        ]
        store = held.encoded(slots, store, new, count)
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
