"""Where the library's state lies in an optimizer's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from stquant_jax.engine.checks import check_precision
from stquant_jax.engine.planning import layout_for
from stquant_jax.engine.state import is_state
from stquant_jax.engine.state_checks import check_state
from stquant_jax.precision import Policy
from stquant_jax.sharding.specs import Sharding, sharding_for
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.paths import masked, unboxed
from stquant_jax.storage.settings import Storage


class Found(NamedTuple):
    """A `ScaleByAdamQState` in an optimizer's state, and what it is of."""

    state: Any  # the optimizer's
    own: Any
    params: Any
    layout: Layout
    sharding: Sharding | None


def find(
    state: Any,
    params: Any,
    precision: Policy,
    storage: Storage,
    sharding: Sharding | None,
    mask: Any = None,
    advice: str = "",
) -> Found:
    """The one `ScaleByAdamQState` in an optimizer's state, seen to be that of these parameters.

    Args:
      state, params: arrays or ShapeDtypeStructs, in boxes or not.
      precision, storage, sharding: those the optimizer was made with.
      mask: as for `optax.masked`. advice: what may be the matter where it does not fit.

    Raises:
      ValueError: the state was built for other parameters, another storage or sharding, or holds no
        `ScaleByAdamQState`, or several; nothing tells the sharding.
    """
    check_precision(precision, storage)
    state, params = unboxed(state), unboxed(params)
    own = find_state(state)
    here = sharding_for(params, sharding)
    layout = layout_for(masked(params, mask), precision, storage, here)
    check_state(own, layout, advice=advice)
    return Found(state, own, params, layout, here)


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
