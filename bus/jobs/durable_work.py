"""`DurableWork`: everything of a bus that lives in JetStream, wired together.

In: a connection and its inbox. Out: submitting, working, dead letters, large messages. Nothing is asked of JetStream
before one of them is used, so a bus on a server without it works as ever.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence

from bus.config import BusConfig
from bus.control_plane.call import packed
from bus.control_plane.connection import Connection
from bus.control_plane.direct_client import header_block
from bus.control_plane.inbox import Inbox
from bus.control_plane.jetstream import API_TIMEOUT_S, JetStream, NoStream, Stored
from bus.errors import LocalProtocolError, PayloadTooLarge
from bus.jobs.claims import Claims
from bus.jobs.consumer import JobConsumer
from bus.jobs.dead_letters import HEADROOM_BYTES, DeadLetters
from bus.jobs.media import MediaStore
from bus.jobs.provision import provision
from bus.jobs.queue import JobQueueConfig, JobReceipt, checked_job_id, message_id
from bus.jobs.settlement import JobHandler, Workplace
from bus.jobs.spans import submit_span
from bus.jobs.streams import Streams, ensure_stream
from observability.propagation import inject
from schemas.jobs import JOB_ID_HEADER, MSG_ID_HEADER, UNIQUE_HEADER
from schemas.message import Message
from schemas.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION, TTL_HEADER
from schemas.subjects import Subject, Subjects

_RESTART_PAUSE_S = 0.1
_ANY_HEADERS_BYTES = 16 << 10
"""More than a job's headers can take, with 8 KiB of baggage; only above it they are counted."""


class DurableWork:
    """One bus's durable side."""

    def __init__(self, connection: Connection, inbox: Inbox, config: BusConfig, subjects: Subjects, epoch: str) -> None:
        self._config = config
        self._subjects = subjects
        self._jetstream = JetStream(connection, inbox)
        self._streams = Streams(config.prefix, config.stream_replicas, config.media_ttl_s)
        self._claims = Claims(self._jetstream, self._streams, config.worker_id, epoch)
        self._consumers: list[JobConsumer] = []
        self.dead_letters = DeadLetters(self._jetstream, self._streams, subjects)
        self.media = MediaStore(self._jetstream, self._streams)

    async def work(self, config: JobQueueConfig, handler: JobHandler) -> JobConsumer:
        """Work on a queue until the bus drains; see `Bus.work`."""
        place = Workplace(
            config,
            config.subject(self._subjects),
            self._config.worker_id,
            handler,
            self._jetstream,
            self._claims,
            self.dead_letters,
        )
        consumer = JobConsumer(place, self._streams)
        await consumer.open(self._config.connect_timeout_s)
        self._consumers.append(consumer)
        return consumer

    async def provision(self, queues: Sequence[JobQueueConfig], *, media: bool) -> list[str]:
        """Make what is missing for `queues` and large messages; see `Bus.provision`."""
        return await provision(self._jetstream, self._streams, self._subjects, queues, media=media)

    async def submit(
        self,
        queue: JobQueueConfig | Subject,
        message: Message,
        *,
        job_id: str = "",
        ttl_s: float | None = None,
        timeout_s: float = API_TIMEOUT_S,
    ) -> JobReceipt:
        """Store a job; see `Bus.submit`."""
        subject = queue.subject(self._subjects) if isinstance(queue, JobQueueConfig) else queue
        self._check(queue, subject, message, ttl_s)
        is_unique = not job_id
        job_id = secrets.token_hex(16) if is_unique else checked_job_id(job_id)
        payload = packed(message)
        sending = submit_span(subject, job_id, len(payload))
        try:
            headers = _headers(subject, job_id, ttl_s)
            if is_unique:
                headers[UNIQUE_HEADER] = "1"
            inject(headers, sending)
            self._check_size(subject, payload, headers)
            stored = await self._store(subject.name, payload, headers, timeout_s)
        except BaseException as error:
            sending.fail(error)
            raise
        finally:
            sending.end()
        return JobReceipt(job_id, stored.sequence, stored.duplicate)

    async def drain(self, timeout_s: float) -> None:
        """Take no more jobs, finish those in hand within `timeout_s`, give back the rest."""
        consumers, self._consumers = self._consumers, []
        await asyncio.gather(*(consumer.drain(timeout_s) for consumer in consumers))

    @property
    def consumers(self) -> list[JobConsumer]:
        """The queues that are worked on here."""
        return list(self._consumers)

    @property
    def num_active(self) -> int:
        """Jobs in hand."""
        return sum(consumer.num_active for consumer in self._consumers)

    async def _store(self, subject: str, payload: bytes, headers: dict[str, str], timeout_s: float) -> Stored:
        give_up_s = time.monotonic() + timeout_s
        try:
            return await self._jetstream.publish(subject, payload, headers, timeout_s=timeout_s)
        except NoStream:
            await ensure_stream(self._jetstream, self._streams.jobs)
        while True:  # a server that has just started may know its streams before it takes messages for them
            left_s = give_up_s - time.monotonic()
            try:
                return await self._jetstream.publish(subject, payload, headers, timeout_s=max(left_s, 0.1))
            except NoStream:
                if left_s <= 0:
                    raise
            await asyncio.sleep(_RESTART_PAUSE_S)

    def _check(self, queue: JobQueueConfig | Subject, subject: Subject, message: Message, ttl_s: float | None) -> None:
        if not isinstance(message, Message):
            raise LocalProtocolError(
                f"a job is a Message, not {type(message).__name__}",
                remedy="derive its class from bus.Message",
            )
        if isinstance(queue, JobQueueConfig) and not isinstance(message, queue.message_type):
            raise LocalProtocolError(
                f"the queue {subject.template} takes {queue.message_type.__name__}, not {type(message).__name__}",
                subject=subject.name,
            )
        if not subject.template.startswith("job."):
            raise LocalProtocolError(
                "this is no queue of jobs", subject=subject.name, remedy="use bus.subjects.job(graph, queue)"
            )
        if ttl_s is not None and not 0.001 <= ttl_s <= 366 * 86_400:
            raise LocalProtocolError(f"ttl_s={ttl_s} of a job is not between a millisecond and a year")

    def _check_size(self, subject: Subject, payload: bytes, headers: dict[str, str]) -> None:
        limit_bytes = self._jetstream.connection.max_payload_bytes - HEADROOM_BYTES
        if len(payload) + _ANY_HEADERS_BYTES <= limit_bytes:
            return
        num_bytes = len(payload) + len(header_block(headers))
        if num_bytes > limit_bytes:
            raise PayloadTooLarge(
                f"a job of {num_bytes:,} bytes is over {limit_bytes:,}: the NATS server's max_payload, less "
                f"{HEADROOM_BYTES:,} for the reason that a dead letter carries",
                num_bytes=num_bytes,
                subject=subject.name,
            )


def _headers(subject: Subject, job_id: str, ttl_s: float | None) -> dict[str, str]:
    headers = {
        PROTOCOL_HEADER: str(PROTOCOL_VERSION),
        MSG_ID_HEADER: message_id(subject, job_id),
        JOB_ID_HEADER: job_id,
    }
    if ttl_s is not None:
        headers[TTL_HEADER] = str(int(ttl_s * 1000))
    return headers
