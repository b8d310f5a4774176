"""The README and docs/ say what the files say. That their Python runs, see conftest.py."""

import re
from pathlib import Path

import pytest

import stquant_jax
from benchmarks import tables

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_tables_are_those_of_the_json():
    text = tables.README.read_text()
    assert tables.render(text) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [to for to in links if "://" not in to and not (page.parent / to).exists()]
    assert not missing, missing


def test_all_public_names_have_a_place_in_the_reference():
    named = re.findall(r"^\.\. auto\w+:: (\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(named) == stquant_jax.__all__
