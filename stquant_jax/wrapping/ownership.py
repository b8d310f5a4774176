"""Which arrays of an optimizer's state belong to which parameter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from stquant_jax.storage.paths import leaf_names, leaf_parts, name_of


class Owned(NamedTuple):
    """A leaf of a state that belongs to a parameter.

    Attributes:
      path: of the leaf. prefix: of the tree of the parameters' structure that it is in.
      param: path of the parameter. index: of the parameter, among the leaves.
      alike: it has the parameter's shape.
    """

    path: str
    prefix: str
    param: str
    index: int
    alike: bool


def owned_leaves(
    state: Any, params: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[Owned | None]:
    """Of each leaf of a state, in tree order, the parameter whose path its own path ends with, if
    there is any; the longest, if there are several."""
    owners = {parts: i for i, parts in enumerate(leaf_parts(params))}
    names, shapes = leaf_names(params), [x.shape for x in jax.tree.leaves(params)]
    found: list[Owned | None] = []
    leaves = jax.tree.leaves(state, is_leaf=is_leaf)
    for parts, x in zip(leaf_parts(state, is_leaf), leaves, strict=True):
        # Ends of the path, the longest first.
        cut = next((i for i in range(len(parts) + 1) if parts[i:] in owners), None)
        if cut is None:
            found.append(None)
            continue
        i = owners[parts[cut:]]
        prefix = ".".join(parts[:cut])
        alike = getattr(x, "shape", None) == shapes[i]
        found.append(Owned(name_of(parts), prefix, names[i], i, alike))
    return found
