"""Dead letters: jobs that were given up, kept with their payload, their headers and the reason.

In: a job that failed for good (`bury`), or a number (`show`, `replay`, `drop`). Out: dead letters in their stream.
Invariants: a dead letter is stored before its job is taken out of the queue, under an id made of the job's place there,
so that a worker that dies in between leaves one dead letter and not none or two; a replay is stored in the queue before
the dead letter goes, in the same way. Every call is bounded in what it returns and in time.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from bus.control_plane.delivery import Delivery
from bus.control_plane.jetstream import API_TIMEOUT_S, JetStream, JetStreamError, NoStream, Stored, StoredMessage
from bus.errors import DeadLetterNotFound
from bus.jobs.queue import job_id_of
from bus.jobs.streams import Streams, ensure_stream
from schemas.fault import Fault
from schemas.jobs import (
    DEAD_CODE_HEADER,
    DEAD_DELIVERIES_HEADER,
    DEAD_MESSAGE_HEADER,
    DEAD_MSG_ID_HEADER,
    DEAD_PREFIX,
    DEAD_REMEDY_HEADER,
    DEAD_SEQUENCE_HEADER,
    DEAD_SUBJECT_HEADER,
    DEAD_TIME_HEADER,
    DEAD_TRACE_HEADER,
    DEAD_WORKER_HEADER,
    JOB_ID_HEADER,
    MSG_ID_HEADER,
    REPLAY_HEADER,
)
from schemas.subjects import SUBJECT_VERSION, Subjects, identifier

HEADROOM_BYTES = 4096
"""What a dead letter's headers may add to a job: submitting keeps it free below max_payload."""
MAX_LISTED = 10_000
_MESSAGE_BYTES = 1000
_REMEDY_BYTES = 500
_NO_MESSAGE = 10037
_OF_THE_SERVER = ("nats-expected-", "nats-ttl", "nats-rollup")
"""Headers that tell the server what to do with the message that they came on, and not with a copy."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One job that was given up."""

    sequence: int
    """Its number among the dead letters: what `replay` and `drop` take."""
    graph: str
    queue: str
    job_id: str
    code: str
    """Why: a fault code."""
    message: str
    remedy: str
    deliveries: int
    worker_id: str
    """Who gave up."""
    dead_at: str
    """RFC 3339, UTC."""
    job_subject: str
    job_sequence: int
    trace_id: str
    """Of the last delivery; "" if it wasn't recorded."""
    payload: bytes = field(repr=False)
    headers: dict[str, str]
    """The job's own."""


class DeadLetters:
    """The dead letters of one bus."""

    def __init__(self, jetstream: JetStream, streams: Streams, subjects: Subjects) -> None:
        self._jetstream = jetstream
        self._stream = streams.dead_letters
        self._subjects = subjects

    async def list(
        self, *, graph: str = "*", queue: str = "*", limit: int = 100, timeout_s: float = 30.0
    ) -> list[DeadLetter]:
        """The oldest `limit` of one queue, or of all.

        Raises `InvalidIdentifier`, `DurableWorkUnavailable` and what a request raises.
        """
        for kind, name in (("graph", graph), ("queue", queue)):
            if name != "*":
                identifier(kind, name)
        return [letter async for letter in self._walk(graph, queue, min(limit, MAX_LISTED), timeout_s)]

    async def show(self, sequence: int, *, timeout_s: float = API_TIMEOUT_S) -> DeadLetter:
        """One of them. Raises `DeadLetterNotFound`."""
        try:
            stored = await self._jetstream.message(self._stream.name, sequence, timeout_s=timeout_s)
        except NoStream:
            await self._jetstream.check()
            stored = None
        if stored is None:
            raise DeadLetterNotFound(f"there is no dead letter {sequence}")
        return _letter(stored)

    async def replay(self, sequence: int, *, timeout_s: float = API_TIMEOUT_S) -> Stored:
        """Put it back into its queue, where it begins with all its deliveries, and take it out of the dead letters.

        It keeps its job id and loses its claim: it runs, whatever became of the job. Raises `DeadLetterNotFound`.
        """
        letter = await self.show(sequence, timeout_s=timeout_s)
        replay = f"{self._stream.name}-{sequence}-{letter.dead_at}"
        headers = {**letter.headers, JOB_ID_HEADER: letter.job_id, MSG_ID_HEADER: replay, REPLAY_HEADER: replay}
        stored = await self._jetstream.publish(letter.job_subject, letter.payload, headers, timeout_s=timeout_s)
        await self._delete(sequence, timeout_s)
        return stored

    async def drop(self, sequence: int, *, timeout_s: float = API_TIMEOUT_S) -> None:
        """Take it out for good. Raises `DeadLetterNotFound`."""
        await self.show(sequence, timeout_s=timeout_s)
        await self._delete(sequence, timeout_s)

    async def bury(self, delivery: Delivery, fault: Fault, num_attempts: int, worker_id: str, trace_id: str) -> None:
        """Store a delivered job as a dead letter. Raises what a publish raises: then it is still in its queue."""
        headers = _dead_headers(delivery, fault, num_attempts, worker_id, trace_id)
        headers[MSG_ID_HEADER] = f"{delivery.stream_sequence}-{delivery.stored_at_ns}"
        subject = self._subject_of(delivery.subject)
        try:
            await self._jetstream.publish(subject, delivery.payload, headers)
        except NoStream:
            await ensure_stream(self._jetstream, self._stream)
            await self._jetstream.publish(subject, delivery.payload, headers)

    async def _walk(self, graph: str, queue: str, limit: int, timeout_s: float) -> AsyncIterator[DeadLetter]:
        wanted = f"{self._stream.subjects[0][:-1]}{graph}.{queue}"
        sequence = 1
        for _ in range(limit):
            try:
                stored = await self._jetstream.next_message(self._stream.name, wanted, sequence, timeout_s=timeout_s)
            except NoStream:
                await self._jetstream.check()
                return
            if stored is None:
                return
            yield _letter(stored)
            sequence = stored.sequence + 1

    async def _delete(self, sequence: int, timeout_s: float) -> None:
        try:
            await self._jetstream.api(
                f"STREAM.MSG.DELETE.{self._stream.name}", {"seq": sequence, "no_erase": True}, timeout_s=timeout_s
            )
        except JetStreamError as error:
            if error.number != _NO_MESSAGE:  # another was faster
                raise

    def _subject_of(self, job_subject: str) -> str:
        return job_subject.replace(f".{SUBJECT_VERSION}.job.", f".{SUBJECT_VERSION}.dlq.", 1)


def _dead_headers(delivery: Delivery, fault: Fault, num_attempts: int, worker_id: str, trace_id: str) -> dict[str, str]:
    reason = {
        DEAD_CODE_HEADER: fault.code,
        DEAD_MESSAGE_HEADER: _line(fault.message, _MESSAGE_BYTES),
        DEAD_REMEDY_HEADER: _line(fault.remedy, _REMEDY_BYTES),
        DEAD_DELIVERIES_HEADER: str(num_attempts),
        DEAD_WORKER_HEADER: fault.worker_id or worker_id,
        DEAD_TIME_HEADER: datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        DEAD_SUBJECT_HEADER: delivery.subject,
        DEAD_SEQUENCE_HEADER: str(delivery.stream_sequence),
        DEAD_MSG_ID_HEADER: delivery.headers.get(MSG_ID_HEADER, ""),
        DEAD_TRACE_HEADER: trace_id,
    }
    job_id = job_id_of(delivery.headers, delivery.stream_sequence, delivery.stored_at_ns)
    own = {name: value for name, value in delivery.headers.items() if not _is_of_the_server(name)}
    return {**own, JOB_ID_HEADER: job_id, **{name: value for name, value in reason.items() if value}}


def _letter(stored: StoredMessage) -> DeadLetter:
    headers = stored.headers
    graph, queue = stored.subject.rsplit(".", 2)[-2:]
    return DeadLetter(
        sequence=stored.sequence,
        graph=graph,
        queue=queue,
        job_id=headers.get(JOB_ID_HEADER, ""),
        code=headers.get(DEAD_CODE_HEADER, ""),
        message=headers.get(DEAD_MESSAGE_HEADER, ""),
        remedy=headers.get(DEAD_REMEDY_HEADER, ""),
        deliveries=_number(headers, DEAD_DELIVERIES_HEADER),
        worker_id=headers.get(DEAD_WORKER_HEADER, ""),
        dead_at=headers.get(DEAD_TIME_HEADER, "") or stored.stored_at.isoformat(),
        job_subject=headers.get(DEAD_SUBJECT_HEADER, "")
        or stored.subject.replace(f".{SUBJECT_VERSION}.dlq.", f".{SUBJECT_VERSION}.job.", 1),
        job_sequence=_number(headers, DEAD_SEQUENCE_HEADER),
        trace_id=headers.get(DEAD_TRACE_HEADER, ""),
        payload=stored.payload,
        headers={
            name: value
            for name, value in headers.items()
            if name not in (MSG_ID_HEADER, REPLAY_HEADER) and not name.startswith(DEAD_PREFIX)
        },
    )


def _number(headers: Mapping[str, str], name: str) -> int:
    text = headers.get(name, "")
    return int(text) if text.isdigit() else 0


def _is_of_the_server(name: str) -> bool:
    return name.lower().startswith(_OF_THE_SERVER) or name == MSG_ID_HEADER


def _line(text: str, max_bytes: int) -> str:
    return " ".join(text.split()).encode()[:max_bytes].decode(errors="ignore")
