"""Settings of all tests: reproducible examples, nothing read from an earlier run; a program that
many tests need alike is compiled once.

Blocks of Python in the README and in docs/ are tests too: those of a page run one after the other,
in one namespace.
"""

import doctest
import gc
import os
import platform
import subprocess
import sys
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
# Programs run a few times only: compiling them is what takes time. For processes that tests start,
# too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
disabled = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
jax.config.update("jax_disable_most_optimizations", disabled)

# It takes a third of that where XLA emits loops as it used to. Products and sums would then be
# rounded as one here and apart there, and bits differ between programs: it has to do without
# instructions that do both, which is said for x86 alone.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX"


def pytest_addoption(parser):
    parser.addoption("--once", action="store_true", help="every kind of thing once: see below")
    parser.addoption(
        "--quick", action="store_true", help="compile in a third of the time: see above"
    )


def pytest_configure(config):
    """Before XLA reads its flags, once. One that it does not know would end the process."""
    if not config.getoption("--quick") or hasattr(config, "workerinput"):
        return  # workers of pytest-xdist have the environment of who started them
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"}
    probe = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.make_cpu_client()"]
    if not subprocess.run(probe, env=os.environ | flags, capture_output=True).returncode:
        os.environ |= flags


def pytest_collection_modifyitems(config, items):
    """Nearly all time is XLA's, for the programs of one more case. With --once a test has its first
    case, but for tables of mistakes, which compile nothing; README stands for all pages; what is
    marked `thorough` is left out."""
    if not config.getoption("--once"):
        return
    seen, kept, left = set(), [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        again = test in seen and item.path.stem not in TABLES
        page = item.path.suffix == ".md" and item.path.stem != "README"
        (left if again or page or item.get_closest_marker("thorough") else kept).append(item)
        seen.add(test)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


TABLES = {"test_misuse", "test_errors", "test_architecture", "test_docs", "test_layout"}


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
