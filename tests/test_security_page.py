"""SECURITY.md: every threat names a test that covers it, and every test that it names is there."""

import ast
import re

import pytest
from checkout import ROOT

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| threat")]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_there_are_rows():
    assert len(ROWS) > 20


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:40])
def test_a_row_is_whole_and_its_tests_exist(row):
    threat, left_open, closed_by, tests = (cell.strip() for cell in row.strip("|").split(" | "))
    assert threat
    assert left_open
    assert closed_by
    named = NAMED.findall(tests)
    assert named, threat
    assert not NAMED.sub("", tests).strip(), "only tests stand in the last column"
    for path, function in named:
        assert (ROOT / path).is_file(), path
        assert not function or function in functions(path), f"{path}::{function}"


def test_what_the_page_names_elsewhere_exists():
    for path, function in NAMED.findall(PAGE):
        assert (ROOT / path).is_file()
        assert not function or function in functions(path)
