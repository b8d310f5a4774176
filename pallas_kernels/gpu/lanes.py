"""Vectors of 128 lanes: what one warpgroup of 128 threads works on, a lane a thread.

All values have one layout, so that a thread touches its own column of shared memory and nothing
else. That is why the kernel needs none of the barriers that Mosaic would put around every store:
`meet` is called where lanes do read what others wrote, and before the copy engine does.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from stquant_jax.storage.planes import LANES

LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), 1)

COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=True,
    reduction_scratch_bytes=LANES,  # a word for each of the four warps, and alignment
)

meet = plgpu.commit_smem


def vector(x: jax.Array | float, dtype=None) -> jax.Array:
    """A scalar in all lanes, or a vector whose layout is left open, in the layout of all others."""
    return plgpu.layout_cast(jnp.broadcast_to(jnp.asarray(x, dtype), (LANES,)), LAYOUT)


def lane_index() -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=LAYOUT)
