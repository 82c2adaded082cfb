"""The conformance table names tests that exist, one at least for every row."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "conformance.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| operation", "| ---"))
]
NAME = re.compile(r"`([\w/]+\.py)::([\w:]+)`")


def names_in(path: Path) -> set[str]:
    """Test functions and classes of a file, methods as ``Class::method``; inherited ones count for their class."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def test_there_is_a_table():
    assert len(ROWS) > 40


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_row_is_whole_and_its_tests_exist(row):
    assert len(row) == 5
    assert all(row)
    tests = NAME.findall(row[4])
    assert tests, row[4]
    for file, name in tests:
        assert name in names_in(ROOT / "tests" / file), f"{file}::{name}"
        assert name.split("::")[-1].startswith(("test_", "Test")), name


@pytest.mark.parametrize("test", NAME.findall((ROOT / "docs" / "reliability.md").read_text()), ids="::".join)
def test_what_holds_a_promise_of_reliability_exists(test):
    file, name = test
    assert name in names_in(ROOT / "tests" / file)
