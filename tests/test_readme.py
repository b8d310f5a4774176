"""The README says what the files say: its tables are the JSON's, its example runs."""

import re

from benchmarks import tables


def test_tables_are_those_of_the_json():
    text = tables.README.read_text()
    assert tables.render(text) == text


def test_examples_run(capsys):
    """One after the other, as they are read."""
    blocks = re.findall(r"```python\n(.*?)```", tables.README.read_text(), re.DOTALL)
    assert len(blocks) > 1
    names = {}
    for block in blocks:
        exec(block, names)
    assert "optimizer state" in capsys.readouterr().out
