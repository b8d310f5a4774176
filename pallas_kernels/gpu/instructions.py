"""Instructions of the card that Pallas has no name for.

`reciprocal` and `root` are the special functions' own, off by one or two in the last place; their
arguments and results below 2**-126 are zero. Interpreted they are exact. JAX has no public way to
lower a primitive in its kernels; `floor` is JAX's own where a version has a rule for it.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu import core, lowering
from jax.experimental.mosaic.gpu import FragmentedArray, LoweringSemantics
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir.dialects import math

from stquant_jax.storage.numerics import Arithmetic


def _lowered(primitive: Primitive, of_register: Callable) -> None:
    def rule(ctx: Any, x: Any, **_: Any) -> Any:
        return lowering._ensure_fa(x, ctx.avals_in[0].dtype)._pointwise(of_register)

    lowering.register_lowering_rule(primitive, LoweringSemantics.Lane)(rule)


def _instruction(name: str, interpreted: Callable) -> Callable:
    """Of float32 vectors: an instruction of PTX in a kernel, a function of JAX anywhere else."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(interpreted, multiple_results=False))
    _lowered(primitive, FragmentedArray._lift_fast_instr(name))
    return primitive.bind


reciprocal = _instruction("rcp.approx.ftz.f32", lambda x: 1.0 / x)
root = _instruction("sqrt.approx.ftz.f32", jnp.sqrt)

SPECIAL = Arithmetic(divide=lambda x, y: x * reciprocal(y), sqrt=root)


def ensure_floor() -> None:
    """Add the rule of `floor`, unless there is one."""
    semantics = (LoweringSemantics.Lane, core.PrimitiveSemantics.Warpgroup)
    if lax.floor_p not in lowering.mosaic_lowering_rules[semantics]:
        _lowered(lax.floor_p, math.floor)
