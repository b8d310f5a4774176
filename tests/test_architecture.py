"""The house's plan: who may import whom, what importing does, and what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "stquant_jax"

# From the ground up: a module imports from lower floors alone.
FLOORS = (
    {"numerics", "planes", "ownership", "programs", "finding", "peers"},
    {"layout", "noise", "rounding", "sharding"},
    {"places", "shards", "devices", "codecs", "arena", "blocks"},
    {"rules", "precision", "apply"},
    {"backends"},
    {"checks", "planning", "moments", "store"},
    {"transform", "solo", "holding"},
    {"fusing", "quantize"},
    {"optimizers", "interop", "introspect", "telemetry", "resizing", "placement", "records"},
    {"portable", "wrapped"},
    {"__init__"},
)
# Mechanism, algebra, policy: none knows the others.
STORAGE = {"planes", "layout", "noise", "rounding", "places", "shards", "codecs", "arena", "blocks"}
ROOMS = (STORAGE, {"rules"}, {"precision"})


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, `from x import y` as x.y."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(path: Path) -> str:
    """The module of the package, or the folder in it, that a file belongs to."""
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
MODULES = {module_of(path) for path in FILES}
FLOOR = {module: i for i, floor in enumerate(FLOORS) for module in floor}


def edges(path: Path) -> set[str]:
    """Modules of the package that a file imports, other than its own."""
    parts = (name.split(".") for name in imports(path) if name.split(".")[0] == PACKAGE)
    return {part[1] if part[1] in MODULES else "__init__" for part in parts} - {module_of(path)}


def test_every_module_has_a_floor():
    assert MODULES <= FLOOR.keys(), "place the new module on a floor of this file's table"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    module = module_of(path)
    for other in edges(path):
        assert FLOOR[other] < FLOOR[module] or {module, other} <= STORAGE, f"{module} <- {other}"


def test_storage_has_no_cycle():
    """On its floor too, imports run one way."""
    left = {module_of(path): edges(path) & STORAGE for path in FILES if module_of(path) in STORAGE}
    while left:
        free = {module for module, needed in left.items() if not needed & left.keys()}
        assert free, f"a cycle among {sorted(left)}"
        left = {module: needed for module, needed in left.items() if module not in free}


def test_mechanism_algebra_and_policy_are_strangers():
    room = {module: i for i, modules in enumerate(ROOMS) for module in modules}
    for path in FILES:
        for other in edges(path) & room.keys():
            module = module_of(path)
            assert room.get(module, room[other]) == room[other], f"{module} imports {other}"


def test_kernels_are_for_backends_alone():
    for path in FILES:
        kernels = {name for name in imports(path) if name.startswith("pallas_kernels")}
        assert not kernels or module_of(path) == "backends", path
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith(PACKAGE)}
        assert not ours & {"backends", "transform", "optimizers", "precision", "introspect"}


def test_the_oracle_is_independent():
    """It imports nothing of ours, nor of JAX."""
    for path in (ROOT / "tests").glob("oracle*.py"):
        allowed = {"math", "typing", "numpy", "tests"}
        assert {name.split(".")[0] for name in imports(path)} <= allowed
        names = {name for name in imports(path) if name.startswith("tests")}
        assert all(name.startswith("tests.oracle") for name in names)


def test_import_initialises_no_device():
    """Nor does it import the kernels, or a library that is only an extra."""
    code = f"""
import sys
import {PACKAGE}
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
extras = "pallas_kernels", "flax", "matplotlib", "sklearn", "jaxtyping", "beartype", "chex"
loaded = [name for name in extras if name in sys.modules]
assert "pallas_kernels" not in loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names():
    """All of them documented, with what they raise."""
    import stquant_jax

    for name in stquant_jax.__all__:
        assert getattr(stquant_jax, name).__doc__, name
    assert sorted(stquant_jax.__all__) == stquant_jax.__all__


def test_wheel(tmp_path):
    """It holds the two packages, the marker of their types, and nothing else."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {PACKAGE, "pallas_kernels"}
    sources = {
        str(path.relative_to(ROOT))
        for package in (PACKAGE, "pallas_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == sources and f"{PACKAGE}/py.typed" in names
