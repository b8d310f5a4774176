"""Names of leaves as people write them, ``layers.0.kernel``, however a tree spells its keys.

Flax's variables and boxes put an attribute ``value`` at the end of a path, at `init` and not at
`update`: what is alone in its box is called by the box.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey

ROOT = "(root)"  # the name of a tree that is one leaf

_BOXED = (GetAttrKey("value"),)

Parts = tuple[str, ...]


def leaf_parts(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Parts]:
    """The keys on the way to each leaf, in tree order."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf)]
    beside = Counter(path[:-1] for path in paths if path)
    return [
        _parts(path[:-1] if path[-1:] == _BOXED and beside[path[:-1]] == 1 else path)
        for path in paths
    ]


def leaf_names(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The name of each leaf, in tree order."""
    return [name_of(parts) for parts in leaf_parts(tree, is_leaf)]


def name_of(parts: Parts) -> str:
    return ".".join(parts) or ROOT


def unboxed(tree: Any) -> Any:
    """The same with arrays in place of Flax's variables and boxes."""

    def of(x: Any) -> Any:
        inside = _inside(x)
        return x if inside is x else of(inside)

    return jax.tree.map(of, tree, is_leaf=lambda x: _inside(x) is not x)


def _inside(x: Any) -> Any:
    """What is in a box; x itself if it is none."""
    children = jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda y: y is not x)
    alone = len(children) == 1 and children[0][0] == _BOXED
    boxed = alone and not isinstance(x, tuple)  # a state of one field is no box
    return children[0][1] if boxed else x


def masked(params: Any, mask: Any) -> Any:
    """The parameters that a mask, as `optax.masked` takes it, lets through; None elsewhere."""
    if mask is None:
        return params
    shown = mask(params) if callable(mask) else mask
    return jax.tree.map(lambda m, p: p if m else None, shown, params)


def trained(params: Any, updates: Any) -> Any:
    """The parameters that there are updates for: where an update is None, so are they. Equinox's
    models have functions there."""
    if params is None or jax.tree.structure(params) == jax.tree.structure(updates):
        return params
    try:
        return jax.tree.map(
            lambda u, p: None if u is None else p, updates, params, is_leaf=lambda x: x is None
        )
    except ValueError as error:
        raise ValueError(
            f"params is another tree than grads: expected one like it ({error})"
        ) from None


def _parts(path: tuple) -> Parts:
    keys = []
    for entry in path:
        key = getattr(entry, "key", None)
        # Of `flax.traverse_util.flatten_dict`, whose keys are paths themselves.
        keys += key if isinstance(key, tuple) else [jax.tree_util.keystr((entry,), simple=True)]
    return tuple(map(str, keys))
