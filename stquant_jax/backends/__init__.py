"""Backends: the same fused step on different hardware. A named one runs or raises the reason.

"xla" and "xla_gpu" run everywhere, and are made for processors and for GPUs without our kernels;
"pallas_tpu" and "pallas_gpu" are kernels, imported when they are used. Left to the library, the
platform of `jax.default_backend()` decides, and a program that is lowered for another platform
after all gets the XLA loop there.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import jax

from stquant_jax.backends import xla
from stquant_jax.storage.settings import Storage

_ALIGNMENT = {"xla": 1, "xla_gpu": 1, "pallas_tpu": 8, "pallas_gpu": 1}
# Of a platform: the best first.
_CHOICE = {"tpu": ("pallas_tpu", "xla"), "gpu": ("pallas_gpu", "xla_gpu"), "cpu": ("xla",)}
# By the names of `jax.lax.platform_dependent`.
_LOWERED = {"pallas_tpu": ("tpu",), "pallas_gpu": ("cuda",), "xla_gpu": ("cuda", "rocm")}


def settle(storage: Storage) -> Storage:
    """A storage whose backend and row alignment are decided.

    Raises:
      ValueError: a named backend cannot run, or not with that row alignment.
    """
    name = storage.backend or _best()
    need = _ALIGNMENT[name]
    alignment = storage.row_alignment or need
    if alignment % need:
        raise ValueError(
            f"Storage(row_alignment={alignment}) with backend={name!r}: expected a multiple of "
            f"{need}, or None"
        )
    if storage.backend and (reason := _obstacle(name)):
        raise ValueError(f"Storage(backend={name!r}) cannot run: {reason}; expected 'xla' or None")
    return replace(storage, backend=name, row_alignment=alignment)


def resolve(storage: Storage) -> Callable:
    """The step function of a storage's backend. No device is asked for before it is called.

    Raises:
      ValueError: a named backend cannot run.
    """
    if storage.backend:
        return _step_of(settle(storage).backend)

    def step(*args: Any) -> Any:
        name = _best()
        if name == "xla":
            return xla.step(*args)
        kernels = dict.fromkeys(_LOWERED[name], lambda: _step_of(name)(*args))
        return jax.lax.platform_dependent(**kernels, default=lambda: xla.step(*args))

    return step


def _step_of(name: str | None) -> Callable:
    return import_module(f"stquant_jax.backends.{name}").step


def _best() -> str:
    """The backend for the default platform."""
    names = _CHOICE.get(jax.default_backend(), ("xla",))
    return next(name for name in names if not _obstacle(name) and not _too_old(name))


def _obstacle(name: str) -> str | None:
    """Why a backend's kernels cannot be built here, if they cannot."""
    if name == "pallas_gpu":
        return import_module("stquant_jax.backends.pallas_gpu").unsupported()
    return None


def _too_old(name: str) -> bool:
    """The default GPU has no warpgroups, which the kernels are made of (before Hopper)."""
    if name != "pallas_gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    try:
        return float(capability) < 9.0
    except ValueError:  # AMD's have a name
        return True
