"""Every Python block of the API page, run in two processes; and its tables, held against the code."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from bus import Bus, BusConfig, EmbeddedServer, embedded_server, write_key_file
from bus.config import _READERS
from examples.run_page import Block, TwoProcesses, extract, two_processes
from tests.docs.code_spans import assert_our_names_exist, table_rows

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def processes() -> AsyncIterator[TwoProcesses]:
    async with two_processes() as started:
        yield started


@pytest.mark.parametrize("block", [pytest.param(block, id=block.heading) for block in extract(PAGE)])
async def test_an_example_runs_as_it_stands(processes: TwoProcesses, block: Block) -> None:
    await processes.run(block)


async def test_every_fence_of_the_page_is_an_example_that_runs() -> None:
    assert len(re.findall(r"^\s*(?:```|~~~)", PAGE, re.MULTILINE)) == 2 * len(extract(PAGE)) > 30


TARGET = """
import torch
async def target(bus, send):
    async with await bus.create_writable(torch.zeros(4), lease_s=1) as operation:
        await send(operation.metadata)
        await operation
async def initiator(bus, grant):
    await (await bus.begin_write(grant, torch.ones(4)))
"""


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("", "defines neither target and initiator nor alone"),
        ("async def target(bus, send): ...", "defines neither target and initiator nor alone"),
        ("async def alone(bus): assert False, 'here'", "here"),
        (TARGET.replace("await send", "await operation.metadata.nothing"), "nothing"),
        (TARGET.replace("await send(operation.metadata)", "return"), "the target sent nothing"),
        (TARGET + "    assert False, 'at the very end'", "at the very end"),
        (TARGET.replace("torch.ones(4)", "torch.ones(5)"), "the grant 16"),
    ],
)
async def test_a_block_that_nobody_runs_or_that_fails_is_noticed(
    processes: TwoProcesses, source: str, why: str
) -> None:
    with pytest.raises((LookupError, AssertionError, ExceptionGroup)) as caught:
        await processes.run(Block("tried", source))
    causes = caught.value.exceptions if isinstance(caught.value, ExceptionGroup) else [caught.value]
    assert why in "\n".join(map(str, causes))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[EmbeddedServer]:
    async with embedded_server() as running:
        yield running


async def test_the_table_of_counters_is_all_that_stats_returns(server: EmbeddedServer, tmp_path: Path) -> None:
    write_key_file(tmp_path / "key")
    async with Bus.open(BusConfig(worker_id="w", nats_url=server.url, key_file=str(tmp_path / "key"))) as bus:
        counters = [name for row in table_rows(PAGE, "counter") for name in re.findall(r"`(\w+)`", row[0])]
        assert sorted(counters) == sorted(bus.stats())


async def test_the_table_of_variables_is_all_of_them_with_their_defaults() -> None:
    rows = table_rows(PAGE, "variable")
    ours = {field: variable for field, (variable, _, _) in _READERS.items()}
    assert {row[1].strip("`"): row[0].strip("`") for row in rows} == ours
    assert list(ours) == list(BusConfig.__struct_fields__)
    for variable, field, default, _ in rows:
        if default.startswith("`"):
            said = BusConfig.from_env("role", {variable.strip("`"): default.strip("`")})
            assert getattr(said, field.strip("`")) == getattr(BusConfig(worker_id="w"), field.strip("`")), variable
    assert {row[1] for row in rows if not row[2].startswith("`")} == {
        *("`worker_id`", "`key_file`"),
        *("`nats_creds`", "`nats_nkey`", "`nats_ca`", "`nats_cert`", "`nats_key`"),
    }


async def test_every_name_of_ours_on_the_page_exists() -> None:
    assert_our_names_exist(PAGE)


async def test_every_anchor_that_a_page_points_to_is_a_heading() -> None:
    titles = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    migrating = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
    wanted = re.findall(r"\]\(#([^)]+)\)", PAGE) + re.findall(r"\]\(api\.md#([^)]+)\)", migrating)
    assert len(wanted) > 15
    assert set(wanted) <= anchors
