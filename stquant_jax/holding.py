"""What of a transformation's state is stored how: which arrays are quantized, and at what width."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from stquant_jax.codecs.signed import SCALE_NOT_FINITE
from stquant_jax.devices import mesh_of, per_device, spec_of
from stquant_jax.layout import Layout, Storage, layout_of
from stquant_jax.ownership import Owned, name_of, owned_leaves
from stquant_jax.planning import layout_for
from stquant_jax.precision import Policy, Slots
from stquant_jax.precision.slots import MU, NU
from stquant_jax.sharding import Sharding
from stquant_jax.store import SCALE_BYTES, UNSIGNED_BYTES, Shelves, Store, decode, encode

COUNT_BYTES = 8  # the count, and the fingerprint


class QuantizedState(NamedTuple):
    """State of `quantize_state`: arrays only.

    Attributes:
      steps: int32[], updates done; the count that others look for is the transformation's own.
      inner: the transformation's own state, `optax.MaskedNode` in place of what is quantized.
      store: codes and scales of that.
      fingerprint: uint32[], of the shapes and widths that the store's bits mean.
    """

    steps: jax.Array
    inner: Any
    store: Store
    fingerprint: jax.Array


@dataclass(frozen=True)
class Holding:
    """What lies where: static.

    Attributes:
      template: leaves of the transformation's state, shapes only. treedef: their tree.
      owners: of each of them, whose it is.
      where: of each slot, which of them it holds.
    """

    template: list[Any]
    treedef: Any
    owners: list[Owned | None]
    where: tuple[int, ...]
    shelves: Shelves
    mesh: Any
    seed: int

    @classmethod
    def of(
        cls,
        state: Any,
        params: Any,
        precision: Policy,
        storage: Storage,
        sharding: Sharding | None,
        unsigned: str,
    ) -> "Holding":
        """For a transformation's state and its parameters, shapes only.

        Raises:
          ValueError: parameters that are no real floating arrays; as `layout_for`; a budget below
            the floor.
        """
        layout_of(params, storage)  # raises what is wrong with them
        leaves, treedef = jax.tree.flatten(state)
        owners = owned_leaves(state, params)
        found = {
            owned.path: (k, owned)
            for k, (owned, x) in enumerate(zip(owners, leaves, strict=True))
            if owned and owned.alike and jnp.issubdtype(x.dtype, jnp.floating)
        }
        tree = {path: leaves[k] for path, (k, _) in found.items()}
        if sharding is not None:
            specs = {
                path: spec_of(sharding.axes_of(owned.param, leaves[k].ndim))
                for path, (k, owned) in found.items()
            }
            sharding = replace(sharding, specs=specs)
        layout = layout_for(tree, precision, storage, sharding)
        where = tuple(found[leaf.path][0] for leaf in layout.quantized)
        signs = tuple(
            re.search(unsigned, found[leaf.path][1].prefix) is not None for leaf in layout.quantized
        )
        size = [x.size * x.dtype.itemsize for x in leaves]
        beside = sum(size) - sum(size[k] for k in where)
        float32 = {k for k, _ in found.values()}
        reference = sum(4 * x.size if k in float32 else size[k] for k, x in enumerate(leaves))
        widths = _widths(layout.whole, signs, precision, beside, reference)
        shelves = Shelves(layout, signs, widths)
        return cls(leaves, treedef, owners, where, shelves, mesh_of(sharding), storage.seed)

    @property
    def every(self) -> range:
        return range(len(self.where))

    @property
    def store_spec(self) -> Any:
        spec: Any = spec_of((self.shelves.layout.axes,))
        return Store(spec, spec, spec)

    def empty(self) -> Store:
        return per_device(self.shelves.empty, self.mesh, (), self.store_spec)()

    def filled(self, leaves: list, slots: Sequence[int], store: Store) -> list:
        """The leaves, with what these slots hold in their places."""
        parts = [self.shelves.slots[slot] for slot in slots]
        specs = [spec_of(part.leaf.axes) for part in parts]

        def read(store):
            return [decode(part, store) for part in parts]

        out = list(leaves)
        values = per_device(read, self.mesh, (self.store_spec,), specs)(store) if parts else []
        for slot, x in zip(slots, values, strict=True):
            k = self.where[slot]
            out[k] = x.astype(self.template[k].dtype)
        return out

    def encoded(
        self, slots: Sequence[int], store: Store, leaves: list, count: jax.Array, anew: bool = False
    ) -> Store:
        """The store with these slots written, as they are among the leaves."""
        parts = [self.shelves.slots[slot] for slot in slots]
        specs = [spec_of(part.leaf.axes) for part in parts]

        def write(store, values, count):
            for part, x in zip(parts, values, strict=True):
                store = encode(part, store, x, self.seed, count, anew=anew)
            return store

        own = self.store_spec
        run = per_device(write, self.mesh, (own, specs, P()), own)
        return run(store, [leaves[self.where[slot]] for slot in slots], count) if parts else store

    def state(self, count: jax.Array, leaves: list, store: Store) -> QuantizedState:
        held = set(self.where)
        inner = [masked(x, k not in held) for k, x in enumerate(leaves)]
        fingerprint = jnp.uint32(self.shelves.fingerprint)
        return QuantizedState(count, self.treedef.unflatten(inner), store, fingerprint)

    def leaves_of(self, state: Any) -> list:
        """Of the transformation's state, `optax.MaskedNode` where it is quantized.

        Raises:
          ValueError: it is not a state of these parameters.
        """
        if not isinstance(state, QuantizedState):
            raise ValueError(
                f"state is {type(state).__name__}: expected the QuantizedState that init returned"
            )
        held, layout = set(self.where), self.shelves.layout
        want = [_outline(masked(x, k not in held)) for k, x in enumerate(self.template)]
        try:
            leaves = self.treedef.flatten_up_to(state.inner)
        except ValueError as error:
            raise ValueError(
                f"state.inner is another tree than these parameters need: {error}"
            ) from None
        got = [_outline(x) for x in leaves]
        template = jax.tree_util.tree_leaves_with_path(self.treedef.unflatten(self.template))
        names = [f"inner.{name_of(path)}" for path, _ in template] + [*Store._fields, "steps"]
        need = jax.eval_shape(self.shelves.empty)
        n = layout.devices
        want += [*(f"{x.dtype}{[n * x.shape[0], *x.shape[1:]]}" for x in need), "int32[]"]
        got += [*map(_outline, state.store), _outline(state.steps)]
        for name, a, b in zip(names, got, want, strict=True):
            if a != b:
                raise ValueError(
                    f"state.{name} is {a}, but these parameters need {b}: expected a state of the "
                    "tree and shapes given to init, the same precision and storage"
                )
        return leaves

    def known(self, state: QuantizedState) -> Store:
        """What a state has stored; NaN all over if it is stored by another plan.

        Raises:
          ValueError: that can be read.
        """
        known = state.fingerprint == np.uint32(self.shelves.fingerprint)
        if not isinstance(known, Tracer) and not np.all(known):
            raise ValueError(
                f"state.fingerprint is {state.fingerprint}, but these parameters need "
                f"{self.shelves.fingerprint}: expected a state of the same parameters, precision "
                "and storage"
            )
        scale = jnp.where(known, state.store.scale, jnp.uint16(SCALE_NOT_FINITE))
        return state.store._replace(scale=scale)


def masked(x: Any, shown: bool) -> Any:
    return x if shown else optax.MaskedNode()


def _widths(
    layout: Layout, signs: Sequence[bool], precision: Policy, beside: int, reference: int
) -> tuple[int, ...]:
    """Of each slot, on all devices together.

    Args:
      beside: bytes of what is not quantized. reference: of all, in float32.
    """
    # What holds nothing of a parameter's shape needs no budget.
    if not layout.leaves:
        return ()
    leaves = layout.quantized
    tiles = np.array([leaf.tiles for leaf in leaves], int)
    kinds = np.where(signs, NU, MU).astype(int)
    slots = Slots(tiles, tuple(leaf.path for leaf in leaves), precision.pins, kinds)
    scales = int(np.sum(tiles * (SCALE_BYTES + UNSIGNED_BYTES * (kinds == NU))))
    rows = precision.rows(slots, beside + scales + COUNT_BYTES, reference)
    return tuple(int(width) for width in precision.first_widths(slots, rows))


def _outline(x: Any) -> str:
    if isinstance(x, optax.MaskedNode):
        return "quantized"
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__
