"""The optimizer step as Pallas kernels for TPU and GPU. None is written yet.

Kernels share the codec and rule functions of `stquant_jax` and plug in behind the signature of
`stquant_jax.backends`, the only place that imports this package, and lazily.
"""
