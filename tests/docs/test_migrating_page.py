"""The migration page: its example of ours runs, its other one compiles, and every name of ours exists."""

import re
from pathlib import Path

import pytest

from examples.run_page import extract, two_processes
from tests.docs.code_spans import assert_our_names_exist, table_rows

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()

THEIRS = frozenset({"Connector", "Connection", "Remote", "SerializedDescriptor"})


async def test_the_example_of_ours_runs_and_the_other_compiles() -> None:
    blocks = extract(PAGE)
    assert len(re.findall(r"^\s*(?:```|~~~)", PAGE, re.MULTILINE)) == 2 * len(blocks) == 4
    before, after = blocks
    assert "from dynamo.nixl_connect import" in before.source
    compile(before.source, "before", "exec")
    async with two_processes() as processes:
        await processes.run(after)


def test_every_name_of_ours_on_the_page_exists() -> None:
    rows = table_rows(PAGE, r"`dynamo.nixl_connect`")
    assert len(rows) > 30
    theirs_left_out = PAGE
    for row in rows:
        theirs_left_out = theirs_left_out.replace(f"| {row[0].removeprefix('| ')} |", "| |", 1)
    assert_our_names_exist(theirs_left_out, THEIRS)


@pytest.mark.parametrize(
    "span",
    [
        "bus.nothing",
        "bus.arena.nothing",
        "operation.nothing",
        "Nothing",
        "Bus.nothing",
        "nothing=True",
        "NIXLBUS_NOTHING",
    ],
)
def test_a_name_that_is_not_ours_is_noticed(span: str) -> None:
    assert_our_names_exist("`bus.claim`")
    with pytest.raises(AssertionError, match=re.escape(span)):
        assert_our_names_exist(f"`bus.claim` `{span}`")
