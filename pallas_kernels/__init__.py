"""The optimizer step as Pallas kernels for TPU and GPU: grids, references and copies.

The arithmetic is `stquant_jax`'s own, the same functions that its XLA backend runs.
`stquant_jax.backends` is the only place that imports this package, and lazily.
"""
