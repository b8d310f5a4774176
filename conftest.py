"""Settings of all tests: reproducible examples, nothing read from an earlier run; a program that
many tests need alike is compiled once.

Blocks of Python in the README and in docs/ are tests too: those of a page run one after the other,
in one namespace.
"""

import doctest
import gc
import os
import tempfile
from pathlib import Path

import hypothesis
import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

hypothesis.settings.register_profile(
    "suite",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    max_examples=25,
)
hypothesis.settings.load_profile("suite")
# All but the quickest programs are kept for all processes of this run, in a folder that goes with
# it.
if "STQUANT_TESTS_PROGRAMS" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="stquant-tests-")
    os.environ["STQUANT_TESTS_PROGRAMS"] = folder.name
jax.config.update("jax_compilation_cache_dir", os.environ["STQUANT_TESTS_PROGRAMS"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
# Devices to make meshes of.
jax.config.update("jax_num_cpu_devices", 8)
# libtpu, where it is installed to compile for TPUs, is loaded by each process of pytest-xdist.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# A process may have 65,530 mappings of memory on Linux, and every compiled program takes some.
MAPPINGS = Path("/proc/self/maps")
MANY = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Programs of a module are dropped after it, if there are many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()


collect_ignore = ["docs/conf.py"]  # for Sphinx alone
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS)],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
).pytest()
