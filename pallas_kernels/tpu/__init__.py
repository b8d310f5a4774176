"""The fused update on TPU: one kernel for a leaf, whose grid runs over chunks of eight tiles."""

from pallas_kernels.leaves import Tables, leaf_of, matrix_of
from pallas_kernels.tpu.chunks import CHUNK, Chunks
from pallas_kernels.tpu.update import update_leaf

__all__ = ["CHUNK", "Chunks", "Tables", "leaf_of", "matrix_of", "update_leaf"]
