"""The comparison page: each claim of ours names tests that there are, each of theirs a place to look it up."""

import ast
import re
from pathlib import Path

import pytest

from tests.docs.test_control_plane_page import EXAMPLES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text()
TESTS = {
    node.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
}
SELF_EVIDENT = re.compile(r"^(none|not its business|since )")
"""What needs no place to look it up: that there is nothing."""


def rows_of(title: str) -> list[list[str]]:
    """The cells of a section's table."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if not line.startswith("| |")]


def missing_tests(cell: str) -> list[str]:
    """What a cell calls a test and is none."""
    named = re.findall(r"`(test_\w+)(?:\[(\w+)\])?`", cell)
    assert named, f"no test holds this: {cell}"
    return [name for name, example in named if name not in TESTS or (example and example not in EXAMPLES)]


@pytest.mark.parametrize("title", ["What both have", "What nixlbus has and FastStream lacks"])
def test_each_claim_of_ours_is_held_by_a_test_that_exists(title: str) -> None:
    rows = rows_of(title)
    assert len(rows) > 10
    assert [name for row in rows for name in missing_tests(row[3])] == []


@pytest.mark.parametrize(
    ("title", "column"),
    [
        ("What FastStream has and nixlbus lacks", 1),
        ("What both have", 1),
        ("What nixlbus has and FastStream lacks", 2),
    ],
)
def test_each_claim_about_faststream_says_where_it_stands(title: str, column: int) -> None:
    rows = rows_of(title)
    assert len(rows) > 10
    uncited = [row[0] for row in rows if not _is_cited(row[column])]
    assert uncited == []


def test_a_test_that_is_none_is_noticed() -> None:
    assert missing_tests("`test_nothing_of_the_kind`") == ["test_nothing_of_the_kind"]
    assert missing_tests("`test_an_example_of_the_control_plane_runs_as_it_stands[nothing]`") != []
    assert missing_tests("`test_an_example_of_the_control_plane_runs_as_it_stands[streams]`") == []


def _is_cited(cell: str) -> bool:
    there = re.search(r"`[\w./-]+\.(?:md|py)`|`faststream/\w+`|the same file|nats-py's", cell)
    return bool(there or SELF_EVIDENT.match(cell))
