"""What every benchmark writes next to its figures: where, when and with what they were taken."""

import datetime
import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def cpu_model() -> str:
    """The processor's name, from /proc/cpuinfo where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Machine kind, versions, date and command line of this run."""
    options = [arg if not Path(arg).is_absolute() else Path(arg).name for arg in sys.argv[1:]]
    parts = Path(sys.argv[0]).with_suffix("").parts
    roots = [i for i, part in enumerate(parts) if part in ("benchmarks", "examples")]
    module = ".".join(parts[roots[-1] if roots else -2 :])
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "optax", "numpy")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *options]),
    }


def read_json(path: Path) -> dict[str, Any]:
    """What an earlier run wrote; empty when there was none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes `record` whole or not at all, so that a run can be cut short at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
