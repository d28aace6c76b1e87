"""The tables of README and manual are those of the committed results."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("tables", ROOT / "tests/benchmarks/tables.py")
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_committed_results(page):
    """After new results: tests/benchmarks/tables.py --write."""
    text = page.read_text(encoding="utf-8")
    assert tables.PLACE.search(text) and tables.filled(text) == text


def test_every_table_is_on_a_page():
    named = [name for page in tables.PAGES for name in re.findall("<!-- table: (.+?) -->", page.read_text())]
    assert sorted(named) == sorted(tables.TABLES)
