"""`python -m benchmarks` lists what there is."""

from pathlib import Path

from benchmarks import tables
from benchmarks.__main__ import BENCHMARKS

FOLDER = Path(tables.__file__).parent


def test_all_that_run_are_listed():
    runs = {
        ".".join(path.relative_to(FOLDER).with_suffix("").parts)
        for path in FOLDER.rglob("*.py")
        if path.stem != "__main__" and 'if __name__ == "__main__"' in path.read_text()
    }
    assert {x.module for x in BENCHMARKS} == runs


def test_what_they_make_are_tables():
    made = [name for x in BENCHMARKS for name in x.tables]
    assert len(set(made)) == len(made) and set(made) <= tables.MAKERS.keys()
