"""Meshes of eight devices, and ways to divide one small model among them."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import stquant_jax as stquant

# One leaf of every kind, and every way in which parts lie in their leaf.
SHAPES = {
    "wide": (256, 1024),  # groups along the rows
    "stack": (2, 256, 512),  # bands of a part come in runs
    "deep": (4, 256, 128),  # lanes of a part come in runs
    "folded": (128, 192),
    "flat": (16, 2048),
    "bias": (512,),
    "scale": (96,),
}

SPECS = {
    "data": P(),
    "fsdp": {
        "wide": P(None, "a"),
        "stack": P(None, "a"),
        "deep": None,
        "flat": P("a"),
        "bias": P("a"),
        "folded": None,
        "scale": None,
    },
    "fsdp+tensor": {
        "wide": P("b", "a"),
        "stack": P(None, "b", "a"),
        "deep": P(None, "b", "a"),
        "folded": P("b"),
        "flat": P("b"),
        "bias": P("b"),
        "scale": P("a"),
    },
    "data+fsdp+tensor": {
        "wide": P("b", "c"),
        "stack": P(None, "b", "c"),
        "deep": P(None, "b", "c"),
        "folded": P("c"),
        "flat": P(("b", "c")),
        "bias": P("c"),
        "scale": P(),
    },
}


class Case(NamedTuple):
    """A way to divide the model."""

    name: str
    shape: tuple[int, ...]
    specs: str
    zero_axis: str | None = None
    axis_type: AxisType = AxisType.Auto

    @property
    def mesh(self) -> jax.sharding.Mesh:
        names = ("a", "b", "c")[: len(self.shape)]
        return jax.make_mesh(self.shape, names, axis_types=(self.axis_type,) * len(names))

    @property
    def sharding(self) -> stquant.Sharding:
        return stquant.Sharding(self.mesh, SPECS[self.specs], self.zero_axis)

    def put(self, tree: dict[str, Any]) -> dict[str, jax.Array]:
        """Arrays by the leaves' names, divided as their parameters."""
        return {name: jax.device_put(x, self.of(name)) for name, x in tree.items()}

    def of(self, name: str) -> NamedSharding:
        specs = SPECS[self.specs]
        spec = specs if isinstance(specs, P) else specs[name]
        return NamedSharding(self.mesh, spec or P())


CASES = [
    Case("zero", (8,), "data", zero_axis="a"),
    Case("fsdp", (8,), "fsdp", axis_type=AxisType.Explicit),
    Case("two axes", (4, 2), "fsdp+tensor"),
    Case("three axes, zero", (2, 2, 2), "data+fsdp+tensor", "a", AxisType.Explicit),
]


def gradients(count: int) -> dict[str, np.ndarray]:
    """Of one step: scales that differ along both axes, an idle leaf part, a rare large element."""
    random = np.random.default_rng(count)
    grads = {}
    for name, shape in SHAPES.items():
        x = random.standard_normal(shape) * np.exp(random.standard_normal(shape[-1:]))
        x *= np.exp(2 * random.standard_normal((shape[0], *[1] * (len(shape) - 1))))
        grads[name] = (1e-3 * x).astype(np.float32)
    grads["wide"][:32, :128] = 0
    return grads
