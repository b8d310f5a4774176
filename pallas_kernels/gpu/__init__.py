"""The optimizer step on Nvidia GPUs from Hopper on: Mosaic kernels."""

from pallas_kernels.gpu.calls import Tables, update
from pallas_kernels.gpu.geometry import Stored

__all__ = ["Stored", "Tables", "update"]
