"""A lowering of `floor`, which Mosaic GPU lacks so far: one instruction there.

JAX has no public way to add one. Where a version has its own rule, that one is used.
"""

from jax import lax
from jax._src.pallas.mosaic_gpu import core, lowering
from jax.experimental.mosaic.gpu import LoweringSemantics
from jaxlib.mlir.dialects import math


def _floor(ctx, x, **_):
    return lowering._ensure_fa(x, ctx.avals_in[0].dtype)._pointwise(math.floor)


def ensure() -> None:
    """Add the rule, unless there is one."""
    semantics = (LoweringSemantics.Lane, core.PrimitiveSemantics.Warpgroup)
    if lax.floor_p not in lowering.mosaic_lowering_rules[semantics]:
        lowering.register_lowering_rule(lax.floor_p, LoweringSemantics.Lane)(_floor)
