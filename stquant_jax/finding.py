"""Where the library's state lies in an optimizer's, and whether it is one."""

from collections.abc import Callable
from typing import Any

import jax

# What the state of `scale_by_adam_q` has: its class lives a floor above.
_FIELDS = ("count", "arena", "mu_scale", "nu_scale", "nu_row", "exact", "precision")


def is_state(x: Any) -> bool:
    """x is the state of `scale_by_adam_q` itself, not one that contains it."""
    return all(hasattr(x, field) for field in _FIELDS)


def find_state(state: Any) -> Any:
    """The one `ScaleByAdamQState` in an optimizer's state, or the state itself.

    Raises:
      ValueError: it holds none, or several.
    """
    return find_the_one(state, is_state, "ScaleByAdamQState that init returned")


def find_the_one(state: Any, is_one: Callable[[Any], bool], kind: str) -> Any:
    """The one node of a kind in an optimizer's state, or the state itself.

    Raises:
      ValueError: it holds none, or several.
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x)]
    if len(found) != 1:
        raise ValueError(
            f"state is {type(state).__name__}: expected the {kind}, or an optimizer's state that "
            f"holds one of it, not {len(found) or 'none'}"
        )
    return found[0]


def replaced(state: Any, is_one: Callable[[Any], bool], new: Any) -> Any:
    """An optimizer's state with `find_the_one`'s node replaced."""
    return jax.tree.map(lambda x: new if is_one(x) else x, state, is_leaf=is_one)
