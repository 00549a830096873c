"""Jobs whose ids were made when they were submitted: no claims where all goes well, and what holds where it doesn't."""

import asyncio
import contextlib

import pytest

from bus import Bus, DurableWorkUnavailable, EmbeddedServer, JobTakenOver, current_job
from bus.control_plane.delivery import Delivery
from bus.jobs.consumer import JobConsumer
from schemas.codec import encode
from schemas.jobs import UNIQUE_HEADER
from schemas.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION
from tests.bus.jobs.queues import Task, noting, opened, queue, until, until_dead


async def num_claim_writes(bus: Bus) -> int:
    """How often anything was written to the claims, by the server's count."""
    with contextlib.suppress(DurableWorkUnavailable):
        info = await bus._durable._jetstream.api("STREAM.INFO.KV_NIXLBUS_CLAIMS")
        return int(info["state"]["last_seq"])
    return 0  # there is no bucket yet


async def is_stored(bus: Bus, sequence: int) -> bool:
    return await bus._durable._jetstream.message("NIXLBUS_JOBS", sequence) is not None


def silence(consumer: JobConsumer) -> None:
    """Make a worker silent about its jobs, as one behind a cut cable is."""
    assert consumer._speaking is not None
    consumer._speaking.cancel()


async def test_jobs_that_go_well_write_no_claims(bus: Bus) -> None:
    config, seen = queue(ack_wait_s=5), list[int]()
    consumer = await bus.work(config, noting(seen))
    before = await num_claim_writes(bus)
    for number in range(100):
        await bus.submit(config, Task(number=number))
    await until(lambda: consumer.stats.num_done == 100)
    assert await num_claim_writes(bus) == before
    await bus.submit(config, Task(), job_id="our-own")
    await until(lambda: consumer.stats.num_done == 101)
    assert await num_claim_writes(bus) == before + 2, "a claim and its mark"


async def test_a_worker_that_waited_long_for_a_job_writes_no_claim_either(bus: Bus) -> None:
    config, seen = queue(ack_wait_s=0.6), list[int]()
    consumer = await bus.work(config, noting(seen))
    before = await num_claim_writes(bus)
    for number in range(3):
        await asyncio.sleep(0.9)  # longer than ack_wait: only the end of its requests tells that the server is there
        await bus.submit(config, Task(number=number))
        await until(lambda number=number: consumer.stats.num_done == number + 1)  # type: ignore[misc]
    assert await num_claim_writes(bus) <= before + 2, "on a busy machine one may be late"
    assert seen == [0, 1, 2]


async def test_a_job_that_runs_past_ack_wait_is_kept_without_a_claim(bus: Bus, caller: Bus) -> None:
    config, seen = queue(ack_wait_s=1.8), list[int]()

    async def handler(task: Task) -> None:
        seen.append(task.number)
        await asyncio.sleep(2.5)

    consumers = [await each.work(config, handler) for each in (bus, caller)]
    before = await num_claim_writes(bus)
    await bus.submit(config, Task(number=1))
    await until(lambda: sum(consumer.stats.num_done for consumer in consumers) == 1)
    assert seen == [1]
    assert await num_claim_writes(bus) == before, "its lease was not renewed"


async def test_a_silent_worker_s_end_is_not_heard_while_another_has_the_job(bus: Bus, caller: Bus) -> None:
    config, began, ends = queue(ack_wait_s=0.5), asyncio.Event(), [asyncio.Event(), asyncio.Event()]

    async def first(_: Task) -> None:
        await ends[0].wait()

    async def second(_: Task) -> None:
        began.set()
        await ends[1].wait()

    mute = await bus.work(config, first)
    receipt = await bus.submit(config, Task())
    await until(lambda: mute.num_active == 1)
    silence(mute)
    await mute._pull.close()
    heir = await caller.work(config, second)
    await until(began.is_set)
    ends[0].set()
    await until(lambda: mute.num_active == 0)
    assert (mute.stats.num_done, mute.stats.num_skipped) == (0, 1)
    await asyncio.sleep(0.1)
    assert await is_stored(bus, receipt.stream_sequence), "it was acked under another's hands"
    ends[1].set()
    await until(lambda: heir.stats.num_done == 1)
    assert not await is_stored(bus, receipt.stream_sequence)


async def test_a_silent_worker_s_failure_is_not_heard_while_another_has_the_job(bus: Bus, caller: Bus) -> None:
    config, end, runs = queue(ack_wait_s=0.5), asyncio.Event(), list[int]()

    async def first(_: Task) -> None:
        await end.wait()
        raise ValueError("too late")

    async def second(_: Task) -> None:
        runs.append(current_job().attempt)
        end.set()
        await until(lambda: mute.num_active == 0)
        await asyncio.sleep(0.3)  # its word would bring the job back now

    mute = await bus.work(config, first)
    await bus.submit(config, Task())
    await until(lambda: mute.num_active == 1)
    silence(mute)
    await mute._pull.close()
    heir = await caller.work(config, second)
    await until(lambda: heir.stats.num_done == 1)
    assert (mute.stats.num_retried, mute.stats.num_dead, mute.stats.num_skipped) == (0, 0, 1)
    assert runs == [2], "the first delivery was a try"


async def test_a_silent_worker_whose_job_nobody_has_is_done(bus: Bus, caller: Bus) -> None:
    config, end, seen = queue(ack_wait_s=0.5), asyncio.Event(), list[int]()

    async def handler(_: Task) -> None:
        await end.wait()

    mute = await bus.work(config, handler)
    receipt = await bus.submit(config, Task())
    await until(lambda: mute.num_active == 1)
    silence(mute)
    await mute._pull.close()
    await asyncio.sleep(0.7)
    end.set()
    await until(lambda: mute.num_active == 0)
    assert mute.stats.num_done == 1
    assert not await is_stored(bus, receipt.stream_sequence)
    await caller.work(config, noting(seen))
    await asyncio.sleep(0.7)
    assert seen == []


async def test_a_silent_worker_does_not_settle_what_another_did(bus: Bus, server: EmbeddedServer) -> None:
    config, end, finished = queue(ack_wait_s=0.5), asyncio.Event(), list[int]()

    async def handler(_: Task) -> None:
        await end.wait()

    mute = await bus.work(config, handler)
    await bus.submit(config, Task(number=1))
    await until(lambda: mute.num_active == 1)
    silence(mute)
    await mute._pull.close()
    async with opened(server.url, "heir") as heir:
        await heir.work(config, noting(finished))
        await until(lambda: finished == [1])
    end.set()
    await until(lambda: mute.num_active == 0)
    assert (mute.stats.num_done, mute.stats.num_skipped) == (0, 1), "done by another, and said so"


async def test_a_checkpoint_makes_the_claim_and_tells_who_has_the_job(bus: Bus, caller: Bus) -> None:
    config, told, taken = queue(ack_wait_s=0.5), list[str](), asyncio.Event()

    async def first(_: Task) -> None:
        await current_job().checkpoint(b"page 1")
        told.append("ours")
        await taken.wait()
        try:
            await current_job().checkpoint(b"page 2")
        except JobTakenOver:
            told.append("taken over")
            raise

    async def second(_: Task) -> None:
        told.append(current_job().progress.decode())
        taken.set()
        await until(lambda: "taken over" in told)

    mute = await bus.work(config, first)
    await bus.submit(config, Task())
    await until(lambda: told == ["ours"])
    silence(mute)
    await mute._pull.close()
    heir = await caller.work(config, second)
    await until(lambda: heir.stats.num_done == 1)
    assert told == ["ours", "page 1", "taken over"]


async def test_the_same_delivery_on_a_second_connection_is_not_run_again(bus: Bus) -> None:
    config, seen, came = queue(), list[int](), list[Delivery]()
    consumer = await bus.work(config, noting(seen))
    take = consumer._pull._on_delivery

    def noted(delivery: Delivery) -> None:
        came.append(delivery)
        take(delivery)

    consumer._pull._on_delivery = noted
    await bus.submit(config, Task(number=1))
    await until(lambda: consumer.stats.num_done == 1)
    take(came[0])
    await until(lambda: consumer.num_active == 0)
    assert seen == [1]
    assert consumer.stats.num_skipped == 1


async def test_a_draining_worker_s_hand_back_is_no_try(server: EmbeddedServer) -> None:
    config, seen = queue(ack_wait_s=30, max_deliver=2), list[tuple[int, int]]()

    async def never(_: Task) -> None:
        await asyncio.Event().wait()

    async def handler(_: Task) -> None:
        seen.append((current_job().delivery_count, current_job().attempt))

    async with opened(server.url, "second") as second:
        async with opened(server.url, "first", drain_timeout_s=0.2) as first:
            consumer = await first.work(config, never)
            await second.submit(config, Task())
            await until(lambda: consumer.num_active == 1)
        await second.work(config, handler)
        await until(lambda: seen == [(2, 1)])


async def test_where_one_try_is_all_there_is_a_claim_counts_it(bus: Bus) -> None:
    config, seen = queue(max_deliver=1), list[int]()
    consumer = await bus.work(config, noting(seen))
    before = await num_claim_writes(bus)
    await bus.submit(config, Task())
    await until(lambda: consumer.stats.num_done == 1)
    assert await num_claim_writes(bus) == before + 2


async def test_a_poison_job_ends_in_the_dead_letters_after_its_deliveries_and_its_replay_is_claimed(bus: Bus) -> None:
    config, attempts = queue(max_deliver=3), list[int]()

    async def handler(_: Task) -> None:
        attempts.append(current_job().attempt)
        raise ValueError("poison")

    consumer = await bus.work(config, handler)
    await bus.submit(config, Task())
    (letter,) = await until_dead(bus, config)
    assert (attempts, letter.deliveries) == ([1, 2, 3], 3)
    await consumer.drain(5)
    seen = list[int]()
    again = await bus.work(config, noting(seen))
    before = await num_claim_writes(bus)
    await bus.dead_letters.replay(letter.sequence)
    await until(lambda: again.stats.num_done == 1)
    assert await num_claim_writes(bus) == before + 2, "a replay may be stored twice"


async def test_an_ack_that_is_lost_runs_a_job_without_a_claim_again(
    bus: Bus, caller: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = queue(ack_wait_s=0.4), list[int]()
    losing = await bus.work(config, noting(seen))

    async def lost(*_: object) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(losing._jetstream, "confirm", lost)
    await bus.submit(config, Task(number=1))
    await until(lambda: losing.stats.num_done == 1)
    await losing.drain(1)
    other = await caller.work(config, noting(seen))
    await until(lambda: other.stats.num_done == 1)
    assert seen == [1, 1], "at least once: choose a job_id where that is too often"


async def test_a_job_that_says_itself_to_be_unique_is_taken_at_its_word(bus: Bus) -> None:
    config, seen = queue(), list[int]()
    consumer = await bus.work(config, noting(seen))
    headers = {PROTOCOL_HEADER: str(PROTOCOL_VERSION), UNIQUE_HEADER: "1"}
    before = await num_claim_writes(bus)
    await bus._durable._jetstream.publish(config.subject(bus.subjects).name, encode(Task(number=3)), headers)
    await until(lambda: consumer.stats.num_done == 1)
    assert seen == [3]
    assert await num_claim_writes(bus) == before
