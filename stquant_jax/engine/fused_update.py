"""`fused_update`: Optax's `update` and `apply_updates` in one.

Kernels can then write new parameters where they would have written updates, which another pass
would have to read again.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stquant_jax.engine.checks import check_mask, check_rate
from stquant_jax.engine.state import is_state
from stquant_jax.engine.state_checks import RESTORE, check_arrays
from stquant_jax.engine.transform import ScaleByAdamQ
from stquant_jax.rules.apply import Apply
from stquant_jax.storage.paths import leaf_names, trained


@dataclass
class Request:
    """Asks a link of a chain, among the extra arguments of its update, for new parameters in place
    of updates; and holds what it answered, to see that no other link came after."""

    stochastic_rounding: bool
    answer: Any = None


def fused_update(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: Any,
    params: optax.Params,
    *,
    stochastic_rounding: bool = False,
) -> tuple[Any, Any]:
    r"""One step of `adam` or `adamw`, the update applied.

    .. math::
      p_t = p_{t-1} - \eta_t (u_t + \lambda_t p_{t-1})

    with u as in `scale_by_adam_q`, the learning rate :math:`\eta` and the weight decay
    :math:`\lambda` (0 where masked) as in `optax.adamw`. In place of

    >>> updates, state = tx.update(grads, state, params)  # doctest: +SKIP
    >>> params = optax.apply_updates(params, updates)  # doctest: +SKIP

    write ``params, state = stquant.fused_update(tx, grads, state, params)``. Both run the same code
    on the same state, and either may follow the other.

    Where parameters and gradients are float32, both also do the same operations on the parameters,
    in the same order: compiled as one program on a CPU, they give the same bits. Compilers may
    round a product that is added to something, or not; where they decide so for one and not for the
    other, as they must where `optax.apply_updates` is a program of its own, the two differ by that
    rounding, 2**-24 of the product.

    Where either is narrower this is the more exact: all of it is computed in float32 and rounded
    once, to the parameters' dtype; Optax rounds the update to the gradients' dtype first.

    In a chain, what stands before `adam` or `adamw` is Optax's own, on the gradients.

    Args:
      tx: what `adam` or `adamw` returned; a chain of which it is the last link, such as
        ``optax.chain(optax.clip_by_global_norm(1.0), stquant.adamw(1e-3))``; or
        ``optax.inject_hyperparams`` of it.
      grads: a tree of real floating arrays.
      state: ``tx.init(params)``, or what the last step returned.
      params: a tree of real floating arrays of at most 32 bits, in structure and shapes like
        ``grads``. Where a gradient is None, any leaf stays as it is.
      stochastic_rounding: round bfloat16 parameters up or down at random, so that the mean is what
        was to be rounded: to nearest, an update of less than half a step of its parameter, which is
        2**-9 to 2**-8 of it, is lost every time. The noise is a hash of ``Storage.seed``, step and
        position, fresh at every step. Leaves of 32 bits and more are not rounded.

    Returns:
      The new parameters, in shapes and dtypes like ``params``, and the new state. Donate both.

    Raises:
      ValueError: ``tx`` is another transformation, or changes what its last link returns; the
        parameters are None or unlike the gradients; the state is not that of ``tx``;
        ``stochastic_rounding`` with parameters of float16 or less; as the ``update`` of
        `scale_by_adam_q`.

    Examples:
      >>> import jax, jax.numpy as jnp, stquant_jax as stquant
      >>> tx = stquant.adamw(1e-3, weight_decay=0.1)
      >>> params = {"kernel": jnp.ones((256, 512), jnp.bfloat16)}
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(grads, state, params):
      ...     return stquant.fused_update(tx, grads, state, params, stochastic_rounding=True)
      >>> params, state = step(jax.tree.map(jnp.ones_like, params), state, params)
      >>> mean = params["kernel"].astype(jnp.float32).mean()  # steps below 1 are of 2**-8
      >>> bool(abs(mean - (1 - 1.1e-3)) < 1e-4)
      True
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"tx is {type(tx).__name__}: expected what stquant.adamw returned")
    if not isinstance(stochastic_rounding, bool):
        raise ValueError(f"stochastic_rounding={stochastic_rounding!r}: expected True or False")
    if params is None:
        raise ValueError("params=None: expected the parameters, they are what is updated")
    trainable = trained(params, grads)
    _check_params(trainable, grads, stochastic_rounding)
    request = Request(stochastic_rounding)
    update = optax.with_extra_args_support(tx).update
    new, state = update(grads, state, trainable, stquant_fused_update=request)
    if new is not request.answer:
        raise ValueError(
            f"tx is {type(tx).__name__}: expected what stquant.adam or stquant.adamw returned, "
            "alone or as the last link of optax.chain; no other optimizer can be fused, nor what "
            "is changed after the last link: use tx.update and optax.apply_updates"
        )
    # What is not trained stays, as in `optax.apply_updates`.
    merged = jax.tree.map(
        lambda x, old: old if x is None else x, new, params, is_leaf=lambda x: x is None
    )
    return merged, state


def fusable(
    adam: ScaleByAdamQ,
    learning_rate: optax.ScalarOrSchedule,
    decay: tuple[optax.ScalarOrSchedule, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Optax's chain of Adam, weight decay and learning rate, which can be fused too.

    Args:
      decay: arguments of `optax.add_decayed_weights`: a number or a schedule, and a mask.
    """
    check_rate("learning_rate", learning_rate)
    if decay is not None:
        check_rate("weight_decay", decay[0])
        check_mask(decay[1])
    scaling = optax.scale_by_learning_rate(learning_rate)
    decaying = [] if decay is None else [optax.add_decayed_weights(*decay)]
    chain = optax.chain(adam, *decaying, scaling)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        stquant_fused_update: Request | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        if stquant_fused_update is None:
            return chain.update(updates, state, params, **extra_args)
        new, state = fused(updates, state, params, stquant_fused_update.stochastic_rounding)
        stquant_fused_update.answer = new
        return new, state

    def fused(grads, state, params, stochastic):
        _check_state(state, 2 + len(decaying))
        adam_state, *decay_states, rate_state = state
        # Decay and rate are Optax's own: what these make of scalars, 0 + decay * 1 and rate * 1,
        # are their numbers at this step.
        treedef = jax.tree.structure(grads)
        zeros, ones = (
            jax.tree.unflatten(treedef, [np.float32(x)] * treedef.num_leaves) for x in (0, 1)
        )
        decays = zeros
        if decay is not None:
            seen = optax.add_decayed_weights(decay[0], _of(grads, decay[1]))
            decays, new_state = seen.update(zeros, decay_states[0], ones)
            decay_states = [new_state]
        rate, rate_state = scaling.update(np.float32(1), rate_state)
        apply = Apply(
            [jnp.asarray(p) for p in jax.tree.leaves(params)],
            jnp.asarray(rate, jnp.float32),
            jnp.asarray(jax.tree.leaves(decays), jnp.float32),
            stochastic,
        )
        params, adam_state = adam.step(grads, adam_state, apply)
        return params, (adam_state, *decay_states, rate_state)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _of(grads: Any, mask: Any) -> Any:
    """A mask, a function of the tree or a tree itself, as it is for these gradients."""
    return jax.tree.map(lambda m: (lambda _: m(grads)) if callable(m) else m, mask)


def _check_state(state: Any, length: int) -> None:
    if not (isinstance(state, (tuple, list)) and len(state) == length and is_state(state[0])):
        raise ValueError(
            f"state is {type(state).__name__}: expected the tuple of {length} states that "
            f"tx.init returned; {RESTORE}"
        )


def _check_params(params: Any, grads: Any, stochastic: bool) -> None:
    """Raise ValueError unless the parameters can be updated by these gradients."""
    check_arrays(params, "params")
    if jax.tree.structure(params) != jax.tree.structure(grads):
        raise ValueError(
            f"params is a tree {_outline(params)}: expected that of grads, {_outline(grads)}"
        )
    leaves = leaf_names(params), jax.tree.leaves(params), jax.tree.leaves(grads)
    for name, p, g in zip(*leaves, strict=True):
        dtype = jnp.result_type(p)
        if jnp.shape(p) != jnp.shape(g):
            raise ValueError(
                f"params has shape {jnp.shape(p)} at {name!r}: expected {jnp.shape(g)}, that of "
                "grads"
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"params has dtype {dtype.name} at {name!r}: expected a real floating dtype"
            )
        if jnp.finfo(dtype).bits > 32:
            raise ValueError(
                f"params has dtype {dtype.name} at {name!r}, but is updated in float32: expected "
                "32 bits or less; use tx.update and optax.apply_updates"
            )
        if stochastic and jnp.finfo(dtype).bits < 32 and dtype != jnp.bfloat16:
            raise ValueError(
                f"stochastic_rounding=True with params of dtype {dtype.name} at {name!r}: expected "
                "bfloat16, or 32 bits and more, which need no rounding"
            )


def _outline(tree: Any) -> str:
    text = str(jax.tree.structure(tree)).removeprefix("PyTreeDef")
    return text if len(text) <= 200 else f"{text[:200]}..."
