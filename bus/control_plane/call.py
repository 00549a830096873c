"""The caller's side of a request: typed message out, typed reply or a stream of numbered frames back.

In: a subject, a message, the types that may come back. Out: the reply, or a typed error: `RemoteFault` for a fault,
`NoResponders` at once, `DeadlineExceeded`, `RemoteProtocolError` for a reply that is not what was asked for or a
stream with a gap. Every call runs under a deadline, tells the peer what remains of it, and is a PRODUCER span whose
context travels in the headers.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from bus.control_plane.connection import Connection, Msg
from bus.control_plane.inbox import Inbox
from bus.deadline import Deadline
from bus.errors import RemoteFault, RemoteProtocolError
from observability import semantic_conventions as names
from observability.active_span import Span, SpanKind
from observability.propagation import inject
from observability.tracing import start_span
from schemas.codec import MessageError, decode, encode
from schemas.fault import Fault
from schemas.message import Message
from schemas.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION, TTL_HEADER
from schemas.subjects import Subject

M = TypeVar("M", bound=Message)


class Frame(Protocol):
    """What every frame of a stream has: its number, counted from 0."""

    @property
    def seq(self) -> int: ...  # noqa: D102


@dataclass(slots=True)
class CallMeter:
    """What one call cost: filled in by `Caller` for a caller who keeps a ledger."""

    sent_bytes: int = 0
    received_bytes: int = 0
    elapsed_ms: float = 0.0


class Caller:
    """Makes typed calls over one connection."""

    def __init__(self, connection: Connection, inbox: Inbox) -> None:
        self._connection = connection
        self._inbox = inbox

    async def request(
        self,
        subject: Subject,
        message: Message,
        reply_type: type[M],
        *,
        timeout_s: float,
        traced: bool = True,
        meter: CallMeter | None = None,
    ) -> M:
        """Send `message` and return the one reply. The module says what it raises."""
        deadline = Deadline.after(timeout_s)
        started_s = time.perf_counter()
        payload = encode(message)
        send = _send_span(subject, len(payload), None) if traced else None
        try:
            headers = request_headers(deadline, send)
            reply = await self._inbox.single(
                subject,
                deadline,
                lambda inbox: self._connection.publish_now(subject, payload, reply=inbox, headers=headers),
            )
            if meter is not None:
                meter.sent_bytes, meter.received_bytes = len(payload), len(reply.data)
                meter.elapsed_ms = (time.perf_counter() - started_s) * 1e3
            answer: M = _decoded(reply, reply_type, subject)
            return answer
        except BaseException as error:
            if send:
                send.fail(error)
            raise
        finally:
            if send:
                send.end()

    async def ask_peer(self, subject: Subject, message: Message, reply_type: type[M], *, timeout_s: float) -> M:
        """A small question inside an operation, to a worker that has shaken hands: no headers, no span."""
        payload = encode(message)
        reply = await self._inbox.single(
            subject,
            Deadline.after(timeout_s),
            lambda inbox: self._connection.publish_now(subject, payload, reply=inbox),
        )
        answer: M = _decoded(reply, reply_type, subject)
        return answer

    async def stream(
        self,
        subject: Subject,
        message: Message,
        frame_type: type[Message],
        last_type: type[Message],
        *,
        timeout_s: float,
        meter: CallMeter | None = None,
        parent: Span | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Send `message` and yield its frames; the one of `last_type` ends the stream and is yielded too.

        `timeout_s` bounds the whole stream; `parent` is the send span's, where it isn't the current one. A gap in
        the numbers is a `RemoteProtocolError`: no frame is lost silently.
        """
        frames = self._frames(subject, message, frame_type | last_type, timeout_s, meter or CallMeter(), parent)
        expected = 0
        async with aclosing(frames):
            async for frame in frames:
                if frame.seq != expected:
                    raise RemoteProtocolError(
                        f"frame {frame.seq} came where {expected} was due: part of the stream is lost",
                        subject=subject.name,
                    )
                expected += 1
                yield frame
                if isinstance(frame, last_type):
                    return

    async def _frames(
        self,
        subject: Subject,
        message: Message,
        frame_type: Any,
        timeout_s: float,
        meter: CallMeter,
        parent: Span | None,
    ) -> AsyncGenerator[Any, None]:
        deadline = Deadline.after(timeout_s)
        started = time.perf_counter()
        payload = encode(message)
        send = _send_span(subject, len(payload), parent)
        try:
            async with self._inbox.waiting(subject) as (reply_subject, waiter):
                headers = request_headers(deadline, send)
                await self._connection.publish(subject, payload, reply=reply_subject, headers=headers)
                meter.sent_bytes = len(payload)
                while True:
                    reply = await waiter.next(deadline)
                    meter.received_bytes += len(reply.data)
                    meter.elapsed_ms = (time.perf_counter() - started) * 1e3
                    yield _decoded(reply, frame_type, subject)
        except GeneratorExit:
            raise
        except BaseException as error:
            send.fail(error)
            raise
        finally:
            send.end()


def request_headers(deadline: Deadline, span: Span | None) -> dict[str, str]:
    """The headers of a request: our protocol version, what remains of the deadline, the trace."""
    headers = {PROTOCOL_HEADER: str(PROTOCOL_VERSION), TTL_HEADER: str(deadline.remaining_ms)}
    if span is not None:
        inject(headers, span)
    return headers


def _send_span(subject: Subject, num_bytes: int, parent: Span | None) -> Span:
    return start_span(
        f"send {subject.template}",
        kind=SpanKind.PRODUCER,
        parent=parent,
        attributes={
            names.MESSAGING_SYSTEM: "nats",
            names.MESSAGING_OPERATION_NAME: "send",
            names.MESSAGING_OPERATION_TYPE: "send",
            names.MESSAGING_DESTINATION_NAME: subject.name,
            names.MESSAGING_DESTINATION_TEMPLATE: subject.template,
            names.MESSAGING_MESSAGE_BODY_SIZE: num_bytes,
        },
    )


def _decoded(message: Msg, reply_type: Any, subject: Subject) -> Any:
    try:
        reply: Any = decode(message.data, reply_type | Fault)
    except MessageError as error:
        raise RemoteProtocolError(f"the reply is not what was asked for: {error}", subject=subject.name) from None
    if isinstance(reply, Fault):
        raise RemoteFault(reply, subject=subject.name)
    return reply
