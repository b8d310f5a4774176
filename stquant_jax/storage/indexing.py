"""What can be traced and not run: more than int32 can tell apart.

Offsets and sums are int32. Shapes alone must not fail, for `jax.eval_shape` asks what a state would
be; a program that would go wrong is refused when it is compiled, or where it is run uncompiled.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from stquant_jax.storage.planes import GROUP

# No array has more rows than there are of nu, 32 to a tile: an arena has 16 at most.
MOST_TILES = (2**31 - 1) // GROUP


def indexed(x: jax.Array, tiles: int) -> jax.Array:
    """``x``, if so many tiles on one device can be indexed; or else a program that needs it is
    refused."""
    if tiles <= MOST_TILES:
        return x
    return traced_only(
        x,
        f"one device has {tiles:,} tiles of 4096 elements: expected at most {MOST_TILES:,}, the "
        "rows of which int32 can tell apart; divide the parameters among more devices, "
        "sharding=stquant.Sharding(mesh, specs)",
    )


def traced_only(x: jax.Array, reason: str) -> jax.Array:
    """``x``; what it is needed for can be traced, but raises ValueError when it is compiled."""
    return _refused.bind(x, reason=reason)


def wrapped(x: int) -> int:
    """Modulo 2**32, as the int32 that such a number wraps to."""
    return (x + 2**31) % 2**32 - 2**31


def _refuse(*_: Any, reason: str) -> Any:
    raise ValueError(reason)


_refused = Primitive("stquant_refused")
_refused.def_abstract_eval(lambda x, reason: x)
_refused.def_impl(_refuse)
mlir.register_lowering(_refused, _refuse)
batching.defvectorized(_refused)
