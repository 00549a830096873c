"""Dead letters: listing, showing, replaying, dropping, by the API and by the command."""

import asyncio
from typing import Any
from urllib.parse import urlsplit

import pytest
from nats.aio.client import Client

from bus import (
    Bus,
    DeadLetterNotFound,
    DeadlineExceeded,
    EmbeddedServer,
    JobQueueConfig,
    LocalProtocolError,
    RequestRefused,
    current_job,
)
from schemas.codec import decode, encode
from schemas.fault import FaultCode
from schemas.jobs import JOB_ID_HEADER
from schemas.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION
from schemas.subjects import InvalidIdentifier
from tests.bus.jobs.queues import Task, noting, queue, until, until_dead
from tests.graph_fixture import json_of, run_cli

HEADERS = {PROTOCOL_HEADER: str(PROTOCOL_VERSION)}


async def refusing(_: Task) -> None:
    raise RequestRefused(FaultCode.INVALID_PROMPT, "no prompt " * 200, remedy="send one " * 100)


async def forged(bus: Bus, raw: Client, config: JobQueueConfig, payload: bytes, headers: dict[str, str]) -> Any:
    """Publish a dead letter of one's own making, and return it as it is listed."""
    await dead(bus, config, range(1))  # so that their stream is there
    (real,) = await bus.dead_letters.list(queue=config.queue)
    await bus.dead_letters.drop(real.sequence)
    await raw.jetstream().publish(f"nixlbus.v1.dlq.{config.graph}.{config.queue}", payload, headers=headers)
    (letter,) = await bus.dead_letters.list(queue=config.queue)
    return letter


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


async def test_a_job_with_headers_that_can_not_be_sent_is_buried_without_them(bus: Bus, server: EmbeddedServer) -> None:
    config = queue(max_deliver=2)
    await bus.work(config, refusing)
    block = f"NATS/1.0\r\nX Foo: 1\r\nTheir-Own: kept\r\n{PROTOCOL_HEADER}: {PROTOCOL_VERSION}\r\n\r\n".encode()
    body, url = encode(Task(number=1)), urlsplit(server.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    subject = config.subject(bus.subjects).name.encode()
    command = b"HPUB %b %d %d\r\n" % (subject, len(block), len(block) + len(body))
    writer.write(b'CONNECT {"headers":true,"verbose":false}\r\n%b%b%b\r\nPING\r\n' % (command, block, body))
    async with asyncio.timeout(5):
        await reader.readuntil(b"PONG\r\n")
    writer.close()
    (letter,) = await until_dead(bus, config)
    assert (letter.left_out, letter.headers["Their-Own"]) == ("headers", "kept")
    assert "X Foo" not in letter.headers
    assert letter.payload == body


async def test_a_job_as_large_as_can_be_is_buried_without_what_has_no_room(
    bus: Bus, raw: Client, server: EmbeddedServer
) -> None:
    config, seen = queue(max_deliver=2), list[int]()
    subject, limit = config.subject(bus.subjects).name, raw.max_payload
    jetstream = raw.jetstream()
    headers_alone = {**HEADERS, "Their-Own": "x" * 5000}
    for number, room, headers in ((1, 6000, headers_alone), (2, 800, HEADERS), (3, 100, HEADERS)):
        size = limit - room - len(encode(Task(number=number, text="x" * 70_000))) + 70_000
        await jetstream.publish(subject, encode(Task(number=number, text="x" * size)), headers=headers)
    consumer = await bus.work(config, refusing)
    letters = await until_dead(bus, config, 3)
    by_left_out = {letter.payload and decode(letter.payload, Task).number: letter for letter in letters}
    assert {number: letter.left_out for number, letter in by_left_out.items()} == {
        1: "headers",
        2: "headers",
        b"": "payload",
    }
    assert by_left_out[1].message
    assert by_left_out[2].message == "", "the reason goes before the payload does"
    assert by_left_out[b""].message
    assert {letter.code for letter in letters} == {"invalid_prompt"}
    await until(lambda: consumer.num_active == 0)
    assert consumer.stats.num_dead == 3
    await consumer.drain(5)

    with pytest.raises(LocalProtocolError, match="no payload to replay"):
        await bus.dead_letters.replay(by_left_out[b""].sequence)
    command = ("dlq", "replay", str(by_left_out[b""].sequence), "--nats", server.url, "--json")
    told = await asyncio.to_thread(run_cli, *command)
    assert told.returncode == 1
    assert "no payload to replay" in json_of(told)["refused"][str(by_left_out[b""].sequence)]
    for number in (1, 2):
        await bus.dead_letters.replay(by_left_out[number].sequence)
    await bus.work(config, noting(seen))
    await until(lambda: sorted(seen) == [1, 2])


async def test_a_forged_letter_is_replayed_into_its_own_queue_and_no_other(bus: Bus, raw: Client) -> None:
    config, other, seen, stray = queue(), queue(), list[int](), list[int]()
    headers = {**HEADERS, "Nixlbus-Dead-Subject": other.subject(bus.subjects).name, JOB_ID_HEADER: "two words"}
    letter = await forged(bus, raw, config, encode(Task(number=5)), headers)
    assert letter.job_subject == config.subject(bus.subjects).name
    for each, numbers in ((config, seen), (other, stray)):
        await bus.work(each, noting(numbers))
    await bus.dead_letters.replay(letter.sequence)
    await until(lambda: seen == [5])
    assert stray == []


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-1", "1_0", " 1"])
async def test_a_forged_number_does_not_keep_the_others_from_being_listed(bus: Bus, raw: Client, number: str) -> None:
    headers = {"Nixlbus-Dead-Deliveries": number, "Nixlbus-Dead-Sequence": number}
    letter = await forged(bus, raw, queue(), b"", headers)
    assert letter.deliveries in (0, 1)
    assert letter.job_sequence == letter.deliveries


async def test_a_listing_takes_no_longer_than_it_is_given_however_many_there_are(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = queue()
    await dead(bus, config, range(8))
    jetstream = bus._durable._jetstream
    found = jetstream.next_message

    async def slow(*args: Any, **fields: Any) -> Any:
        await asyncio.sleep(0.1)
        return await found(*args, **fields)

    monkeypatch.setattr(jetstream, "next_message", slow)
    with pytest.raises(DeadlineExceeded):
        await bus.dead_letters.list(queue=config.queue, timeout_s=0.35)
    assert len(await bus.dead_letters.list(queue=config.queue, timeout_s=20)) == 8


async def test_the_command_shows_a_letter_as_it_is_written(bus: Bus, raw: Client, server: EmbeddedServer) -> None:
    config = queue()
    headers = {
        "Nixlbus-Dead-Worker": "[/red]",
        "Nixlbus-Dead-Time": "[/red]",
        "Nixlbus-Dead-Message": "no \\[bold]prompt",
        JOB_ID_HEADER: "[/red]",
    }
    letter = await forged(bus, raw, config, b"\x81\xa4text\xa5[/red]"[:-1], headers)
    listed = await asyncio.to_thread(run_cli, "dlq", "ls", "--queue", config.queue, "--nats", server.url)
    assert listed.returncode == 0, listed.stderr
    assert "[/red]" in listed.stdout
    shown = await asyncio.to_thread(run_cli, "dlq", "show", str(letter.sequence), "--nats", server.url)
    assert shown.returncode == 0, shown.stderr
    assert "no \\[bold]prompt" in shown.stdout
