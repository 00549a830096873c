"""Every Python block of the page on durable work, run; and its tables, held against the code."""

import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from bus import Bus, BusConfig, JobQueueConfig, RequestRefused, embedded_server
from bus.jobs.streams import Streams
from examples.run_page import Block, extract
from schemas.fault import FaultCode
from tests.bus.jobs.queues import Task, opened, stoppable_server, until, until_dead
from tests.docs.code_spans import assert_our_names_exist, table_rows

PAGE = (Path(__file__).parents[2] / "docs" / "durable-work.md").read_text()
TESTS = (Path(__file__).parents[1] / "bus" / "jobs").glob("test_*.py")


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    async with (
        embedded_server() as server,
        Bus.open(BusConfig(worker_id="page", nats_url=server.url), data_plane=False) as opened,
    ):
        yield opened


@pytest.mark.parametrize("block", [pytest.param(block, id=block.heading) for block in extract(PAGE)])
async def test_an_example_runs_as_it_stands(bus: Bus, tmp_path: Path, block: Block) -> None:
    async with asyncio.timeout(20):
        await _loaded(tmp_path / f"example_{abs(hash(block.source))}.py", block.source).alone(bus)


def test_every_python_fence_is_an_example_that_runs() -> None:
    assert PAGE.count("```python") == len(extract(PAGE)) == 4


def test_the_table_of_settings_is_all_of_them_with_their_defaults() -> None:
    rows = {name: row[1] for row in table_rows(PAGE, "setting") for name in re.findall(r"`(\w+)`", row[0])}
    ours = {field.name: field.default for field in fields(JobQueueConfig)}
    assert list(rows) == list(ours)
    assert [default for name, default in rows.items() if ours[name] is MISSING] == ["required"] * 3
    assert {name: default for name, default in rows.items() if ours[name] is not MISSING} == {
        name: f"`{default}`" for name, default in ours.items() if default is not MISSING
    }


def test_the_tests_that_the_page_names_exist() -> None:
    sources = "\n".join(path.read_text() for path in TESTS)
    named = {name for row in table_rows(PAGE, "what happens") for name in re.findall(r"`(test_\w+)`", row[2])}
    assert len(named) > 8
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_the_names_in_jetstream_are_those_of_the_code() -> None:
    streams = Streams("nixlbus", 1, 60)
    table = " ".join(row[0] for row in table_rows(PAGE, "name"))
    for name in (streams.jobs.name, streams.dead_letters.name, streams.claims.name[3:], streams.media_bucket):
        assert f"`{name}`" in table


def test_every_name_of_ours_on_the_page_exists() -> None:
    of_nats = r"`[^`\n]*(NIXLBUS_(JOBS|DLQ|CLAIMS|MEDIA)\b(?!_TTL)|Nixlbus-)[^`\n]*`"
    assert_our_names_exist(
        re.sub(of_nats, "", PAGE).replace("`idempotent_handler=True`", ""), frozenset({"Transcoder"})
    )


def test_every_anchor_is_a_heading() -> None:
    titles = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors


@pytest.mark.parametrize("what", ["submit", "work", "look after dead letters", "put and get media"])
async def test_the_rights_that_the_page_names_are_enough(tmp_path: Path, what: str) -> None:
    config = JobQueueConfig(graph="g", queue="q", message_type=Task)
    (cell,) = [row[1] for row in table_rows(PAGE, "to") if row[0] == what]
    rights = [right.replace("<graph>", "g").replace("<queue>", "q") for right in re.findall(r"`([^`]+)`", cell)]
    users = (
        "authorization { users: [ {user: admin, password: p}, {user: w, password: p, permissions: "
        f'{{publish: {json.dumps(rights)}, subscribe: ["_INBOX.w.>"]}}}} ] }}'
    )
    async with (
        stoppable_server(tmp_path, users) as server,
        opened(server.url.replace("//", "//admin:p@"), "admin") as admin,
        opened(server.url.replace("//", "//w:p@"), "w") as bus,
    ):
        seen = list[int]()

        async def handler(task: Task) -> None:
            seen.append(task.number)
            if task.number == 0:
                raise RequestRefused(FaultCode.NOT_FOUND, "no")

        worker = await admin.work(config, handler)
        await admin.submit(config, Task(number=0))
        await until(lambda: worker.stats.num_dead == 1)
        await admin.media.put("there", b"the bucket")
        if what == "submit":
            await bus.submit(config, Task(number=1))
            await until(lambda: seen == [0, 1])
        elif what == "work":
            await worker.drain(5)
            ours = await bus.work(config, handler)
            for number in (0, 1):
                await admin.submit(config, Task(number=number))
            await until(lambda: (ours.stats.num_done, ours.stats.num_dead) == (1, 1))
        elif what == "look after dead letters":
            (letter,) = await bus.dead_letters.list()
            await bus.dead_letters.replay(letter.sequence)
            await until(lambda: seen == [0, 0])
            (letter,) = await until_dead(admin, config)
            await bus.dead_letters.drop(letter.sequence)
        else:
            reference = await bus.media.put("there", b"replaced")
            assert await bus.media.get(reference) == b"replaced"
            await bus.media.delete(reference)


def _loaded(path: Path, source: str) -> Any:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # msgspec looks annotations up there
    spec.loader.exec_module(module)
    return module
