"""Which arrays of an optimizer's state belong to which parameter."""

from typing import Any, NamedTuple

import jax


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


def name_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def owned_leaves(state: Any, params: Any) -> list[Owned | None]:
    """Of each leaf of a state, in tree order, the parameter whose path its own path ends with, if
    there is any; the longest, if there are several."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    owners = {name_of(path): (i, x.shape) for i, (path, x) in enumerate(leaves)}
    found: list[Owned | None] = []
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        # Ends of the path, the longest first.
        ends = (name_of(path[i:]) for i in range(len(path) + 1))
        cut, end = next(((i, e) for i, e in enumerate(ends) if e in owners), (0, None))
        if end is None:
            found.append(None)
            continue
        index, shape = owners[end]
        found.append(Owned(name_of(path), name_of(path[:cut]), end, index, x.shape == shape))
    return found
