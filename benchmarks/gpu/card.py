"""Which card and which versions, asked for in a process of its own: asking takes its memory."""

import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from benchmarks import _io
from benchmarks.gpu.setting import Setting
from stquant_jax.backends import pallas_gpu

OTHERS = ("jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "chex")
QUERY = "name,driver_version,memory.total,clocks.max.memory,clocks.max.sm,power.limit"


def environment(setting: Setting) -> Iterator[dict[str, Any]]:
    """One row.

    Raises:
      RuntimeError: the kernels cannot run here.
    """
    if reason := pallas_gpu.unsupported():
        raise RuntimeError(reason)
    if not setting.interpret and jax.default_backend() != "gpu":
        raise RuntimeError(
            f"JAX's platform is {jax.default_backend()!r}: expected 'gpu'; --interpret --out FILE "
            "runs the suite at the size of a tile without one"
        )
    row = _io.environment()
    del row["command"]  # that of this process
    device = jax.devices()[0]
    row["platform"] = device.platform
    row["compute_capability"] = getattr(device, "compute_capability", None)
    for name in OTHERS:
        try:
            row[name] = version(name)
        except PackageNotFoundError:
            row[name] = None
    if not setting.interpret:
        row["nvidia_smi"] = _ask_driver()
    yield row


def _ask_driver() -> str:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError as error:
        return f"unknown: {error}"
