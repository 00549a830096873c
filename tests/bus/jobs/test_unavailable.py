"""JetStream that is off, full, set up in another way, or not allowed: a typed error that says what to do, at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from nats.aio.client import Client

from bus import Bus, DurableWorkUnavailable, MediaReference, PermissionDenied
from tests.bus.jobs.queues import Task, noting, opened, queue, stoppable_server, until

PROMPTLY_S = 2.0


@pytest.mark.parametrize(
    "use",
    [
        lambda bus: bus.submit(queue(), Task()),
        lambda bus: bus.work(queue(), noting([])),
        lambda bus: bus.dead_letters.list(),
        lambda bus: bus.dead_letters.show(1),
        lambda bus: bus.media.put(None, b"x"),
        lambda bus: bus.media.get(MediaReference(bucket="NIXLBUS_MEDIA", name="x", digest="", num_bytes=1)),
    ],
    ids=["submit", "work", "dlq list", "dlq show", "put", "get"],
)
async def test_a_server_without_jetstream_is_told_at_once(
    tmp_path: Path, use: Callable[[Bus], Awaitable[object]]
) -> None:
    async with stoppable_server(tmp_path, jetstream=False) as server, opened(server.url, "w") as bus:
        started_s = time.monotonic()
        with pytest.raises(DurableWorkUnavailable, match="enable JetStream"):
            await use(bus)
        assert time.monotonic() - started_s < PROMPTLY_S


async def test_a_full_disk_is_told_and_what_is_stored_stays(tmp_path: Path) -> None:
    config, seen = queue(), list[int]()
    limited = f'jetstream {{ store_dir: "{tmp_path}/store", max_file: 1MB }}'
    async with stoppable_server(tmp_path, limited, jetstream=False) as server, opened(server.url, "w") as bus:
        submissions = [bus.submit(config, Task(number=number, text="x" * 100_000)) for number in range(20)]
        outcomes = [await asyncio.gather(submission, return_exceptions=True) for submission in submissions]
        refused = [error for (error,) in outcomes if isinstance(error, DurableWorkUnavailable)]
        stored = len(outcomes) - len(refused)
        assert 1 < stored < 20
        assert "raise the limits" in str(refused[0])
        idempotent = queue(graph=config.graph, queue=config.queue, idempotent_handler=True)
        await bus.work(idempotent, noting(seen))
        await until(lambda: len(seen) == stored)


DENIED = """
authorization {{ users: [
  {{user: admin, password: p}}
  {{user: worker, password: p, permissions: {{
    publish: {{ allow: [{allowed}] }}
    subscribe: {{ allow: ["_INBOX.w.>"] }} }} }}
] }}
"""
BOUND = (
    '"$JS.API.CONSUMER.MSG.NEXT.NIXLBUS_JOBS.test+bound", "$JS.ACK.NIXLBUS_JOBS.test+bound.>", '
    '"$KV.NIXLBUS_CLAIMS.>", "$JS.API.DIRECT.GET.KV_NIXLBUS_CLAIMS", "nixlbus.v1.dlq.test.bound"'
)


async def test_what_is_not_allowed_is_told_at_once(tmp_path: Path) -> None:
    async with stoppable_server(tmp_path, DENIED.format(allowed='"allowed"')) as server:
        url = server.url.replace("//", "//worker:p@")
        async with opened(url, "w") as bus:
            for use in (
                lambda: bus.submit(queue(), Task()),
                lambda: bus.work(queue(), noting([])),
                lambda: bus.dead_letters.show(1),
                lambda: bus.media.put(None, b"x"),
            ):
                started_s = time.monotonic()
                with pytest.raises(PermissionDenied):
                    await use()
                assert time.monotonic() - started_s < PROMPTLY_S


async def test_a_worker_that_may_only_pull_works_on_what_was_made_beforehand(tmp_path: Path) -> None:
    config, seen = queue(queue="bound"), list[int]()
    async with (
        stoppable_server(tmp_path, DENIED.format(allowed=BOUND)) as server,
        opened(server.url.replace("//", "//admin:p@"), "admin") as admin,
    ):
        ahead = await admin.work(config, noting(seen))
        await admin.submit(config, Task(number=0))
        await until(lambda: ahead.stats.num_done == 1)
        await ahead.drain(5)
        async with opened(server.url.replace("//", "//worker:p@"), "w") as worker:
            consumer = await worker.work(config, noting(seen))
            for number in (1, 2):
                await admin.submit(config, Task(number=number))
            await until(lambda: consumer.stats.num_done == 2)
    assert seen == [0, 1, 2]


async def test_a_job_that_can_not_be_claimed_is_not_run_and_not_lost(tmp_path: Path) -> None:
    config, seen = queue(queue="bound", max_deliver=1), list[int]()
    allowed = BOUND.replace('"$KV.NIXLBUS_CLAIMS.>", ', "")
    async with (
        stoppable_server(tmp_path, DENIED.format(allowed=allowed)) as server,
        opened(server.url.replace("//", "//admin:p@"), "admin") as admin,
    ):
        await (await admin.work(config, noting(seen))).drain(5)
        await admin.submit(config, Task(number=1))
        async with opened(server.url.replace("//", "//worker:p@"), "w") as worker:
            await worker.work(config, noting(seen))
            jetstream = admin._durable._jetstream
            async with asyncio.timeout(20):
                while True:  # until it was delivered a second time
                    info = await jetstream.api(f"CONSUMER.INFO.NIXLBUS_JOBS.{config.durable}")
                    if info["num_redelivered"]:
                        break
                    await asyncio.sleep(0.02)
        assert seen == []
        assert await admin.dead_letters.list() == []
        consumer = await admin.work(config, noting(seen))
        await until(lambda: consumer.stats.num_done == 1)
        assert seen == [1]


async def test_a_consumer_that_would_strand_jobs_is_refused(bus: Bus, raw: Client) -> None:
    config = queue(max_deliver=3)
    await bus.submit(config, Task())
    await raw.jetstream().add_consumer(
        "NIXLBUS_JOBS",
        durable_name=config.durable,
        filter_subject=config.subject(bus.subjects).name,
        ack_policy="explicit",
        max_deliver=3,
    )
    with pytest.raises(DurableWorkUnavailable, match="gives up after 3"):
        await bus.work(config, noting([]))


async def test_a_consumer_of_another_queue_under_our_name_is_refused(bus: Bus, raw: Client) -> None:
    config, other = queue(), queue()
    await bus.submit(config, Task())
    await raw.jetstream().add_consumer(
        "NIXLBUS_JOBS",
        durable_name=config.durable,
        filter_subject=other.subject(bus.subjects).name,
        ack_policy="explicit",
    )
    with pytest.raises(DurableWorkUnavailable, match="no pull consumer"):
        await bus.work(config, noting([]))
    await raw.jetstream().delete_consumer("NIXLBUS_JOBS", config.durable)


async def test_a_stream_of_our_name_for_other_subjects_is_refused(tmp_path: Path) -> None:
    async with stoppable_server(tmp_path) as server, opened(server.url, "w") as bus:
        client = Client()
        await client.connect(server.url)
        await client.jetstream().add_stream(name="NIXLBUS_JOBS", subjects=["something.else"])
        await client.close()
        with pytest.raises(DurableWorkUnavailable, match=r"something\.else"):
            await bus.submit(queue(), Task())
