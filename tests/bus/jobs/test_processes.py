"""Workers in processes of their own that are killed: no job is lost, and none that is done is done again."""

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bus import Bus, EmbeddedServer
from tests.bus.jobs.queues import LONG_S, Task, queue, until, until_dead

ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def worker(
    server: EmbeddedServer, worker_id: str, name: str, journal: Path, mode: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    program = str(Path(__file__).with_name("worker_process.py"))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        program,
        server.url,
        worker_id,
        name,
        str(journal),
        mode,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        async with asyncio.timeout(LONG_S):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.stdin.close()
            try:
                async with asyncio.timeout(LONG_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def noted(journal: Path, what: str) -> list[tuple[int, str, int]]:
    lines = journal.read_text().splitlines() if journal.exists() else []
    fields = [line.split() for line in lines if line.startswith(what)]
    return [(int(number), worker_id, int(delivery)) for _, number, worker_id, delivery in fields]


@pytest.mark.parametrize("name", ["job-{}", ""])
async def test_killing_a_worker_loses_no_job_and_does_no_done_job_again(
    server: EmbeddedServer, caller: Bus, tmp_path: Path, name: str
) -> None:
    config, journal = queue(ack_wait_s=1.5), tmp_path / "journal"
    for number in range(60):
        await caller.submit(config, Task(number=number), job_id=name.format(number))
    async with worker(server, "victim", config.queue, journal, "effect") as victim:
        await until(lambda: len(noted(journal, "effect")) >= 10)
        victim.kill()
        await victim.wait()
    finished_by_victim = {number for number, _, _ in noted(journal, "effect")}
    async with worker(server, "heir", config.queue, journal, "effect"):
        await until(lambda: len({number for number, _, _ in noted(journal, "effect")}) == 60)
    effects = Counter(number for number, _, _ in noted(journal, "effect"))
    assert set(effects) == set(range(60)), "a job was lost"
    again = {number for number, count in effects.items() if count > 1}
    assert len(finished_by_victim - again) >= len(finished_by_victim) - 4, "done jobs were done again"
    assert again <= finished_by_victim, "a job was done twice that the victim had not finished"
    redelivered = {number for number, _, delivery in noted(journal, "start") if delivery > 1}
    assert len(redelivered) <= 4, "more was redelivered than the victim had in hand"


@pytest.mark.parametrize("name", ["killer", ""])
async def test_a_job_that_kills_its_workers_ends_in_the_dead_letters(
    server: EmbeddedServer, caller: Bus, tmp_path: Path, name: str
) -> None:
    config, journal = queue(ack_wait_s=1.5, max_deliver=3), tmp_path / "journal"
    receipt = await caller.submit(config, Task(number=1), job_id=name)
    for attempt in range(3):
        async with worker(server, f"w{attempt}", config.queue, journal, "die") as process:
            async with asyncio.timeout(LONG_S):
                assert await process.wait() == -signal.SIGKILL
    async with worker(server, "survivor", config.queue, journal, "die") as process:
        (letter,) = await until_dead(caller, config)
        assert process.returncode is None
    assert [delivery for _, _, delivery in noted(journal, "start")] == [1, 2, 3]
    assert (letter.code, letter.deliveries, letter.job_id) == ("deliveries_exhausted", 3, receipt.job_id)


@pytest.mark.parametrize("name", ["job", ""])
async def test_a_stopped_worker_s_job_goes_to_another_and_it_learns_so_before_its_effect(
    server: EmbeddedServer, caller: Bus, tmp_path: Path, name: str
) -> None:
    config, journal = queue(ack_wait_s=1.5), tmp_path / "journal"
    async with worker(server, "frozen", config.queue, journal, "fenced") as frozen:
        await caller.submit(config, Task(number=1), job_id=name)
        await until(lambda: bool(noted(journal, "start")))
        frozen.send_signal(signal.SIGSTOP)
        try:
            async with worker(server, "heir", config.queue, journal, "effect"):
                await until(lambda: bool(noted(journal, "effect")))
                frozen.send_signal(signal.SIGCONT)
                await asyncio.sleep(0.6)
        finally:
            frozen.send_signal(signal.SIGCONT)
    assert noted(journal, "start") == [(1, "frozen", 1), (1, "heir", 2)]
    assert noted(journal, "effect") == [(1, "heir", 2)]
    assert await caller.dead_letters.list(queue=config.queue) == []


async def test_a_stopped_worker_without_a_claim_does_not_settle_what_another_has_done(
    server: EmbeddedServer, caller: Bus, tmp_path: Path
) -> None:
    config, journal = queue(ack_wait_s=1.5), tmp_path / "journal"
    async with worker(server, "heir", config.queue, journal, "effect") as heir:
        heir.send_signal(signal.SIGSTOP)
        async with worker(server, "frozen", config.queue, journal, "effect") as frozen:
            await asyncio.sleep(1)  # until the requests of the one that is stopped have ended
            await caller.submit(config, Task(number=1))
            await until(lambda: bool(noted(journal, "start")))
            frozen.send_signal(signal.SIGSTOP)
            assert noted(journal, "effect") == []
            heir.send_signal(signal.SIGCONT)
            await until(lambda: bool(noted(journal, "effect")))
            frozen.send_signal(signal.SIGCONT)
            await until(lambda: len(noted(journal, "effect")) == 2)  # it had no checkpoint
        await until(lambda: bool(noted(journal, "end")))
        assert noted(journal, "end") == [(0, "frozen", 1)], "it took the job for its own"
    assert noted(journal, "end")[1] == (1, "heir", 0)
    assert sorted(noted(journal, "start")) == [(1, "frozen", 1), (1, "heir", 2)]
    assert await caller.dead_letters.list(queue=config.queue) == []


async def test_a_job_that_came_while_its_worker_was_stopped_is_not_run_when_another_has_done_it(
    server: EmbeddedServer, caller: Bus, tmp_path: Path
) -> None:
    config, journal = queue(ack_wait_s=1.5), tmp_path / "journal"
    async with worker(server, "frozen", config.queue, journal, "effect") as frozen:
        await asyncio.sleep(0.2)
        frozen.send_signal(signal.SIGSTOP)
        try:
            await caller.submit(config, Task(number=1))  # into its socket, for a request that has not ended
            await asyncio.sleep(0.6)
            async with worker(server, "heir", config.queue, journal, "effect"):
                await until(lambda: bool(noted(journal, "effect")))
                frozen.send_signal(signal.SIGCONT)
                await asyncio.sleep(0.6)
        finally:
            frozen.send_signal(signal.SIGCONT)
    assert noted(journal, "start") == [(1, "heir", 2)]
    assert sorted(noted(journal, "end")) == [(0, "frozen", 1), (1, "heir", 0)]
