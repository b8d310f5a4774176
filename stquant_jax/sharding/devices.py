"""What each device does with its own parts, and how arrays are divided among devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stquant_jax.sharding.specs import Axes, Sharding
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.numerics import in_32_bits


def per_device(f: Callable, mesh: Any, in_specs: Any, out_specs: Any) -> Callable:
    """``f`` on every device's own parts; without a mesh, ``f``. In 32 bits, either."""
    f = in_32_bits(f)
    if mesh is None:
        return f
    mapped = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,  # replicas compute alike what it could not prove to be alike
    )
    if not _explicit(mesh):
        return mapped

    def call(*args):  # with Explicit axes nothing is moved unasked
        return mapped(*jax.sharding.reshard(args, shardings(mesh, in_specs, args)))

    return call


def shardings(mesh: Any, specs: Any, tree: Any) -> Any:
    """A NamedSharding for every leaf of a tree, by a spec for every branch of it."""

    def of(spec, branch):
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), branch)

    return jax.tree.map(of, specs, tree, is_leaf=lambda x: isinstance(x, P))


def divided(x: jax.Array, mesh: Any, spec: P) -> jax.Array:
    """An array, divided so."""
    if mesh is None:
        return x
    constrain = jax.sharding.reshard if _explicit(mesh) else lax.with_sharding_constraint
    return constrain(x, NamedSharding(mesh, spec))


def _explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types


def mesh_of(sharding: Sharding | None) -> Any:
    return sharding and sharding.mesh


def spec_of(axes: Axes) -> P:
    """The spec that divides each axis of an array along these axes of the mesh."""
    return P(*(names[0] if len(names) == 1 else names or None for names in axes))


def part_specs(layout: Layout) -> list[P]:
    """How each leaf's state, and with it the gradient, is divided."""
    return [spec_of(leaf.axes) for leaf in layout.leaves]


def whole_replicas(
    leaves: Sequence[jax.Array], layout: Layout, sharding: Sharding | None
) -> list[jax.Array]:
    """Arrays divided as the parameters are, of ones divided as the state is, along the zero axis
    too."""
    if sharding is None:
        return list(leaves)
    out = []
    for x, leaf in zip(leaves, layout.leaves, strict=True):
        axes = sharding.axes_of(leaf.path, len(leaf.shape))
        if leaf.axes != axes:
            x = divided(x, sharding.mesh, spec_of(axes))
        out.append(x)
    return out
