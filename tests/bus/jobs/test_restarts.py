"""The nats-server goes away and comes back: work goes on (pull subscriptions of nats-py don't: nats-py #504)."""

import asyncio
import signal
from pathlib import Path

import pytest

from bus import Bus, BusConfig, BusError
from tests.bus.jobs.queues import Task, noting, opened, queue, stoppable_server, until


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_work_goes_on_after_the_server_is_restarted(tmp_path: Path, how: signal.Signals) -> None:
    config, seen = queue(ack_wait_s=60), list[int]()  # so a request would be given up only after the test's patience
    async with stoppable_server(tmp_path) as server:
        config_of = BusConfig(worker_id="w", nats_url=server.url)
        async with Bus.open(config_of, data_plane=False) as bus, opened(server.url, "c") as caller:
            consumer = await bus.work(config, noting(seen))
            await caller.submit(config, Task(number=0))
            await until(lambda: consumer.stats.num_done == 1)
            for restart in (1, 2):
                await server.stop(how)
                await asyncio.sleep(0.1)
                await server.start()
                number = await _submitted(caller, config, restart)
                await until(lambda number=number: number in seen)  # type: ignore[misc]
    assert seen == [0, 1, 2]


async def _submitted(caller: Bus, config, number: int) -> int:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(20):
        while True:
            try:
                await caller.submit(config, Task(number=number), job_id=f"job-{number}")
            except BusError:
                await asyncio.sleep(0.05)
            else:
                return number


async def test_a_job_that_ends_while_the_server_is_away_is_acked_when_it_is_back(tmp_path: Path) -> None:
    config, started, finish, runs = queue(ack_wait_s=10), asyncio.Event(), asyncio.Event(), list[int]()

    async def handler(task: Task) -> None:
        runs.append(task.number)
        started.set()
        await finish.wait()

    async with stoppable_server(tmp_path) as server, opened(server.url, "w") as bus:
        consumer = await bus.work(config, handler)
        await bus.submit(config, Task(number=1))
        await started.wait()
        await server.stop()
        finish.set()
        await asyncio.sleep(0.1)
        assert consumer.num_active == 1, "a job was given up though its ack could still arrive"
        await server.start()
        await until(lambda: consumer.num_active == 0)
        assert consumer.stats.num_lost_acks == 0
        info = await bus._durable._jetstream.api("STREAM.INFO.NIXLBUS_JOBS")
        assert info["state"]["messages"] == 0
    assert runs == [1]


async def test_a_consumer_that_is_deleted_under_its_worker_is_made_again(tmp_path: Path) -> None:
    config, seen = queue(), list[int]()
    async with stoppable_server(tmp_path) as server, opened(server.url, "w") as bus:
        consumer = await bus.work(config, noting(seen))
        await bus._durable._jetstream.api(f"CONSUMER.DELETE.NIXLBUS_JOBS.{config.durable}")
        await bus.submit(config, Task(number=1))
        await until(lambda: consumer.stats.num_done == 1)
    assert seen == [1]
