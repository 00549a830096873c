"""Durable jobs of `benchmarks.bus`: ours, and the floor, nats-py's own publish, fetch(32) and ack on a work queue.

Ours three times: as it is by default, with ids made by `submit`; with ids of the submitter's own (a claim and its mark
are written for each job, so that one that is submitted again is not run again); and for handlers that may run twice,
whose acks are not confirmed. Nor are the floor's; those of the first two are.
"""

import asyncio
import contextlib
import itertools
import secrets

from nats.aio.client import Client
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy, StorageType, StreamConfig

from benchmarks.record import Record
from bus import Bus, JobConsumer, JobQueueConfig

BATCH = 32
STREAM, SUBJECT, DURABLE = "BENCH", "bench.job", "bench"


class RawJobs:
    """Both sides of the floor, in their two processes."""

    def __init__(self, client: Client) -> None:
        self._jetstream = client.jetstream()
        self._client = client

    async def create(self) -> None:
        """Make stream and consumer, as a durable queue has them: on disk, explicit acks."""
        stream = StreamConfig(
            name=STREAM,
            subjects=[SUBJECT],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            duplicate_window=120,
        )
        await self._jetstream.add_stream(stream)
        consumer = ConsumerConfig(durable_name=DURABLE, ack_policy=AckPolicy.EXPLICIT, ack_wait=30, max_deliver=5)
        await self._jetstream.add_consumer(STREAM, consumer)

    async def submit(self, payload: bytes) -> None:
        """Publish one job and wait until it is stored."""
        await self._jetstream.publish(SUBJECT, payload, timeout=10)

    async def work(self, count: int) -> None:
        """Fetch and ack until `count` jobs are done and the server knows it."""
        subscription = await self._jetstream.pull_subscribe_bind(consumer=DURABLE, stream=STREAM)
        while count:
            with contextlib.suppress(NatsTimeoutError, asyncio.TimeoutError):
                messages = await subscription.fetch(BATCH, timeout=5)
                await asyncio.gather(*(message.ack() for message in messages))
                count -= len(messages)
        await self._client.flush()
        await subscription.unsubscribe()


class OurJobs:
    """Both sides of our queue, in their two processes."""

    def __init__(self, bus: Bus, name: str) -> None:
        """`name`: `default`, `claimed` or `idempotent`."""
        self._bus = bus
        self._queue = JobQueueConfig(
            graph="bench",
            queue=name,
            message_type=Record,
            concurrency=BATCH,
            idempotent_handler=name == "idempotent",
        )
        self._ids = (f"{secrets.token_hex(4)}-{number}" for number in itertools.count())
        self._has_own_ids = name == "claimed"
        self._consumer: JobConsumer | None = None
        self._target = 0

    async def submit(self, record: Record) -> None:
        """Submit one job and wait until it is stored."""
        job_id = next(self._ids) if self._has_own_ids else ""
        await self._bus.submit(self._queue, record, job_id=job_id, timeout_s=10)

    async def work(self, count: int) -> None:
        """Work until `count` jobs are done and the server has confirmed it."""
        if self._consumer is None:
            self._consumer = await self._bus.work(self._queue, self._handle)
        self._target += count
        while self._consumer.stats.num_done < self._target:  # noqa: ASYNC110  # a confirmed ack wakes nobody else
            await asyncio.sleep(0.002)

    async def _handle(self, record: Record) -> None:
        """The work itself: none."""
