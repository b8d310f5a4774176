"""Aliases with the signatures of Optax's: swap `optax.adamw` for `stquant.adamw`, keep the rest."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from stquant_jax.engine.fused_update import fusable
from stquant_jax.engine.transform import scale_by_adam_q
from stquant_jax.precision import Budget, Policy
from stquant_jax.sharding.specs import Sharding
from stquant_jax.storage.settings import Storage


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: None = None,
    *,
    nesterov: bool = False,
    precision: Policy = Budget(5.0),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adam` with quantized state: ``chain(scale_by_adam_q(...),
    scale_by_learning_rate(learning_rate))``.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, eps_root, nesterov, precision, storage, sharding: see `scale_by_adam_q`.
      mu_dtype: None; it keeps Optax's place for it.

    Raises:
      ValueError: as `scale_by_adam_q`; a ``mu_dtype``.
    """
    _check_mu_dtype(mu_dtype)
    adam = scale_by_adam_q(
        b1,
        b2,
        eps,
        eps_root,
        nesterov=nesterov,
        precision=precision,
        storage=storage,
        sharding=sharding,
    )
    return fusable(adam, learning_rate)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    precision: Policy = Budget(5.0),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` with quantized state: Adam with decoupled weight decay (Loshchilov and Hutter,
    2019).

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, eps_root, nesterov, precision, storage, sharding: see `scale_by_adam_q`.
      mu_dtype: None; it keeps Optax's place for it.
      weight_decay: strength of the decay, a number or a schedule, multiplied with the learning
        rate as in Optax.
      mask: a tree of booleans, or a function of the parameters that returns one: which parameters
        decay.

    Raises:
      ValueError: as `scale_by_adam_q`; a ``mu_dtype``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, stquant_jax as stquant
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
      >>> tx = stquant.adamw(1e-3, weight_decay=0.1, precision=stquant.Budget(5.0))
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
    """
    _check_mu_dtype(mu_dtype)
    adam = scale_by_adam_q(
        b1,
        b2,
        eps,
        eps_root,
        nesterov=nesterov,
        precision=precision,
        storage=storage,
        sharding=sharding,
    )
    return fusable(adam, learning_rate, decay=(weight_decay, mask))


def _check_mu_dtype(mu_dtype: Any) -> None:
    if mu_dtype is not None:
        raise ValueError(
            f"mu_dtype={mu_dtype!r}: expected None, mu is stored in a few bits; "
            "precision=stquant.Fixed(mu=8, nu=8) says how many"
        )
