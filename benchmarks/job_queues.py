"""Durable jobs of `benchmarks.bus`: the floor, nats-py's own publish, fetch(32) and ack on a work-queue stream."""

import asyncio
import contextlib

from nats.aio.client import Client
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy, StorageType, StreamConfig

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
