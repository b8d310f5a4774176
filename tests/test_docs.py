"""The README and docs/ say what the files say. That their Python runs, see conftest.py."""

import json
import re
from pathlib import Path

import pytest

import stquant_jax
from benchmarks import first_page, tables

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_those_of_the_json(page):
    text = page.read_text()
    assert tables.render(text) == text


def test_every_table_has_one_place():
    text = "\n".join(page.read_text() for page in tables.PAGES)
    starts, ends = (sorted(re.findall(rf"<!-- {end}(\w+) -->", text)) for end in ("", "/"))
    assert starts == ends == sorted(tables.MAKERS)


def test_a_table_that_nothing_makes_is_an_error():
    with pytest.raises(ValueError, match="qualty --> is no table: expected one of first_page"):
        tables.render("<!-- qualty -->\n<!-- /qualty -->")


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_picture_of_the_first_page(tmp_path):
    """Bars as long as the states that the committed runs had."""
    curves, bars = first_page.plot(tmp_path / "picture.png").axes
    runs = json.loads((ROOT / "benchmarks/results/train_gpt.json").read_text())
    names = [text.get_text() for text in curves.get_legend().get_texts()]
    assert names[0] == first_page.BASE and len(names) == 3
    assert [bar.get_width() for bar in bars.patches] == [
        runs[name]["state_bytes"] / 1e6 for name in names
    ]
    assert (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [to for to in links if "://" not in to and not (page.parent / to).exists()]
    assert not missing, missing


def test_all_public_names_have_a_place_in_the_reference():
    page = (ROOT / "docs/reference/api.md").read_text()
    named = re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE)
    assert sorted(named) == stquant_jax.__all__
