"""Dead letters: jobs that were given up, kept with their payload, their headers and the reason.

In: a job that failed for good (`bury`), or a number (`show`, `replay`, `drop`). Out: dead letters in their stream.
Invariants: a dead letter is stored before its job is taken out of the queue, under an id made of the job's place there,
so that a worker that dies in between leaves one dead letter and not none or two; a replay is stored in the queue before
the dead letter goes, in the same way. Every call is bounded in what it returns and in time. Whatever a job is, there is
a dead letter that can be stored: what can't be sent, or doesn't fit beside the reason, is left out, and that is noted.
What a letter says is whoever's who may publish it: where a job belongs is read from the letter's own subject.
"""

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from bus.control_plane.delivery import Delivery
from bus.control_plane.direct_client import header_block
from bus.control_plane.jetstream import API_TIMEOUT_S, JetStream, JetStreamError, NoStream, Stored, StoredMessage
from bus.errors import DeadLetterNotFound, DeadlineExceeded, LocalProtocolError, PayloadTooLarge
from bus.jobs.queue import job_id_of
from bus.jobs.streams import Streams, ensure_stream
from schemas.fault import Fault
from schemas.jobs import (
    DEAD_CODE_HEADER,
    DEAD_DELIVERIES_HEADER,
    DEAD_LEFT_OUT_HEADER,
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
from schemas.protocol import PROTOCOL_HEADER, TTL_HEADER
from schemas.subjects import SUBJECT_VERSION, Subjects, identifier

HEADROOM_BYTES = 4096
"""What a dead letter's headers may add to a job: submitting keeps it free below max_payload."""
MAX_LISTED = 10_000
_MESSAGE_BYTES = 1000
_REMEDY_BYTES = 500
_NAME_BYTES = 256
_NO_MESSAGE = 10037
_OVER_THE_STREAM_S_LIMIT = 10054
_MOST_DIGITS = 15
_OUR_OWN = (PROTOCOL_HEADER, TTL_HEADER, JOB_ID_HEADER)
"""Headers of a job that it can't be run without. Kept where the rest has no room, if they are as short as ours."""
_OUR_OWN_BYTES = 128
_SHORTEST = (JOB_ID_HEADER, DEAD_CODE_HEADER, DEAD_DELIVERIES_HEADER)
_HEADERS, _PAYLOAD = "headers", "payload"
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
    """Where a replay goes."""
    job_sequence: int
    trace_id: str
    """Of the last delivery; "" if it wasn't recorded."""
    payload: bytes = field(repr=False)
    headers: dict[str, str]
    """The job's own."""
    left_out: str = ""
    """What of the job is not kept, because it could not be sent or had no room: "headers" or "payload"."""


class DeadLetters:
    """The dead letters of one bus."""

    def __init__(self, jetstream: JetStream, streams: Streams, subjects: Subjects) -> None:
        self._jetstream = jetstream
        self._stream = streams.dead_letters
        self._subjects = subjects

    async def list(
        self, *, graph: str = "*", queue: str = "*", limit: int = 100, timeout_s: float = 30.0
    ) -> list[DeadLetter]:
        """The oldest `limit` of one queue, or of all, within `timeout_s`.

        Raises `InvalidIdentifier`, `DeadlineExceeded`, `DurableWorkUnavailable` and what a request raises.
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

        It keeps its job id and loses its claim: it runs, whatever became of the job. Raises `DeadLetterNotFound`, and
        `LocalProtocolError` for one whose payload was not kept.
        """
        letter = await self.show(sequence, timeout_s=timeout_s)
        if letter.left_out == _PAYLOAD:
            raise LocalProtocolError(
                f"dead letter {sequence} was too large to be kept whole: there is no payload to replay",
                remedy="submit the job again from where it came, and 'nixlbus dlq drop' this one",
            )
        replay = f"{self._stream.name}-{sequence}-{letter.dead_at}"
        own = {**_sendable(letter.headers), JOB_ID_HEADER: letter.job_id}
        headers = {**own, MSG_ID_HEADER: replay, REPLAY_HEADER: replay}
        stored = await self._jetstream.publish(letter.job_subject, letter.payload, headers, timeout_s=timeout_s)
        await self._delete(sequence, timeout_s)
        return stored

    async def drop(self, sequence: int, *, timeout_s: float = API_TIMEOUT_S) -> None:
        """Take it out for good. Raises `DeadLetterNotFound`."""
        await self.show(sequence, timeout_s=timeout_s)
        await self._delete(sequence, timeout_s)

    async def bury(self, delivery: Delivery, fault: Fault, num_attempts: int, worker_id: str, trace_id: str) -> None:
        """Store a delivered job as a dead letter. Raises what a publish raises: then it is still in its queue."""
        subject = self._subject_of(delivery.subject)
        message_id = f"{delivery.stream_sequence}-{delivery.stored_at_ns}"
        too_large: PayloadTooLarge | JetStreamError | None = None
        for headers, payload in _forms(delivery, fault, num_attempts, worker_id, trace_id):
            try:
                await self._store(subject, payload, {**headers, MSG_ID_HEADER: message_id})
            except PayloadTooLarge as error:
                too_large = error
            except JetStreamError as error:
                if error.number != _OVER_THE_STREAM_S_LIMIT:
                    raise
                too_large = error
            else:
                return
        assert too_large is not None
        raise too_large

    async def _store(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> None:
        try:
            await self._jetstream.publish(subject, payload, headers)
        except NoStream:
            await ensure_stream(self._jetstream, self._stream)
            await self._jetstream.publish(subject, payload, headers)

    async def _walk(self, graph: str, queue: str, limit: int, timeout_s: float) -> AsyncIterator[DeadLetter]:
        wanted = f"{self._stream.subjects[0][:-1]}{graph}.{queue}"
        give_up_s = time.monotonic() + timeout_s
        sequence = 1
        for num_found in range(limit):
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded(
                    f"{num_found} dead letters were read in {timeout_s:g} s, and there are more",
                    remedy="ask for fewer with limit, or raise timeout_s",
                )
            try:
                stored = await self._jetstream.next_message(self._stream.name, wanted, sequence, timeout_s=left_s)
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


def _forms(
    delivery: Delivery, fault: Fault, num_attempts: int, worker_id: str, trace_id: str
) -> Iterator[tuple[dict[str, str], bytes]]:
    """The headers and payload of a dead letter: whole, then with ever less of what the job brought along.

    The job itself had room, so the reason goes before the payload does.
    """
    reason = _reason(delivery, fault, num_attempts, worker_id, trace_id)
    own = {name: value for name, value in delivery.headers.items() if _belongs_to_the_job(name)}
    sendable = _sendable(own)
    ours = {name: sendable[name] for name in _OUR_OWN if len(sendable.get(name, "")) in range(1, _OUR_OWN_BYTES)}
    shortest = {name: reason[name] for name in _SHORTEST if name in reason}
    some_headers, the_payload = {DEAD_LEFT_OUT_HEADER: _HEADERS}, {DEAD_LEFT_OUT_HEADER: _PAYLOAD}
    yield {**sendable, **reason, **({} if len(sendable) == len(own) else some_headers)}, delivery.payload
    yield {**ours, **reason, **some_headers}, delivery.payload
    yield {**ours, **shortest, **some_headers}, delivery.payload
    yield {**ours, **reason, **the_payload}, b""
    yield {**ours, **shortest, **the_payload}, b""


def _reason(delivery: Delivery, fault: Fault, num_attempts: int, worker_id: str, trace_id: str) -> dict[str, str]:
    reason = {
        DEAD_CODE_HEADER: _line(fault.code, _NAME_BYTES),
        DEAD_MESSAGE_HEADER: _line(fault.message, _MESSAGE_BYTES),
        DEAD_REMEDY_HEADER: _line(fault.remedy, _REMEDY_BYTES),
        DEAD_DELIVERIES_HEADER: str(num_attempts),
        DEAD_WORKER_HEADER: _line(fault.worker_id or worker_id, _NAME_BYTES),
        DEAD_TIME_HEADER: datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        DEAD_SUBJECT_HEADER: delivery.subject,
        DEAD_SEQUENCE_HEADER: str(delivery.stream_sequence),
        DEAD_MSG_ID_HEADER: _line(delivery.headers.get(MSG_ID_HEADER, ""), _NAME_BYTES),
        DEAD_TRACE_HEADER: trace_id,
    }
    job_id = job_id_of(delivery.headers, delivery.stream_sequence, delivery.stored_at_ns)
    return {JOB_ID_HEADER: job_id, **{name: value for name, value in _sendable(reason).items() if value}}


def _letter(stored: StoredMessage) -> DeadLetter:
    headers = stored.headers
    graph, queue = stored.subject.rsplit(".", 2)[-2:]
    job_id = job_id_of(headers, stored.sequence, int(stored.stored_at.timestamp() * 1e9))
    return DeadLetter(
        sequence=stored.sequence,
        graph=graph,
        queue=queue,
        job_id=job_id,
        code=headers.get(DEAD_CODE_HEADER, ""),
        message=headers.get(DEAD_MESSAGE_HEADER, ""),
        remedy=headers.get(DEAD_REMEDY_HEADER, ""),
        deliveries=_number(headers, DEAD_DELIVERIES_HEADER),
        worker_id=headers.get(DEAD_WORKER_HEADER, ""),
        dead_at=headers.get(DEAD_TIME_HEADER, "") or stored.stored_at.isoformat(),
        job_subject=stored.subject.replace(f".{SUBJECT_VERSION}.dlq.", f".{SUBJECT_VERSION}.job.", 1),
        job_sequence=_number(headers, DEAD_SEQUENCE_HEADER),
        trace_id=headers.get(DEAD_TRACE_HEADER, ""),
        payload=stored.payload,
        headers={
            name: value
            for name, value in headers.items()
            if name not in (MSG_ID_HEADER, REPLAY_HEADER) and not name.startswith(DEAD_PREFIX)
        },
        left_out=headers.get(DEAD_LEFT_OUT_HEADER, ""),
    )


def _number(headers: Mapping[str, str], name: str) -> int:
    text = headers.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else 0


def _sendable(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of them that can be sent; a plain client's may have names or values that no message of ours can have."""
    return {name: value for name, value in headers.items() if _is_sendable(name, value)}


def _is_sendable(name: str, value: str) -> bool:
    try:
        header_block({name: value})
    except ValueError:
        return False
    return True


def _belongs_to_the_job(name: str) -> bool:
    return not (name.lower().startswith(_OF_THE_SERVER) or name == MSG_ID_HEADER or name.startswith(DEAD_PREFIX))


def _line(text: str, max_bytes: int) -> str:
    return " ".join(text.split()).encode()[:max_bytes].decode(errors="ignore")
