"""Checks at the public border: messages name the argument, what it got and what is accepted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from stquant_jax.precision import Policy
from stquant_jax.storage.settings import Storage

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
    concrete = {
        k: float(v)
        for k, v in (("b1", b1), ("b2", b2), ("eps", eps), ("eps_root", eps_root))
        if not isinstance(v, Tracer)
    }
    for name in ("b1", "b2"):
        if name in concrete and not 0 <= concrete[name] < 1:
            raise ValueError(f"{name}={concrete[name]}: expected 0 <= {name} < 1")
        if name in concrete and np.float32(concrete[name]) == 1:
            raise ValueError(
                f"{name}={concrete[name]} rounds to 1 in float32: expected a decay below 1"
            )
    for name in ("eps", "eps_root"):
        if name in concrete and not (0 <= concrete[name] <= float(np.finfo(np.float32).max)):
            raise ValueError(
                f"{name}={concrete[name]}: expected a finite number of at least 0, in float32"
            )
    if "b1" in concrete and "b2" in concrete:
        b1, b2 = concrete["b1"], concrete["b2"]
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
    try:
        hash(precision)
    except TypeError as error:
        raise ValueError(
            f"precision={precision!r} cannot be hashed ({error}): expected a frozen dataclass of "
            "numbers, strings and tuples"
        ) from None
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
