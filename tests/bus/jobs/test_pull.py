"""Asking for jobs when requests and the server's answers to them are lost: the worker's room is used all the same."""

import asyncio
import time

import pytest

from bus import Bus, EmbeddedServer
from bus.control_plane import pull
from bus.jobs.consumer import JobConsumer
from bus.testing import FaultProxy
from tests.bus.jobs.queues import Task, opened, queue, until

NEXT = "$JS.API.CONSUMER.MSG.NEXT.>"
NUM_SLOTS = 3 * pull.MAX_BATCH


class Peak:
    """Jobs that take a moment, or until they are let go; and the most that were at work at once."""

    def __init__(self, job_s: float = 0.0) -> None:
        self.job_s = job_s
        self.num_running = 0
        self.most = 0
        self.let_go = asyncio.Event()

    async def handler(self, _: Task) -> None:
        self.num_running += 1
        self.most = max(self.most, self.num_running)
        await asyncio.sleep(self.job_s)
        await self.let_go.wait()
        self.num_running -= 1


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_a_request_that_is_lost_costs_room_for_no_longer_than_it_lasts(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    monkeypatch.setattr(pull, "_GRACE_S", 0.2)
    config, peak = queue(concurrency=NUM_SLOTS, idempotent_handler=True), Peak(job_s=0.05)
    peak.let_go.set()
    async with (
        FaultProxy(server.url) as proxy,
        opened(proxy.url, "worker") as worker,
        opened(server.url, "caller") as caller,
    ):
        proxy.drop(NEXT, count=1)
        consumer = await worker.work(config, peak.handler)
        give_up_s = time.monotonic() + consumer._pull.request_s + 1
        while time.monotonic() < give_up_s:
            await asyncio.gather(*(caller.submit(config, Task()) for _ in range(20 * busy)))
            await asyncio.sleep(0.01)
        await until(lambda: consumer.num_active == 0)
        peak.most = 0
        before = consumer.stats.num_done
        await asyncio.gather(*(caller.submit(config, Task()) for _ in range(10 * NUM_SLOTS)))
        await until(lambda: consumer.stats.num_done == before + 10 * NUM_SLOTS)  # they never stop coming
        assert peak.most == NUM_SLOTS


async def test_a_worker_with_many_requests_open_asks_for_no_more_than_its_slots(
    server: EmbeddedServer, caller: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "_GATHER_S", 0.0)  # a request for each slot that is freed
    config, peak = queue(concurrency=NUM_SLOTS, idempotent_handler=True), Peak()
    peak.let_go.set()
    async with opened(server.url, "worker") as worker:
        consumer = await worker.work(config, peak.handler)
        for _ in range(200):  # one by one: each comes from another request
            await caller.submit(config, Task())
        await until(lambda: consumer.stats.num_done == 200)
        asked = consumer._pull._num_asked
        assert asked == sum(lane.num_asked for lane in consumer._pull._lanes) <= NUM_SLOTS
        peak.let_go.clear()
        await asyncio.gather(*(caller.submit(config, Task()) for _ in range(NUM_SLOTS + 10)))
        await until(lambda: peak.num_running == NUM_SLOTS)
        await asyncio.sleep(0.1)
        assert await delivered(caller, consumer) == NUM_SLOTS
        peak.let_go.set()
        await until(lambda: consumer.num_active == 0)


async def test_the_end_of_a_consumer_ends_all_requests_for_its_jobs(server: EmbeddedServer, caller: Bus) -> None:
    config, peak = queue(concurrency=NUM_SLOTS, ack_wait_s=60), Peak()
    async with opened(server.url, "worker") as worker:
        consumer = await worker.work(config, peak.handler)
        await caller._durable._jetstream.api(f"CONSUMER.DELETE.NIXLBUS_JOBS.{config.durable}")
        await asyncio.gather(*(caller.submit(config, Task()) for _ in range(NUM_SLOTS)))
        await until(lambda: peak.num_running == NUM_SLOTS)
        peak.let_go.set()
        await until(lambda: consumer.num_active == 0)


async def delivered(bus: Bus, consumer: JobConsumer) -> int:
    """Jobs that the server has given away and that aren't settled."""
    info = await bus._durable._jetstream.api(f"CONSUMER.INFO.NIXLBUS_JOBS.{consumer.config.durable}")
    return int(info["num_ack_pending"])
