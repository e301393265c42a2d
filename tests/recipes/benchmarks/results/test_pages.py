"""Every published figure is what its record says."""

import pytest
from project import ROOT

from recipes.benchmarks.results.front import TABLES, replaced
from recipes.benchmarks.results.pages import pages

PAGES = pages()


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_page_is_what_the_records_say(file):
    assert file.read_text(encoding="utf-8") == PAGES[file], "run `python -m recipes.benchmarks.results`"


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_readme_are_small(name):
    header, _, *rows = TABLES[name]().splitlines()
    assert 1 <= len(rows) <= 6
    assert {row.count("|") for row in rows} == {header.count("|")}


def test_a_table_takes_the_place_of_what_stands_between_its_marks():
    text = "before <!-- table: speed -->\nold\n<!-- table: end --> after"
    found = replaced(text)
    assert found.startswith("before <!-- table: speed -->\n\n|")
    assert found.endswith("|\n\n<!-- table: end --> after")
    assert "old" not in found
    assert replaced(found) == found


def test_marks_that_are_not_closed_are_an_error():
    with pytest.raises(ValueError, match="is not followed by `<!-- table: end -->`"):
        replaced("<!-- table: top -->\nall of the rest")
