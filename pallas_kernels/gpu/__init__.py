"""The optimizer step on Nvidia GPUs from Hopper on: Mosaic kernels."""

from pallas_kernels.gpu.calls import update
from pallas_kernels.leaves import Tables

__all__ = ["Tables", "update"]
