"""The house's plan: who may import whom, what importing does, and what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "stquant_jax"

# From the ground up: a module imports from lower floors, and from its own folder.
FLOORS = (
    {"storage"},
    {"codecs", "precision", "rules", "sharding"},
    {"backends"},
    {"engine"},
    {"solo", "wrapping"},
    {"inspection"},
    {"conversion"},
    {"__init__"},
)
# Policies know numbers of slots, not where these lie; rules know no bits.
OF_STORAGE = {
    "precision": {"indexing", "numerics"},
    "rules": {"layout", "noise", "numerics", "places", "planes", "settings", "tiling"},
}
MOST_MODULES = 10
MOST_LINES = {PACKAGE: 300, "pallas_kernels": 400}


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


def folder_of(path: Path) -> str:
    """The folder of the package that a file is in, or "__init__"."""
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
FLOOR = {folder: i for i, floor in enumerate(FLOORS) for folder in floor}


def edges(path: Path) -> set[tuple[str, str]]:
    """Folder and module of all of the package that a file imports."""
    names = {name for name in imports(path) if name.split(".")[0] == PACKAGE}
    return {tuple([*name.split(".")[1:3], "", ""][:2]) for name in names}


def test_every_folder_has_a_floor():
    """And holds no more than one can take in."""
    assert {folder_of(path) for path in FILES} == FLOOR.keys()
    for folder in FLOOR:
        modules = [path for path in FILES if path.parent.name == folder and path.stem[0] != "_"]
        assert len(modules) <= MOST_MODULES, folder


def test_no_module_is_too_long():
    long = {
        str(path.relative_to(ROOT)): lines
        for package, most in MOST_LINES.items()
        for path in (ROOT / package).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > most
    }
    assert not long


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    folder = folder_of(path)
    for other, _ in edges(path):
        floor = FLOOR.get(other, FLOOR["__init__"])
        assert other == folder or floor < FLOOR[folder], f"{path.name} imports {other}"


@pytest.mark.parametrize("folder", sorted(FLOOR.keys() - {"__init__"}))
def test_no_cycle_inside_a_folder(folder):
    left = {
        path.stem: {module for other, module in edges(path) if other == folder} - {path.stem}
        for path in FILES
        if folder_of(path) == folder and path.stem != "__init__"
    }
    while left:
        free = {module for module, needed in left.items() if not needed & left.keys()}
        assert free, f"a cycle among {sorted(left)}"
        left = {module: needed for module, needed in left.items() if module not in free}


def test_mechanism_algebra_and_policy_are_strangers():
    for path in FILES:
        allowed = OF_STORAGE.get(folder_of(path))
        of_storage = {module for folder, module in edges(path) if folder == "storage"}
        assert allowed is None or of_storage <= allowed, path


def test_kernels_are_for_backends_alone():
    for path in FILES:
        kernels = {name for name in imports(path) if name.startswith("pallas_kernels")}
        assert not kernels or folder_of(path) == "backends", path
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith(PACKAGE)}
        assert ours <= {"storage", "codecs", "rules"}, path


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
