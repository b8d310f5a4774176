"""What of a transformation's state is stored how: which arrays are quantized, and at what width."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from stquant_jax.codecs.signed import SCALE_NOT_FINITE
from stquant_jax.engine.planning import layout_for, within
from stquant_jax.engine.state_checks import RESTORE, check_codes
from stquant_jax.precision import Policy, Slots
from stquant_jax.precision.slots import MU, NU
from stquant_jax.sharding.devices import mesh_of, per_device, spec_of
from stquant_jax.sharding.specs import Sharding
from stquant_jax.storage.indexing import indexed
from stquant_jax.storage.layout import Layout, layout_of
from stquant_jax.storage.paths import leaf_names
from stquant_jax.storage.settings import Storage
from stquant_jax.wrapping.ownership import Owned, owned_leaves
from stquant_jax.wrapping.state import Quantized, QuantizedState
from stquant_jax.wrapping.store import (
    SCALE_BYTES,
    UNSIGNED_BYTES,
    Format,
    Start,
    Store,
    StoreLayout,
    decode,
    encode,
)

COUNT_BYTES = 8  # the count, and the fingerprint
WIDTH_BYTES = 4  # of a slot


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(mesh: Any, own: Store, form: Format, start: Start, store: Store) -> jax.Array:
    """`decode` on all devices. Compiled once for all arrays of a format, also where `update` is
    not."""
    specs = P(), own
    return per_device(partial(decode, form), mesh, specs, spec_of(form.leaf.axes))(start, store)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _encode(
    mesh: Any,
    own: Store,
    seed: int,
    anew: bool,
    form: Format,
    start: Start,
    store: Store,
    x: jax.Array,
    count: jax.Array,
) -> Store:
    """`encode` likewise."""

    def write(start, store, x, count):
        return encode(form, start, store, x, seed, count, anew=anew)

    specs = P(), own, spec_of(form.leaf.axes), P()
    return per_device(write, mesh, specs, own)(start, store, x, count)


@dataclass(frozen=True)
class Packing:
    """How the state of a transformation is packed, static: what lies where.

    Attributes:
      template: leaves of the transformation's state, shapes only. treedef: their tree.
      owners: of each of them, whose it is.
      where: of each slot, which of them it holds.
    """

    template: list[Any]
    treedef: Any
    owners: list[Owned | None]
    where: tuple[int, ...]
    stored: StoreLayout
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
    ) -> "Packing":
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
        # In the order of the state, whatever its keys are called.
        tree = OrderedDict((path, leaves[k]) for path, (k, _) in found.items())
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
        others = [x for k, x in enumerate(leaves) if k not in where]
        pinned = {leaf.path for leaf in layout.exact if not leaf.small}
        kept = {found[path][0] for path in pinned}
        small = [
            x
            for k, x in enumerate(leaves)
            if k not in where and k not in kept and x.size < storage.min_size
        ]
        reference = sum(4 * leaves[k].size for k in where)
        widths = _widths(layout.whole, signs, precision, reference, nbytes(others), nbytes(small))
        stored = StoreLayout(layout, signs, widths)
        return cls(leaves, treedef, owners, where, stored, mesh_of(sharding), storage.seed)

    @property
    def all_slots(self) -> range:
        return range(len(self.where))

    @property
    def store_spec(self) -> Any:
        spec: Any = spec_of((self.stored.layout.axes,))
        return Store(spec, spec, spec)

    def empty(self) -> Store:
        return per_device(self.stored.empty, self.mesh, (), self.store_spec)()

    def filled(self, leaves: list, slots: Sequence[int], store: Store) -> list:
        """The leaves, with what these slots hold in their places."""
        out, store = list(leaves), self._indexed(store)
        for slot in slots:
            x = _decode(self.mesh, self.store_spec, *self.stored.slots[slot], store)
            k = self.where[slot]
            out[k] = x.astype(self.template[k].dtype)
        return out

    def encoded(
        self, slots: Sequence[int], store: Store, leaves: list, count: jax.Array, anew: bool = False
    ) -> Store:
        """The store with these slots written, as they are among the leaves."""
        statics, store = (self.mesh, self.store_spec, self.seed, anew), self._indexed(store)
        for slot in slots:
            x = leaves[self.where[slot]]
            store = _encode(*statics, *self.stored.slots[slot], store, x, count)
        return store

    def _indexed(self, store: Store) -> Store:
        """A store that is to be read or written."""
        return store._replace(scale=indexed(store.scale, self.stored.layout.tiles))

    def state(self, count: jax.Array, leaves: list, store: Store) -> QuantizedState:
        held = set(self.where)
        inner = [Quantized() if k in held else x for k, x in enumerate(leaves)]
        widths = jnp.array(self.stored.widths, jnp.int32)
        fingerprint = jnp.uint32(self.stored.fingerprint)
        return QuantizedState(count, self.treedef.unflatten(inner), store, widths, fingerprint)

    def leaves_of(self, state: Any) -> list:
        """Of the transformation's state, `Quantized` where it is.

        Raises:
          ValueError: it is not a state of these parameters.
        """
        if not isinstance(state, QuantizedState):
            raise ValueError(
                f"state is {type(state).__name__}: expected the QuantizedState that init returned; "
                f"{RESTORE}"
            )
        held, layout = set(self.where), self.stored.layout
        check_codes("state.store.arena", state.store.arena)
        want = [_outline(Quantized() if k in held else x) for k, x in enumerate(self.template)]
        try:
            leaves = self.treedef.flatten_up_to(state.inner)
        except ValueError as error:
            raise ValueError(
                f"state.inner is another tree than these parameters need: {error}"
            ) from None
        got = [_outline(x) for x in leaves]
        template = leaf_names(self.treedef.unflatten(self.template))
        names = [f"inner.{name}" for name in template] + [*Store._fields, "steps", "widths"]
        need = jax.eval_shape(self.stored.empty)
        n = layout.devices
        want += [*(f"{x.dtype}{[n * x.shape[0], *x.shape[1:]]}" for x in need), "int32[]"]
        want.append(f"int32[{len(self.where)}]")
        got += map(_outline, (*state.store, state.steps, state.widths))
        for name, a, b in zip(names, got, want, strict=True):
            if a != b:
                raise ValueError(
                    f"state.{name} is {a}, but these parameters need {b}: expected a state of the "
                    "tree and shapes given to init, the same precision and storage"
                )
        return leaves

    def checked(self, state: QuantizedState) -> Store:
        """What a state has stored; NaN all over if it is stored by another plan.

        Raises:
          ValueError: that can be read.
        """
        of = state.fingerprint
        fits = (of == np.uint32(self.stored.fingerprint)) | (of == np.uint32(0))
        if not isinstance(fits, Tracer) and not np.all(fits):
            raise ValueError(
                f"state.fingerprint is {state.fingerprint}, but these parameters need "
                f"{self.stored.fingerprint}: expected a state of the same parameters, precision "
                "and storage"
            )
        scale = jnp.where(fits, state.store.scale, jnp.uint16(SCALE_NOT_FINITE))
        return state.store._replace(scale=scale)


def masked(x: Any, shown: bool) -> Any:
    return x if shown else optax.MaskedNode()


def nbytes(arrays: Sequence[Any]) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


def _widths(
    layout: Layout,
    signs: Sequence[bool],
    precision: Policy,
    reference: int,
    others: int,
    small: int,
) -> tuple[int, ...]:
    """Of each slot, on all devices together.

    Args:
      reference: bytes of the slots in float32. others: bytes of all else. small: of that, bytes of
        what is too small to be quantized.
    """
    leaves = layout.quantized
    # What is small, or of no parameter's shape, needs no budget.
    if not leaves and all(leaf.small for leaf in layout.exact):
        return ()
    tiles = np.array([leaf.tiles for leaf in leaves], int)
    kinds = np.where(signs, NU, MU).astype(int)
    slots = Slots(tiles, tuple(leaf.path for leaf in leaves), precision.pins, kinds)
    scales = int(np.sum(tiles * (SCALE_BYTES + UNSIGNED_BYTES * (kinds == NU))))
    fixed = others + scales + COUNT_BYTES + WIDTH_BYTES * len(leaves)
    rows, _ = within(precision, slots, fixed, reference + others, small)
    return tuple(int(width) for width in precision.first_widths(slots, rows))


def _outline(x: Any) -> str:
    if isinstance(x, Quantized):
        return "quantized"
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__
