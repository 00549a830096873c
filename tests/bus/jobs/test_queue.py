"""Submitting and working: what a job's way looks like when nothing dies but the handler."""

import asyncio
import time

import pytest
from nats.aio.client import Client

from bus import (
    Bus,
    EmbeddedServer,
    JobTakenOver,
    LocalProtocolError,
    PayloadTooLarge,
    RequestRefused,
    current_job,
)
from schemas.codec import encode
from schemas.fault import FaultCode
from schemas.jobs import JOB_ID_HEADER
from schemas.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION
from schemas.subjects import Subject
from tests.bus.jobs.queues import Other, Task, noting, opened, queue, until, until_dead

HEADERS = {PROTOCOL_HEADER: str(PROTOCOL_VERSION)}


async def test_jobs_that_were_submitted_before_anybody_works_are_all_done_once(bus: Bus, caller: Bus) -> None:
    config, seen = queue(), list[int]()
    receipts = [await caller.submit(config, Task(number=number)) for number in range(100)]
    assert [receipt.duplicate for receipt in receipts] == [False] * 100
    assert len({receipt.job_id for receipt in receipts}) == 100
    consumer = await bus.work(config, noting(seen))
    await until(lambda: consumer.stats.num_done == 100)
    assert sorted(seen) == list(range(100))


async def test_a_job_id_is_stored_once_and_each_queue_has_its_own_ids(bus: Bus) -> None:
    config, other, seen = queue(), queue(), list[int]()
    first = await bus.submit(config, Task(number=1), job_id="same")
    again = await bus.submit(config, Task(number=2), job_id="same")
    elsewhere = await bus.submit(other, Task(number=3), job_id="same")
    assert (first.duplicate, again.duplicate, elsewhere.duplicate) == (False, True, False)
    assert again.stream_sequence == first.stream_sequence
    for each in (config, other):
        await bus.work(each, noting(seen))
    await until(lambda: len(seen) == 2)
    assert sorted(seen) == [1, 3]


async def test_a_job_id_that_comes_again_after_the_duplicate_window_is_not_done_again(bus: Bus, raw: Client) -> None:
    config, seen = queue(), list[int]()
    consumer = await bus.work(config, noting(seen))
    await bus.submit(config, Task(number=1), job_id="same")
    await until(lambda: consumer.stats.num_done == 1)
    subject = config.subject(bus.subjects).name
    for number in (2, 3):  # without Nats-Msg-Id: as if the window were over
        await raw.jetstream().publish(subject, encode(Task(number=number)), headers=HEADERS | {JOB_ID_HEADER: "same"})
    await until(lambda: consumer.stats.num_skipped == 2)
    assert seen == [1]


async def test_a_second_message_of_a_job_that_is_being_worked_on_is_a_duplicate(bus: Bus, raw: Client) -> None:
    config, started, finish, seen = queue(), asyncio.Event(), asyncio.Event(), list[int]()

    async def handler(task: Task) -> None:
        seen.append(task.number)
        started.set()
        await finish.wait()

    consumer = await bus.work(config, handler)
    await bus.submit(config, Task(number=1), job_id="same")
    await started.wait()
    subject = config.subject(bus.subjects).name
    await raw.jetstream().publish(subject, encode(Task(number=2)), headers=HEADERS | {JOB_ID_HEADER: "same"})
    await until(lambda: consumer.stats.num_skipped == 1)
    finish.set()
    await until(lambda: consumer.stats.num_done == 1)
    assert seen == [1]


async def test_a_handler_is_told_about_its_job(bus: Bus) -> None:
    config, told = queue(), list[tuple[str, int, int]]()

    async def handler(_: Task) -> None:
        job = current_job()
        told.append((job.job_id, job.delivery_count, job.attempt))
        assert 0 <= job.age_s < 10
        if job.delivery_count == 1:
            raise ValueError("once")

    await bus.submit(config, Task(), job_id="mine")
    consumer = await bus.work(config, handler)
    await until(lambda: consumer.stats.num_done == 1)
    assert told == [("mine", 1, 1), ("mine", 2, 2)]
    with pytest.raises(LocalProtocolError, match="no job"):
        current_job()


async def test_progress_reaches_the_next_delivery(bus: Bus) -> None:
    config, progress = queue(), list[bytes]()

    async def handler(_: Task) -> None:
        job = current_job()
        progress.append(job.progress)
        await job.checkpoint(f"page {job.delivery_count}".encode())
        if job.delivery_count < 3:
            raise ValueError("again")

    await bus.submit(config, Task())
    consumer = await bus.work(config, handler)
    await until(lambda: consumer.stats.num_done == 1)
    assert progress == [b"", b"page 1", b"page 2"]


async def test_a_worker_that_was_cut_off_learns_that_its_job_was_taken_over(bus: Bus, caller: Bus) -> None:
    config, learned = queue(ack_wait_s=0.4, concurrency=1), list[str]()
    started, taken_over = list[int](), asyncio.Event()

    async def first(_: Task) -> None:
        started.append(current_job().delivery_count)
        await taken_over.wait()
        try:
            await current_job().checkpoint(b"mine?")
        except JobTakenOver:
            learned.append("taken over")
            raise RequestRefused(FaultCode.INVALID_PROMPT, "a verdict that it may not give any more") from None

    async def second(_: Task) -> None:
        started.append(current_job().delivery_count)
        taken_over.set()
        await until(lambda: bool(learned))
        await asyncio.sleep(0.3)  # a word of the first one's about its failure would bring the job back now

    await bus.submit(config, Task())
    mute = await bus.work(config, first)
    await until(lambda: mute.num_active == 1)
    assert mute._speaking is not None
    mute._speaking.cancel()  # silent, as a worker behind a cut cable is
    other = await caller.work(config, second)
    await until(lambda: other.stats.num_done == 1)
    assert (started, learned) == ([1, 2], ["taken over"])
    assert await bus.dead_letters.list(queue=config.queue) == []


async def test_a_poison_message_ends_in_the_dead_letters_after_its_deliveries(bus: Bus) -> None:
    config, deliveries = queue(max_deliver=3), list[float]()

    async def handler(_: Task) -> None:
        deliveries.append(time.monotonic())
        raise ValueError("secret")

    receipt = await bus.submit(config, Task(number=7), job_id="poison")
    consumer = await bus.work(config, handler)
    (letter,) = await until_dead(bus, config)
    await until(lambda: consumer.num_active == 0)
    assert len(deliveries) == letter.deliveries == 3
    assert deliveries[2] - deliveries[1] > deliveries[1] - deliveries[0] > 0.03, "the pauses don't grow"
    assert (letter.code, letter.message) == ("internal", "the handler raised ValueError")
    assert (letter.job_id, letter.job_sequence) == ("poison", receipt.stream_sequence)
    assert letter.payload == encode(Task(number=7))
    assert letter.worker_id == "serving"
    assert letter.headers[JOB_ID_HEADER] == "poison"
    assert await bus._durable._jetstream.message("NIXLBUS_JOBS", receipt.stream_sequence) is None


async def test_a_fault_that_would_come_again_is_not_tried_again(bus: Bus, raw: Client) -> None:
    config, seen = queue(), list[int]()

    async def handler(task: Task) -> None:
        seen.append(task.number)
        raise RequestRefused(FaultCode.INVALID_PROMPT, "no prompt", remedy="send one")

    consumer = await bus.work(config, handler)
    await bus.submit(config, Task(number=1))
    subject = config.subject(bus.subjects).name
    jetstream = raw.jetstream()
    await jetstream.publish(subject, b"not msgpack", headers=HEADERS)
    await jetstream.publish(subject, encode(Other(name="x")), headers=HEADERS)
    await jetstream.publish(subject, encode(Task()), headers={PROTOCOL_HEADER: "99"})
    letters = await until_dead(bus, config, 4)
    assert sorted(letter.code for letter in letters) == [
        "invalid_prompt",
        "malformed_message",
        "unknown_message_type",
        "wrong_protocol",
    ]
    assert {letter.deliveries for letter in letters} == {1}
    assert [letter.remedy for letter in letters if letter.code == "invalid_prompt"] == ["send one"]
    assert seen == [1]
    assert consumer.stats.num_retried == 0


async def test_a_job_whose_time_is_up_in_the_queue_is_a_dead_letter_and_never_runs(bus: Bus) -> None:
    config, seen = queue(), list[int]()
    await bus.submit(config, Task(number=1), ttl_s=0.05)
    await bus.submit(config, Task(number=2), ttl_s=60)
    await asyncio.sleep(0.1)
    await bus.work(config, noting(seen))
    (letter,) = await until_dead(bus, config)
    assert letter.code == "deadline_exceeded"
    await until(lambda: seen == [2])


async def test_a_job_whose_time_is_up_while_it_runs_is_cancelled_and_not_tried_again(bus: Bus) -> None:
    config, seen = queue(), list[int]()

    async def handler(task: Task) -> None:
        seen.append(task.number)
        await asyncio.Event().wait()

    await bus.work(config, handler)
    await bus.submit(config, Task(number=1), ttl_s=0.3)
    (letter,) = await until_dead(bus, config)
    assert (letter.code, letter.deliveries, seen) == ("deadline_exceeded", 1, [1])


async def test_a_job_that_runs_past_ack_wait_is_kept_alive(bus: Bus, caller: Bus) -> None:
    config, seen = queue(ack_wait_s=0.3), list[int]()

    async def handler(task: Task) -> None:
        seen.append(task.number)
        await asyncio.sleep(1.2)

    consumers = [await each.work(config, handler) for each in (bus, caller)]
    await bus.submit(config, Task(number=1))
    await until(lambda: sum(consumer.stats.num_done for consumer in consumers) == 1)
    assert seen == [1]


async def test_a_job_is_kept_alive_no_longer_than_it_may_run(bus: Bus) -> None:
    config, cancelled = queue(ack_wait_s=0.3, max_duration_s=0.5, max_deliver=2), list[int]()

    async def handler(_: Task) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(current_job().delivery_count)
            raise

    await bus.work(config, handler)
    await bus.submit(config, Task())
    (letter,) = await until_dead(bus, config)
    assert cancelled == [1, 2]
    assert letter.code == "deadline_exceeded"
    assert "0.5 s" in letter.message


async def test_nobody_speaks_for_a_handler_that_ignores_its_end(bus: Bus, caller: Bus) -> None:
    config, done = queue(ack_wait_s=0.3, max_duration_s=0.2), list[str]()

    async def stubborn(_: Task) -> None:
        while not done:
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue

    async def handler(_: Task) -> None:
        done.append("by another")

    await bus.submit(config, Task())
    consumer = await bus.work(config, stubborn)
    await until(lambda: consumer.num_active == 1)
    await caller.work(config, handler)
    await until(lambda: done == ["by another"])


async def test_a_worker_never_takes_more_than_it_has_room_for(bus: Bus) -> None:
    config, peak, seen, looked = queue(concurrency=3, ack_wait_s=0.5), [0, 0], list[int](), asyncio.Event()

    async def handler(task: Task) -> None:
        peak[0] += 1
        peak[1] = max(peak)
        await looked.wait()
        await asyncio.sleep(0.02)
        peak[0] -= 1
        seen.append(task.number)

    for number in range(30):
        await bus.submit(config, Task(number=number))
    consumer = await bus.work(config, handler)
    await until(lambda: peak[0] == 3)
    await asyncio.sleep(0.1)
    info = await bus._durable._jetstream.api(f"CONSUMER.INFO.NIXLBUS_JOBS.{config.durable}")
    assert info["num_ack_pending"] == consumer.num_active == 3, "more was fetched than there are slots"
    looked.set()
    await until(lambda: len(seen) == 30)
    assert peak[1] == 3
    assert sorted(seen) == list(range(30))


async def test_an_ack_that_is_lost_does_not_run_a_done_job_again(
    bus: Bus, caller: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = queue(ack_wait_s=0.4), list[int]()
    losing = await bus.work(config, noting(seen))

    async def lost(*_: object) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(losing._jetstream, "confirm", lost)
    await bus.submit(config, Task(number=1), job_id="mine")
    await until(lambda: losing.stats.num_done == 1)
    await losing.drain(1)
    other = await caller.work(config, noting(seen))
    await until(lambda: other.stats.num_skipped == 1)
    assert seen == [1]


async def test_a_draining_worker_finishes_what_it_can_and_gives_back_the_rest_at_once(server: EmbeddedServer) -> None:
    config, seen = queue(ack_wait_s=30, concurrency=2, max_deliver=1), list[tuple[str, int, int]]()
    release = asyncio.Event()

    async def slow(task: Task) -> None:
        if task.number == 1:
            await asyncio.Event().wait()
        await release.wait()
        seen.append(("first", task.number, current_job().attempt))

    async def quick(task: Task) -> None:
        seen.append(("second", task.number, current_job().attempt))

    async with opened(server.url, "second") as second:
        async with opened(server.url, "first", drain_timeout_s=0.5) as first:
            consumer = await first.work(config, slow)
            for number in range(3):
                await second.submit(config, Task(number=number))
            await until(lambda: consumer.num_active == 2)
            asyncio.get_running_loop().call_later(0.1, release.set)
        assert consumer.num_active == 0
        await second.work(config, quick)
        await until(lambda: len(seen) == 3)
    assert sorted(seen) == [("first", 0, 1), ("second", 1, 1), ("second", 2, 1)]


async def test_what_is_no_job_is_refused_before_it_is_sent(bus: Bus) -> None:
    config = queue()
    for wrong, what in (
        (Other(name="x"), "takes Task, not Other"),
        ({"number": 1}, "not dict"),
        (b"bytes", "not bytes"),
    ):
        with pytest.raises(LocalProtocolError, match=what):
            await bus.submit(config, wrong)
    with pytest.raises(LocalProtocolError, match="no queue of jobs"):
        await bus.submit(Subject("nixlbus.v1.graph.vlm.decode", "graph.vlm.decode"), Task())
    for job_id in ("has space", "line\nbreak", "x" * 129, "ü"):
        with pytest.raises(LocalProtocolError, match="job_id"):
            await bus.submit(config, Task(), job_id=job_id)
    with pytest.raises(LocalProtocolError, match="ttl_s"):
        await bus.submit(config, Task(), ttl_s=0)


async def test_a_job_that_leaves_no_room_for_a_reason_is_refused(bus: Bus) -> None:
    config = queue()
    with pytest.raises(PayloadTooLarge, match=r"bus\.media\.put"):
        await bus.submit(config, Task(text="x" * ((8 << 20) - 4096)))
    receipt = await bus.submit(config, Task(text="x" * ((8 << 20) - 8192)))

    async def handler(_: Task) -> None:
        raise RequestRefused(FaultCode.INVALID_PROMPT, "ü" * 5000, remedy="ü" * 5000)

    await bus.work(config, handler)
    (letter,) = await until_dead(bus, config)
    assert len(letter.payload) > (8 << 20) - 8192
    assert letter.job_sequence == receipt.stream_sequence


@pytest.mark.parametrize(
    ("field", "value"),
    [("concurrency", 0), ("ack_wait_s", 0.0), ("max_deliver", 0), ("backoff_s", ()), ("backoff_s", (0.0,))],
)
def test_a_queue_that_can_not_work_is_refused_when_it_is_declared(field: str, value: object) -> None:
    with pytest.raises(LocalProtocolError, match=field):
        queue(**{field: value})


async def test_a_plain_client_may_submit_json_where_the_queue_is_public(bus: Bus, raw: Client) -> None:
    config, seen = queue(public=True), list[int]()
    consumer = await bus.work(config, noting(seen))
    await raw.jetstream().publish(config.subject(bus.subjects).name, b'{"type": "test.task", "number": 5}')
    await until(lambda: consumer.stats.num_done == 1)
    assert seen == [5]


async def test_an_idempotent_queue_keeps_no_claims(bus: Bus) -> None:
    config, refused = queue(idempotent_handler=True), list[str]()

    async def handler(_: Task) -> None:
        with pytest.raises(LocalProtocolError, match="keeps no claims"):
            await current_job().checkpoint()
        refused.append("checkpoint")

    claims = bus._durable._streams.claims
    before = await bus._durable._jetstream.api(f"STREAM.INFO.{claims.name}")
    await bus.submit(config, Task())
    consumer = await bus.work(config, handler)
    await until(lambda: consumer.stats.num_done == 1)
    after = await bus._durable._jetstream.api(f"STREAM.INFO.{claims.name}")
    assert refused == ["checkpoint"]
    assert before["state"]["last_seq"] == after["state"]["last_seq"]
    async with asyncio.timeout(5):
        while True:
            info = await bus._durable._jetstream.api(f"CONSUMER.INFO.NIXLBUS_JOBS.{config.durable}")
            if not info["num_ack_pending"] and not info["num_pending"]:
                break
            await asyncio.sleep(0.02)
