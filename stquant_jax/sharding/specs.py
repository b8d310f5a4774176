"""Which device has which part of which leaf: meshes and partition specs, given or found out."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stquant_jax.storage.paths import ROOT, leaf_names

Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)  # by what the specs say, see `_key`
class Sharding:
    """How parameters, and with them the state, are divided among the devices of a mesh.

    Every device keeps the state of its own parts of the leaves, in an arena of its own, and updates
    them without a word to the others; leaves that are replicated along an axis of the mesh are
    updated alike along it. Parts that are whole tiles (`stquant.plan` says which are not) have the
    same bits on any mesh.

    Attributes:
      mesh: a `jax.sharding.Mesh`, its axes Auto or Explicit.
      specs: a PartitionSpec (or a NamedSharding's, or None for replicated) for every parameter: a
        tree like the parameters, or one for any branch of it, or one for all.
      zero_axis: None, or a mesh axis, or several, along which parameters are replicated: their
        state is split along it, each device updates its part, and the updates are gathered
        (ZeRO-1, Rajbhandari et al., arXiv 1910.02054). Leaves of which no axis divides into whole
        tiles keep a replica each.

    Raises:
      ValueError: not a mesh; axes that it does not have; specs that are none.
    """

    mesh: Mesh | AbstractMesh
    specs: Any
    zero_axis: str | tuple[str, ...] | None = None

    def __post_init__(self):
        if not isinstance(self.mesh, (Mesh, AbstractMesh)):
            raise ValueError(f"Sharding(mesh={self.mesh!r}): expected a jax.sharding.Mesh")
        if not _are_axes(self.zero_axis or (), self.mesh):
            raise ValueError(
                f"Sharding(zero_axis={self.zero_axis!r}): expected axes of the mesh, of "
                f"{self.mesh.axis_names}, each once at most"
            )
        _ = self._by_path  # raises what is wrong with them

    @cached_property
    def _key(self) -> Any:
        return self.mesh, tuple(sorted(self._by_path.items())), self.zero_axes

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sharding) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def zero_axes(self) -> tuple[str, ...]:
        return _names(self.zero_axis or ())

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    def axes_of(self, path: str, ndim: int) -> Axes:
        """Of a parameter: the mesh axes that divide each of its axes.

        Raises:
          ValueError: there is no spec for it, or one of more axes than it has.
        """
        specs = self._by_path
        fitting = [p for p in specs if p in (ROOT, path) or path.startswith(f"{p}.")]
        if not fitting:
            raise ValueError(f"specs has nothing for leaf {path!r}: expected a PartitionSpec")
        spec = specs[max(fitting, key=lambda p: (p != ROOT, len(p)))]
        if len(spec) > ndim:
            raise ValueError(
                f"specs has {spec} for leaf {path!r} of {ndim} axes: expected no more entries"
            )
        entries = [*spec, *[None] * (ndim - len(spec))]
        return tuple((x,) if isinstance(x, str) else tuple(x or ()) for x in entries)

    def candidates(self, path: str, shape: tuple[int, ...]) -> list[Axes]:
        """Divisions of a leaf's state, the best first, the parameter's own last: along
        ``zero_axis`` too, the longest part first."""
        axes, sizes = self.axes_of(path, len(shape)), self.sizes
        used = {name for names in axes for name in names}
        free = tuple(name for name in self.zero_axes if name not in used)
        if not free:
            return [axes]

        def length(i):
            parts = 1
            for name in axes[i] + free:
                parts *= sizes[name]
            return -1 if shape[i] % parts else shape[i] // parts

        order = sorted(range(len(shape)), key=length, reverse=True)
        split = [(*axes[:i], axes[i] + free, *axes[i + 1 :]) for i in order if length(i) > 0]
        return [*split, axes]

    @cached_property
    def _by_path(self) -> dict[str, P]:
        """Specs by their paths; once, for every leaf asks for its own."""

        def is_spec(x):
            return x is None or isinstance(x, (P, NamedSharding))

        names, leaves = leaf_names(self.specs, is_spec), jax.tree.leaves(self.specs, is_spec)
        found = {}
        for name, spec in zip(names, leaves, strict=True):
            spec = P() if spec is None else spec.spec if isinstance(spec, NamedSharding) else spec
            if not isinstance(spec, P):
                raise ValueError(
                    f"Sharding(specs=...) has {type(spec).__name__} at {name!r}: "
                    "expected a PartitionSpec, a NamedSharding or None"
                )
            entries = [entry or () for entry in spec]
            if not _are_axes(entries, self.mesh):
                raise ValueError(
                    f"Sharding(specs=...) has {spec} at {name!r}: expected axes of the "
                    f"mesh, of {self.mesh.axis_names}, each once at most"
                )
            found[name] = spec
        return found


UNKNOWN = object()


def _names(entry: Any) -> tuple[Any, ...]:
    """Of an entry of a spec: one name, or several."""
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def _are_axes(entries: Any, mesh: Any) -> bool:
    """All names in them are axes of the mesh, and none comes twice."""
    flat = [name for entry in _names(entries) for name in _names(entry)]
    return len(set(flat)) == len(flat) and set(flat) <= set(mesh.axis_names)


def sharding_of(tree: Any) -> Any:
    """The sharding that arrays, ShapeDtypeStructs or tracers carry: None where all are on one
    device, `UNKNOWN` where they are on a mesh that leaves it to the compiler.

    Raises:
      ValueError: leaves on several meshes, or with a sharding that is no NamedSharding.
    """
    mesh, specs = None, []
    for name, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        found = _named(name, x)
        if found is UNKNOWN:
            return UNKNOWN
        specs.append(found.spec if found else P())
        if found and mesh is not None and mesh != found.mesh:
            raise ValueError(
                f"leaf {name!r} lies on {found.mesh}, others on {mesh}: expected all on one mesh"
            )
        mesh = found.mesh if found else mesh
    if mesh is None:
        return None
    return Sharding(mesh, jax.tree.unflatten(jax.tree.structure(tree), specs))


def sharding_for(tree: Any, given: Sharding | None) -> Sharding | None:
    """The sharding that was given, or that of arrays or ShapeDtypeStructs.

    Raises:
      ValueError: neither tells it.
    """
    return ShardingResolver(given).at_update(tree)


def _named(name: str, x: Any) -> Any:
    """A leaf's NamedSharding; None if it is on one device, or one device's part already."""
    traced = isinstance(x, Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        if sharding is None or len(sharding.device_set) == 1:
            return None
        raise ValueError(
            f"leaf {name!r} has a {type(sharding).__name__}: expected a NamedSharding, or the "
            "argument sharding=stquant.Sharding(mesh, specs)"
        )
    mesh = sharding.mesh
    if mesh.empty:
        return None
    types = set(mesh.axis_types)
    if types == {AxisType.Manual}:
        return None
    if traced and types != {AxisType.Explicit}:
        return UNKNOWN if mesh.size > 1 else None
    return sharding if mesh.size > 1 or AxisType.Explicit in types else None


class ShardingResolver:
    """Finds the mesh and specs of an optimizer's parameters: those given, or those it saw.

    Under jit with Auto axes nothing tells how arrays are divided. What `init` was given outside of
    jit does, so that is remembered, by the paths and shapes of the leaves.
    """

    def __init__(self, given: Sharding | None):
        if given is not None and not isinstance(given, Sharding):
            raise ValueError(f"sharding={given!r}: expected None or a stquant.Sharding")
        self._given = given
        self._seen: dict[Any, Any] = {}

    def at_init(self, tree: Any) -> Sharding | None:
        if self._given is not None:
            return self._given
        found = sharding_of(tree)
        key = _key(tree)
        if found is UNKNOWN:
            return self._remembered(key)
        seen = self._seen.setdefault(key, found)
        if seen is UNKNOWN or seen != found:
            self._seen[key] = UNKNOWN  # which of the two an update is for, it cannot tell
        return found

    def at_update(self, tree: Any) -> Sharding | None:
        if self._given is not None:
            return self._given
        found, key = sharding_of(tree), _key(tree)
        if found is UNKNOWN or isinstance(self._seen.get(key), Sharding):
            return self._remembered(key)
        return found

    def _remembered(self, key: Any) -> Sharding:
        found = self._seen.get(key)
        if not isinstance(found, Sharding):
            raise ValueError(
                "sharding=None, but the arrays lie on a mesh with Auto axes, which does not tell "
                "under jit how they are divided: expected sharding=stquant.Sharding(mesh, specs), "
                "with specs=PartitionSpec() if all are replicated; or one call of init outside of "
                "jit, on the sharded parameters themselves"
            )
        return found


def _key(tree: Any) -> Any:
    shapes = [getattr(x, "shape", None) for x in jax.tree.leaves(tree)]
    return tuple(zip(leaf_names(tree), shapes, strict=True))
