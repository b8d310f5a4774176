"""From parameters and options to what is stored: the layout, the slots, the rows of the arena."""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stquant_jax.backends import settle
from stquant_jax.precision import Policy, PrecisionState, Slots
from stquant_jax.precision.slots import unmatched
from stquant_jax.sharding.shards import part_of
from stquant_jax.sharding.specs import Sharding
from stquant_jax.storage import arena as rows
from stquant_jax.storage.layout import Layout, Leaf, layout_of
from stquant_jax.storage.settings import Storage

COUNT_BYTES = 4


def layout_for(
    tree: Any, precision: Policy, storage: Storage, sharding: Sharding | None = None
) -> Layout:
    """The layout of a tree, pins included: of one device's parts where it is sharded.

    Raises:
      ValueError: as `layout_of`; a pin that matches no leaf; a backend that cannot run; a sharding
        that does not fit. A tree without leaves, as Optax's wrappers make them, is no error.
    """
    storage = settle(storage)
    layout = layout_of(tree, storage, precision.keeps_exact)
    paths = [leaf.path for leaf in layout.leaves]
    for pattern in unmatched(precision.pins, paths) if paths else ():
        raise ValueError(
            f"pins[{pattern!r}] matches no leaf: expected a regular expression that is found in at "
            f"least one of {', '.join(map(repr, paths[:20]))}{', ...' if len(paths) > 20 else ''}"
        )
    if sharding is None:
        return layout
    parts = tuple(_part(leaf, storage, sharding) for leaf in layout.leaves)
    divided = {name for part in parts for name in part.all_axes}
    axes = tuple(name for name in sharding.mesh.axis_names if name in divided)
    return Layout(parts, axes, int(np.prod([sharding.sizes[name] for name in axes])))


def _part(leaf: Leaf, storage: Storage, sharding: Sharding) -> Leaf:
    """Along the zero axis too, if that leaves whole tiles."""
    *zero, own = sharding.candidates(leaf.path, leaf.shape)
    for axes in zero if leaf.tiles else ():
        part = part_of(leaf, axes, sharding.sizes, storage)
        if part.tiles and part.cut and part.cut.whole:
            return part
    return part_of(leaf, own, sharding.sizes, storage)


def slots_for(layout: Layout, precision: Policy) -> Slots:
    """What the policy is told of the layout's slots: all devices' tiles."""
    paths = tuple(leaf.path for leaf in layout.quantized for _ in rows.MOMENTS)
    return Slots(rows.slot_tiles(layout.whole), paths, precision.pins)


def schedule_bytes(layout: Layout, precision: Policy) -> int:
    """Bytes of what belongs to no leaf: the step count and the policy's part of the state."""
    slots = slots_for(layout, precision)
    state = jax.eval_shape(lambda: precision.init(slots, 0))
    none_exact = 8 * (layout.exact_columns - layout.exact_size)
    schedule = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return COUNT_BYTES + none_exact + schedule


def rows_for(layout: Layout, precision: Policy) -> int:
    """Rows that the policy may fill, of all devices together.

    It knows nothing of the sharding, so that plans do not depend on it.

    Raises:
      ValueError: the policy's budget is below the floor.
    """
    return rows_and_rest(layout, precision)[0]


def rows_and_rest(layout: Layout, precision: Policy) -> tuple[int, int]:
    """Rows that the policy may fill, and bytes of the small leaves if they come on top of the
    budget; see `within`."""
    if not layout.quantized:
        return 0, layout.whole.exact_size * rows.EXACT_BYTES
    whole = layout.whole
    fixed = rows.fixed_bytes(whole) + schedule_bytes(whole, precision)
    small = sum(leaf.size for leaf in whole.exact if leaf.small) * rows.EXACT_BYTES
    return within(precision, slots_for(whole, precision), fixed, rows.reference_bytes(whole), small)


def within(
    precision: Policy, slots: Slots, fixed: int, reference: int, small: int
) -> tuple[int, int]:
    """Rows of all leaves together. Where that is below the floor only because of leaves that are
    too small to be quantized, rows of the others, and the bytes of the small ones, which then come
    on top.

    Args:
      fixed: bytes of all that is stored beside the arena. reference: bytes of all in float32.
      small: of them those of small leaves, the same in both.
    """
    try:
        return precision.rows(slots, fixed, reference), 0
    except ValueError:
        if not small:
            raise
    return precision.rows(slots, fixed - small, reference - small), small


def resumed(state: PrecisionState, layout: Layout, precision: Policy) -> PrecisionState:
    """A precision state as it is to go on: the policy's first if it was reset to zeros, as
    `jax.tree.map(jnp.zeros_like, state)` does it. No plan has a mu of width 0 otherwise."""
    if not layout.quantized:
        return state
    first = precision.init(slots_for(layout, precision), rows_for(layout, precision))
    reset = jnp.all(state.plan.widths == 0)
    return jax.tree.map(lambda new, old: jnp.where(reset, new, old), first, state)


def restarted(state: Any, layout: Layout, precision: Policy) -> Any:
    """A concrete `ScaleByAdamQState`, with the policy's first plan if it was reset to zeros.

    Raises:
      ValueError: that plan does not fit its arena.
    """
    if not layout.quantized or np.any(state.precision.plan.widths):
        return state
    capacity, held = capacity_for(layout, precision), len(state.arena) // layout.devices
    if capacity != held:
        raise ValueError(
            f"the state was reset to zeros, and precision={precision!r} fills {capacity} rows, not "
            f"its {held}: expected the precision that the optimizer was made with"
        )
    return state._replace(precision=resumed(state.precision, layout, precision))


def capacity_for(layout: Layout, precision: Policy) -> int:
    """Rows of one device's arena: what any plan of `rows_for` rows takes there at most.

    Where all leaves are divided alike that is this device's share of them. Replicated leaves take
    more of a device than of the whole, and a plan may give them as much as it likes.
    """
    free = rows_for(layout, precision)
    if not layout.axes:
        return free
    slots, here = slots_for(layout, precision), rows.slot_tiles(layout)
    narrowest, widest = slots.narrowest, slots.widest
    free -= int(np.sum(slots.tiles * narrowest))
    need = Fraction(int(np.sum(here * narrowest)))
    share = [Fraction(int(t), int(n)) for t, n in zip(here, slots.tiles, strict=True)]
    for slot in sorted(range(len(share)), key=lambda slot: -share[slot]):
        more = min(int(slots.tiles[slot] * (widest - narrowest)[slot]), free)
        need, free = need + share[slot] * more, free - more
    return int(need)
