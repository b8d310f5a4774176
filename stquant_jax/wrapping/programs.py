"""What the program of a transformation tells: which of its results are zero, and whether it treats
every parameter by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from stquant_jax.storage.paths import leaf_names

SHARED = 0  # what depends on no parameter; otherwise a set of parameters, as the bits of an integer


def check_leafwise(
    update: Callable, updates: Any, state: Any, params: Any, owners: Sequence[int | None]
) -> None:
    """Raise ValueError if an update, or a part of the state, of one parameter depends on another's,
    or what belongs to none depends on any.

    Args:
      update: ``(updates, state, params) -> (updates, state)``.
      updates, state, params: its arguments; arrays or their shapes. params may be None.
      owners: of each leaf of the state, the index of its parameter.
    """
    program = jax.make_jaxpr(update)(updates, state, params).jaxpr
    names = leaf_names(updates)
    each = [1 << i for i in range(len(names))]
    of_state = [SHARED if i is None else each[i] for i in owners]
    inputs = each + of_state + (each if params is not None else [])
    depends = dict(zip(program.invars, inputs, strict=True))

    def of(atom):
        return SHARED if isinstance(atom, Literal) else depends.get(atom, SHARED)

    for equation in program.eqns:
        union = SHARED
        for atom in equation.invars:
            union |= of(atom)
        depends.update((var, union) for var in equation.outvars)
    for atom, own in zip(program.outvars, each + of_state, strict=True):
        if others := of(atom) & ~own:
            other = names[others.bit_length() - 1]
            what = f"of {names[own.bit_length() - 1]!r}" if own else "that all parameters share"
            raise ValueError(
                f"leafwise=True, but in this transformation something {what} depends on {other!r}: "
                "expected one that treats every parameter by itself; leave leafwise=False"
            )


def zero_outputs(f: Callable, *args: Any) -> list[bool]:
    """Of each leaf that ``f(*args)`` returns, whether it is known to be zero, whatever the values
    of the arguments."""
    program = jax.make_jaxpr(f)(*args).jaxpr
    zeros = set()
    for equation in program.eqns:
        if equation.primitive.name == "broadcast_in_dim":
            (value, *_) = equation.invars
            if isinstance(value, Literal) and value.val == 0:
                zeros.update(equation.outvars)
    return [not isinstance(atom, Literal) and atom in zeros for atom in program.outvars]
