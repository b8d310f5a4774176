"""From parameters and options to what is stored: the layout, the slots, the rows of the arena."""

from typing import Any

import jax

from stquant_jax import arena as rows
from stquant_jax.backends import settle
from stquant_jax.layout import Layout, Storage, layout_of
from stquant_jax.precision import Policy, Slots
from stquant_jax.precision.slots import unmatched

COUNT_BYTES = 4


def layout_for(tree: Any, precision: Policy, storage: Storage) -> Layout:
    """The layout of a tree, pins included.

    Raises:
      ValueError: as `layout_of`; a pin that matches no leaf; a backend that cannot run.
    """
    layout = layout_of(tree, settle(storage), precision.keeps_exact)
    paths = [leaf.path for leaf in layout.leaves]
    for pattern in unmatched(precision.pins, paths):
        raise ValueError(
            f"pins[{pattern!r}] matches no leaf: expected a regular expression that is found in at "
            f"least one of {', '.join(map(repr, paths[:20]))}{', ...' if len(paths) > 20 else ''}"
        )
    return layout


def slots_for(layout: Layout, precision: Policy) -> Slots:
    """What the policy is told of the layout's slots."""
    paths = tuple(leaf.path for leaf in layout.quantized for _ in rows.MOMENTS)
    return Slots(rows.slot_tiles(layout), paths, precision.pins)


def schedule_bytes(layout: Layout, precision: Policy) -> int:
    """Bytes of the step count and of the policy's part of the state."""
    slots = slots_for(layout, precision)
    state = jax.eval_shape(lambda: precision.init(slots, 0))
    return COUNT_BYTES + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def rows_for(layout: Layout, precision: Policy) -> int:
    """Rows of the arena.

    Raises:
      ValueError: the policy's budget is below the floor.
    """
    fixed = rows.fixed_bytes(layout) + schedule_bytes(layout, precision)
    return precision.rows(slots_for(layout, precision), fixed, rows.reference_bytes(layout))
