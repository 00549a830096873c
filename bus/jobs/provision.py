"""Making what queues and large messages need in JetStream before it is missed, with an operator's rights.

In: queues as they are declared, and whether there are large messages. Out: their streams and consumers. What is there
stays as it is. Workers make the same at first need, where they may.
"""

from collections.abc import Sequence

from bus.control_plane.jetstream import JetStream
from bus.jobs.queue import JobQueueConfig
from bus.jobs.streams import ConsumerSettings, Streams, ensure_consumer, ensure_stream
from schemas.subjects import Subjects


async def provision(
    jetstream: JetStream, streams: Streams, subjects: Subjects, queues: Sequence[JobQueueConfig], *, media: bool
) -> list[str]:
    """Make what is missing; returns the names of all. Raises `DurableWorkUnavailable` and what a request raises."""
    wanted = [streams.jobs, streams.dead_letters, streams.claims] if queues else []
    if media:
        wanted.append(streams.media)
    for stream in wanted:
        await ensure_stream(jetstream, stream)
    consumers = [
        ConsumerSettings(
            streams.jobs.name,
            queue.durable,
            queue.subject(subjects),
            queue.ack_wait_s,
            queue.max_ack_pending,
            queue.max_deliver,
        )
        for queue in queues
    ]
    for consumer in consumers:
        await ensure_consumer(jetstream, consumer)
    return [*(stream.name for stream in wanted), *(consumer.name for consumer in consumers)]
