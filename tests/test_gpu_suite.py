"""The GPU suite without a GPU: all sections at the size of a tile; sections that fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _io
from benchmarks.gpu import suite as gpu_suite
from stquant_jax.backends import pallas_gpu

ROOT = Path(__file__).parent.parent
reason = pallas_gpu.unsupported()


@pytest.mark.parametrize("out", [[], ["--out", str(_io.RESULTS / "gpu_suite.json")]])
def test_interpreted_times_are_no_results(out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--interpret", *out])
    with pytest.raises(SystemExit):
        gpu_suite.main()
    assert "outside of results" in capsys.readouterr().err


def test_a_section_that_fails():
    """It says why, and costs nothing else."""
    record = {}
    assert not list(gpu_suite.run_section("environment", 60, False, record))
    assert record["ended"] == "failed with code 1"
    assert (reason or "expected 'gpu'") in record["told"]


def test_a_section_that_hangs(monkeypatch):
    slow = gpu_suite.SECTIONS["races"]._replace(seconds=0.2)
    monkeypatch.setitem(gpu_suite.SECTIONS, "races", slow)
    record = {}
    assert not list(gpu_suite.in_process("races", 0.2, record))
    assert record["ended"].startswith("stopped at its limit")


def test_no_time_left():
    record = {}
    assert not list(gpu_suite.run_section("gpt2", 3, False, record))
    assert record["ended"] == "not started: no time left"


@pytest.mark.skipif(bool(reason), reason=f"backend 'pallas_gpu': {reason}")
def test_all_sections(tmp_path):
    out = tmp_path / "suite.json"
    command = [sys.executable, "-m", "benchmarks.gpu.suite", "--interpret", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    record = json.loads(out.read_text())
    sections = record["sections"]
    assert {"jax", "date", "devices", "command"} <= record["environment"].keys()
    assert list(sections) == list(gpu_suite.SECTIONS)
    assert {name: section["ended"] for name, section in sections.items()} == dict.fromkeys(
        sections, "done"
    )
    rows = {name: section["rows"] for name, section in sections.items()}

    (parity,) = rows["parity"]
    assert parity["update_difference"] < 1e-5
    assert set(parity["words_unequal"].values()) == {0.0}
    (memory,) = rows["memory"]
    assert memory["guard_untouched"] and memory["runs_that_differ"] == 0
    assert memory["donated_buffers"] > 6
    assert [row["races"] for row in rows["races"]] == [False]
    for name in ("gpt2", "gpt3-xl"):
        *copies, contender = rows[name]
        assert all(row["gb_per_second"] > 0 for row in copies)
        assert contender["ns_per_element"] > 0 and contender["optax_ns_per_element"] > 0
        assert "failed" not in contender
    assert [row["seconds"]["total"] > 0 for row in rows["compilation"]] == [True, True]
    adamw, ours = rows["training"]
    assert adamw["steps"] == ours["steps"] == 2
    assert adamw["loss"][0] == ours["loss"][0]
    assert ours["state_bytes"] < adamw["state_bytes"]
