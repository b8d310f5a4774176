"""The fused update on TPU: one kernel for a leaf, whose grid runs over chunks of eight tiles."""

from pallas_kernels.tpu.chunks import CHUNK, Chunks
from pallas_kernels.tpu.update import Buffers, Numbers, update_leaf

__all__ = ["CHUNK", "Buffers", "Chunks", "Numbers", "update_leaf"]
