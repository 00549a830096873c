"""Jobs that harm whoever takes them, by chance or on purpose: each ends, in the dead letters at the latest."""

import asyncio
import time
from typing import Any

import pytest

from bus import Bus
from schemas.codec import encode
from schemas.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION, TTL_HEADER
from tests.bus.jobs.queues import Task, noting, queue, until, until_dead


@pytest.mark.parametrize("job_id", ["", "own"], ids=["made-up id", "own id"])
async def test_a_handler_that_meets_a_cancelled_await_has_failed_and_is_not_tried_for_ever(
    bus: Bus, job_id: str
) -> None:
    config, tries = queue(max_deliver=3), list[int]()

    async def handler(task: Task) -> None:
        tries.append(task.number)
        inner = asyncio.create_task(asyncio.sleep(9))
        inner.cancel()
        await inner

    consumer = await bus.work(config, handler)
    await bus.submit(config, Task(), job_id=job_id)
    (letter,) = await until_dead(bus, config)
    assert len(tries) == letter.deliveries == 3
    assert letter.message == "the handler raised CancelledError"
    assert (consumer.stats.num_handed_back, consumer.stats.num_retried) == (0, 2)


async def test_a_handler_s_own_timeout_is_a_failure_too(bus: Bus) -> None:
    config = queue(max_deliver=2)

    async def handler(_: Task) -> None:
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    await bus.work(config, handler)
    await bus.submit(config, Task())
    (letter,) = await until_dead(bus, config)
    assert (letter.message, letter.deliveries) == ("the handler raised TimeoutError", 2)


async def test_a_job_that_can_not_be_buried_comes_back_after_a_pause_and_is_buried_when_it_can_be(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, buried = queue(max_deliver=1, backoff_s=(0.2,)), list[float]()
    bury = bus.dead_letters.bury

    async def unlucky(*arguments: Any) -> None:
        buried.append(time.monotonic())
        if len(buried) < 3:
            raise ValueError("nobody expected this")
        await bury(*arguments)

    async def handler(_: Task) -> None:
        raise ValueError("poison")

    monkeypatch.setattr(bus.dead_letters, "bury", unlucky)
    consumer = await bus.work(config, handler)
    await bus.submit(config, Task())
    await until_dead(bus, config)
    assert len(buried) == 3
    assert min(buried[1] - buried[0], buried[2] - buried[1]) > 0.15
    await until(lambda: consumer.num_active == 0)
    assert consumer.stats.num_dead == 1


@pytest.mark.parametrize("ttl_ms", ["²", "9" * 400, "-5", "1e3"])
async def test_a_time_to_live_that_is_no_number_is_none(bus: Bus, ttl_ms: str) -> None:
    config, seen = queue(max_deliver=1), list[int]()
    headers = {PROTOCOL_HEADER: str(PROTOCOL_VERSION), TTL_HEADER: ttl_ms}
    consumer = await bus.work(config, noting(seen))
    await bus._durable._jetstream.publish(config.subject(bus.subjects).name, encode(Task(number=1)), headers)
    await until(lambda: consumer.num_active == 0 and bool(consumer.stats.num_done + consumer.stats.num_dead))
    assert seen == [1]
