"""Settings of all tests: reproducible examples, nothing read from an earlier run."""

import os

import hypothesis
import jax

hypothesis.settings.register_profile(
    "suite",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    max_examples=25,
)
hypothesis.settings.load_profile("suite")
jax.config.update("jax_enable_compilation_cache", False)
# Devices to make meshes of.
jax.config.update("jax_num_cpu_devices", 8)
# libtpu, where it is installed to compile for TPUs, is loaded by each process of pytest-xdist.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
