"""Backends: the same fused step on different hardware. A named one runs or raises the reason."""

from collections.abc import Callable

from stquant_jax.backends import xla
from stquant_jax.layout import Storage


def resolve(storage: Storage) -> Callable:
    """The step function of a storage's backend.

    Raises:
      ValueError: a named backend cannot run.
    """
    if storage.backend in (None, "xla"):
        return xla.step
    raise ValueError(
        f"Storage(backend={storage.backend!r}) cannot run, this version lacks its kernels: "
        "expected 'xla' or None"
    )
