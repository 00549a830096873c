"""Dead letters: listing, showing, replaying, dropping, by the API and by the command."""

import asyncio

import pytest

from bus import Bus, DeadLetterNotFound, EmbeddedServer, JobQueueConfig, RequestRefused, current_job
from schemas.codec import encode
from schemas.fault import FaultCode
from schemas.jobs import JOB_ID_HEADER
from schemas.subjects import InvalidIdentifier
from tests.bus.jobs.queues import Task, noting, queue, until, until_dead
from tests.graph_fixture import json_of, run_cli


async def dead(bus: Bus, config: JobQueueConfig, numbers: range) -> None:
    """Make dead letters of jobs of these numbers."""

    async def handler(task: Task) -> None:
        raise RequestRefused(FaultCode.INVALID_PROMPT, f"no prompt [{task.number}]", remedy="send one")

    for number in numbers:
        await bus.submit(config, Task(number=number, text="hello"), job_id=f"job-{number}")
    consumer = await bus.work(config, handler)
    await until_dead(bus, config, len(numbers))
    await consumer.drain(5)


async def test_a_replayed_job_runs_again_whatever_became_of_it_before(bus: Bus) -> None:
    config, ids = queue(), list[tuple[str, int]]()
    await dead(bus, config, range(1))
    (letter,) = await bus.dead_letters.list(queue=config.queue)

    async def handler(_: Task) -> None:
        ids.append((current_job().job_id, current_job().delivery_count))

    consumer = await bus.work(config, handler)
    headers = {"Nixlbus-Protocol": "2", JOB_ID_HEADER: "job-0"}  # the same job, submitted once more by a plain client
    await bus._durable._jetstream.publish(config.subject(bus.subjects).name, encode(Task()), headers)
    await until(lambda: consumer.stats.num_done == 1)
    await bus.dead_letters.replay(letter.sequence)
    await until(lambda: consumer.stats.num_done == 2)
    assert ids == [("job-0", 1), ("job-0", 1)]
    assert await bus.dead_letters.list(queue=config.queue) == []
    for gone in (bus.dead_letters.show, bus.dead_letters.replay, bus.dead_letters.drop):
        with pytest.raises(DeadLetterNotFound, match="nixlbus dlq ls"):
            await gone(letter.sequence)


async def test_a_replay_that_dies_half_way_and_is_repeated_runs_the_job_once(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = queue(), list[int]()
    await dead(bus, config, range(1))
    (letter,) = await bus.dead_letters.list(queue=config.queue)

    async def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(bus.dead_letters, "_delete", dies)
        with pytest.raises(KeyboardInterrupt):
            await bus.dead_letters.replay(letter.sequence)
    assert (await bus.dead_letters.replay(letter.sequence)).duplicate
    consumer = await bus.work(config, noting(seen))
    await until(lambda: consumer.stats.num_done == 1)
    await asyncio.sleep(0.1)
    assert seen == [0]


async def test_a_worker_that_dies_between_the_dead_letter_and_its_term_leaves_one(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tries = queue(ack_wait_s=0.4), list[int]()

    async def handler(task: Task) -> None:
        tries.append(task.number)
        raise RequestRefused(FaultCode.INVALID_PROMPT, "no")

    async def lost(*_: object) -> None:
        await asyncio.sleep(0)

    consumer = await bus.work(config, handler)
    with monkeypatch.context() as patched:
        patched.setattr(bus._durable._jetstream, "confirm", lost)
        await bus.submit(config, Task())
        await until(lambda: len(tries) == 1)
        await until_dead(bus, config)
    await until(lambda: consumer.stats.num_dead == 2)  # once more, into the same dead letter
    assert len(await bus.dead_letters.list(queue=config.queue)) == 1


async def test_listing_is_bounded_and_by_queue(bus: Bus) -> None:
    config, other = queue(), queue(graph="other")
    await dead(bus, config, range(5))
    await dead(bus, other, range(2))
    assert [letter.job_id for letter in await bus.dead_letters.list(queue=config.queue, limit=3)] == [
        "job-0",
        "job-1",
        "job-2",
    ]
    assert len(await bus.dead_letters.list(graph="other", queue=other.queue)) == 2
    assert await bus.dead_letters.list(graph="other", queue=config.queue) == []
    with pytest.raises(InvalidIdentifier):
        await bus.dead_letters.list(queue=">")


async def test_the_command_lists_shows_replays_and_drops(bus: Bus, server: EmbeddedServer) -> None:
    config = queue()
    await dead(bus, config, range(4))
    first, second, *_ = await bus.dead_letters.list(queue=config.queue)

    def dlq(*arguments: str) -> "asyncio.Future[object]":
        return asyncio.ensure_future(asyncio.to_thread(run_cli, "dlq", *arguments, "--nats", server.url))

    listed = json_of(await dlq("ls", "--queue", config.queue, "--json"))["dead_letters"]  # type: ignore[arg-type]
    assert [each["job_id"] for each in listed] == ["job-0", "job-1", "job-2", "job-3"]
    assert {(each["code"], each["deliveries"], each["queue"]) for each in listed} == {
        ("invalid_prompt", 1, f"test.{config.queue}")
    }
    table = (await dlq("ls", "--queue", f"test.{config.queue}")).stdout  # type: ignore[attr-defined]
    assert "job-3" in table
    shown = json_of(await dlq("show", str(first.sequence), "--json"))  # type: ignore[arg-type]
    assert shown["message"] == {"type": "test.task", "text": "hello"}
    assert shown["reason"] == "no prompt [0]"
    people = (await dlq("show", str(first.sequence))).stdout  # type: ignore[attr-defined]
    assert "no prompt [0]" in people
    dropped = await dlq("drop", str(first.sequence), "--json")
    assert json_of(dropped) == {"dropped": [first.sequence], "not_found": []}  # type: ignore[arg-type]
    again = await dlq("drop", str(first.sequence), str(second.sequence), "--json")
    assert again.returncode == 1  # type: ignore[attr-defined]
    assert json_of(again) == {"dropped": [second.sequence], "not_found": [first.sequence]}  # type: ignore[arg-type]
    gone = await dlq("show", str(first.sequence), "--json")
    assert gone.returncode == 1  # type: ignore[attr-defined]
    assert json_of(gone)["error"]["code"] == "not_found"  # type: ignore[arg-type]
    nothing_said = await dlq("replay")
    assert nothing_said.returncode == 2  # type: ignore[attr-defined]
    replayed = json_of(await dlq("replay", "--all", "--queue", config.queue, "--json"))  # type: ignore[arg-type]
    assert len(replayed["replayed"]) == 2
    seen = list[int]()
    await bus.work(config, noting(seen))
    await until(lambda: sorted(seen) == [2, 3])
    assert await bus.dead_letters.list(queue=config.queue) == []


async def test_a_job_of_a_plain_client_keeps_its_headers_and_bytes(bus: Bus) -> None:
    config = queue()
    headers = {
        "Nixlbus-Protocol": "2",
        "Their-Own": "kept",
        "Nats-Msg-Id": "plain-1",
        "Nats-Expected-Stream": "NIXLBUS_JOBS",
    }
    await bus._durable._jetstream.publish(config.subject(bus.subjects).name, encode(Task(number=1)), headers)

    async def handler(_: Task) -> None:
        raise RequestRefused(FaultCode.INVALID_PROMPT, "no")

    await bus.work(config, handler)
    (letter,) = await until_dead(bus, config)
    assert letter.job_id == "plain-1"
    assert letter.headers["Their-Own"] == "kept"
    assert "Nats-Expected-Stream" not in letter.headers
    assert letter.payload == encode(Task(number=1))
