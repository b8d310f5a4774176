"""What the sections work on: full sizes on a GPU, a tile under the interpreter."""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stquant_jax as stquant
from benchmarks.shapes import SETS, VOCABULARY, WIDTH, Shapes, blocks

Tree = dict[str, jax.Array]
ONE_TILE: Shapes = {"kernel": (32, 128), "bias": (40,)}


def gpt3_xl(width: int = 2048, layers: int = 24, context: int = 2048) -> Shapes:
    """GPT-3 XL (Brown et al., 2020), 1.3B parameters: GPT-2 small's blocks made wider."""
    wide = {
        path: tuple(n // WIDTH * width for n in shape) for path, shape in blocks(layers).items()
    }
    return {"wte.embedding": (VOCABULARY, width), "wpe.embedding": (context, width), **wide}


@dataclass(frozen=True)
class Setting:
    """Whether kernels are interpreted on a CPU, and all that follows from it."""

    interpret: bool = False
    deadline: float = float("inf")  # of the section, by `time.monotonic`

    def storage(self, backend: str = "pallas_gpu", interpret: Any = True) -> stquant.Storage:
        """``interpret`` is what the interpreter is given, where there is one."""
        kernels = backend == "pallas_gpu"
        return stquant.Storage(
            backend=backend, interpret=interpret if kernels and self.interpret else False
        )

    def shapes(self, name: str) -> Shapes:
        return ONE_TILE if self.interpret else {**SETS, "gpt3-xl": gpt3_xl()}[name]

    @property
    def left(self) -> float:
        """Seconds of the section."""
        return self.deadline - time.monotonic()


def gaussian(shapes: Shapes, seed: int = 0, scale: float = 1e-3, dtype: Any = jnp.float32) -> Tree:
    """Made on the device: 1.3B numbers take long to get there."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    draw = jax.jit(
        lambda key, shape: scale * jax.random.normal(key, shape, dtype), static_argnums=1
    )
    return {name: draw(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def stored_bytes(params: Any, precision: stquant.Policy, storage: stquant.Storage) -> int:
    """Bytes of a state that a step touches: all but the rows of the arena that no slot uses."""
    report = stquant.plan(params, precision, storage)
    return report.total_bytes - report.free_bytes


def unequal(a: Any, b: Any) -> float:
    """Share of the numbers of two arrays that differ, by their bits."""
    x, y = (np.asarray(z) for z in (a, b))
    kind = f"u{x.dtype.itemsize}"
    return float(np.mean(x.view(kind) != y.view(kind))) if x.size else 0.0
