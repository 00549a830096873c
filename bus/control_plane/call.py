"""The caller's side of a request: typed message out, typed reply or a stream of numbered frames back.

In: a subject, a message, the types that may come back. Out: the reply, or a typed error: `RemoteFault` for a fault,
`NoResponders` at once, `DeadlineExceeded`, `RemoteProtocolError` for a reply that is not what was asked for or a
stream with a gap. Every call runs under a deadline, tells the peer what remains of it, and is a PRODUCER span whose
context travels in the headers. A caller that goes away (is cancelled, closes a stream) says so to whoever works for it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from bus.control_plane.connection import Connection, Msg
from bus.control_plane.expiry import Expiries
from bus.control_plane.inbox import Inbox, StreamWaiter
from bus.control_plane.random_ids import RandomIds
from bus.control_plane.retry import ONCE, RetryPolicy
from bus.deadline import Deadline
from bus.errors import (
    BusError,
    ConnectionLost,
    DeadlineExceeded,
    LocalProtocolError,
    NoResponders,
    RemoteFault,
    RemoteProtocolError,
)
from observability import semantic_conventions as names
from observability.active_span import NO_SPAN, Span, SpanKind
from observability.propagation import header_lines
from observability.tracing import current_span, is_tracing, start_span
from schemas.codec import MessageError, decode, encode
from schemas.fault import Fault, FaultCode
from schemas.message import Message
from schemas.protocol import (
    AVOID_HEADER,
    PROTOCOL_HEADER,
    PROTOCOL_VERSION,
    REQUEST_ID_HEADER,
    TTL_HEADER,
    WINDOW_HEADER,
)
from schemas.stream import LastFrame, StreamEnd
from schemas.subjects import Subject, Subjects, may_be_answered

_LOG = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

DEFAULT_WINDOW_FRAMES = 256
"""Frames of a stream that may be on their way or unread: more than a reader falls behind by, less than hurts."""
OVERTAKING_S = 0.5
"""How long a frame may come after one that was sent after it."""
MAX_EARLY_FRAMES = 1024
MAX_PASSES = 10
"""How often a request may meet the worker that it avoids, before it is left to whoever gets it."""


@dataclass(slots=True)
class CallMeter:
    """What one call cost: filled in by `Caller` for a caller who keeps a ledger."""

    sent_bytes: int = 0
    received_bytes: int = 0
    elapsed_ms: float = 0.0


class Caller:
    """Makes typed calls over one connection."""

    def __init__(self, connection: Connection, inbox: Inbox, subjects: Subjects) -> None:
        self._connection = connection
        self._inbox = inbox
        self._subjects = subjects
        self._new_request_id = RandomIds().new

    async def request(
        self,
        subject: Subject,
        message: Message,
        reply_type: type[M],
        *,
        timeout_s: float,
        traced: bool = True,
        meter: CallMeter | None = None,
        retry: RetryPolicy = ONCE,
    ) -> M:
        """Send `message` and return the one reply. The module says what it raises."""
        deadline = Deadline.after(timeout_s)
        started_s = time.perf_counter()
        payload = packed(message)
        send = _send_span(subject, len(payload), None) if traced else None
        attempts = _Attempts(self._connection, retry, deadline, send)
        try:
            while True:
                try:
                    reply = await self._ask(subject, payload, deadline, send, attempts.avoided)
                    answer: M = _decoded(reply, reply_type, subject)
                    break
                except BusError as error:
                    await attempts.failed(error)
        except BaseException as error:
            if send:
                send.fail(error)
            raise
        finally:
            if send:
                send.end()
        if meter is not None:
            meter.sent_bytes, meter.received_bytes = len(payload), len(reply.data)
            meter.elapsed_ms = (time.perf_counter() - started_s) * 1e3
        return answer

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
        frame_type: Any,
        last_type: type[Message] = StreamEnd,
        *,
        timeout_s: float,
        window_frames: int = DEFAULT_WINDOW_FRAMES,
        meter: CallMeter | None = None,
        parent: Span | None = None,
        retry: RetryPolicy = ONCE,
    ) -> AsyncGenerator[Any, None]:
        """Send `message` and yield its frames; a `LastFrame` or one of `last_type` ends the stream and is yielded too.

        `timeout_s` bounds the whole stream; `parent` is the send span's, where it isn't the current one. A gap in
        the numbers is a `RemoteProtocolError`: no frame is lost silently. At most `window_frames` are on their way: a
        reader that falls behind holds up the sender. What refuses the request before its first frame is retried as
        `retry` says.
        """
        deadline = Deadline.after(timeout_s)
        payload = packed(message)
        send = _send_span(subject, len(payload), parent)
        attempts = _Attempts(self._connection, retry, deadline, send)
        metered = _Metered(meter or CallMeter(), len(payload))
        try:
            while True:
                expected = 0
                request_id, expiries = self._new_request_id(), self._inbox.expiries
                call = _StreamCall(self._connection, subject, self._subjects, request_id, expiries, last_type)
                try:
                    with self._inbox.listening(call.waiter) as reply_subject:
                        headers = request_headers(
                            deadline, send, call.request_id, attempts.avoided, window_frames=window_frames
                        )
                        self._connection.publish_now(subject, payload, reply=reply_subject, headers=headers)
                        while not call.is_over:
                            frame = await call.next_frame(frame_type | last_type, expected, deadline, metered)
                            if not isinstance(frame, StreamEnd):
                                yield frame
                            expected += 1
                            call.grant_more(expected)
                    return
                except BusError as error:
                    call.is_over = call.is_over or isinstance(error, (RemoteFault, NoResponders))
                    if expected:
                        raise
                    await attempts.failed(error)
                finally:
                    call.close()
        except GeneratorExit:
            raise
        except BaseException as error:
            send.fail(error)
            raise
        finally:
            send.end()

    async def request_many(
        self,
        subject: Subject,
        message: Message | bytes,
        reply_type: Any,
        *,
        timeout_s: float,
        quiet_s: float | None = None,
        max_replies: int | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Send `message` to all who listen and yield the reply of each, or its `RemoteFault`, as they come.

        It ends after `timeout_s`, after `quiet_s` without a further reply once there was one, or with `max_replies`.
        Raises `NoResponders` if nobody listens, and `ConnectionLost`. `reply_type` None yields the raw `Msg`.
        """
        overall = Deadline.after(timeout_s)
        payload = message if isinstance(message, bytes) else packed(message)
        num_replies = 0
        async with self._inbox.waiting(subject) as (reply_subject, waiter):
            headers = request_headers(overall, None, "") if isinstance(message, Message) else None
            self._connection.publish_now(subject, payload, reply=reply_subject, headers=headers)
            while max_replies is None or num_replies < max_replies:
                wait_s = overall.remaining_s if not num_replies or quiet_s is None else quiet_s
                try:
                    reply = await waiter.next(Deadline.after(min(wait_s, overall.remaining_s)))
                except DeadlineExceeded:
                    return
                num_replies += 1
                try:
                    yield reply if reply_type is None else _decoded(reply, reply_type, subject)
                except RemoteFault as fault:
                    yield fault
                except RemoteProtocolError as error:
                    _LOG.warning("one of many replies was dropped: %s", error)

    async def _ask(
        self, subject: Subject, payload: bytes, deadline: Deadline, send: Span | None, avoided: Sequence[str]
    ) -> Msg:
        request_id = self._new_request_id()
        headers = request_headers(deadline, send, request_id, avoided)
        try:
            return await self._inbox.single(
                subject,
                deadline,
                lambda inbox: self._connection.publish_now(subject, payload, reply=inbox, headers=headers),
            )
        except asyncio.CancelledError:
            cancel(self._connection, self._subjects, request_id)
            raise


def packed(message: object) -> bytes:
    """The bytes of a message that its user wrote. Raises `LocalProtocolError` for what can't be encoded."""
    try:
        if isinstance(message, Message):
            return encode(message)
        why = "it is no Message"
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        why = str(error) or type(error).__name__
    raise LocalProtocolError(
        f"the {type(message).__name__} can't be sent: {why}",
        remedy="send a Message whose fields hold what their types say; integers take up to 64 bits",
    )


class _Attempts:
    """The attempts of one call: counts them, and pauses between."""

    __slots__ = ("_connection", "_deadline", "_num_failed", "_num_passed", "_policy", "_refused", "_span", "avoided")

    def __init__(self, connection: Connection, policy: RetryPolicy, deadline: Deadline, span: Span | None) -> None:
        self._connection = connection
        self.avoided: tuple[str, ...] = ()
        """Workers that refused, for as long as others may be found."""
        self._refused: set[str] = set()
        self._policy = policy
        self._deadline = deadline
        self._span = span
        self._num_failed = 0
        self._num_passed = 0

    async def failed(self, error: BusError) -> None:
        """Return when it is time for the next attempt, or raise `error`."""
        if self._was_declined(error):
            self._num_passed += 1
            if self._num_passed == MAX_PASSES:
                self.avoided = ()  # for good: there seems to be nobody else
            return
        self._num_failed += 1
        elsewhere = bool(error.peer) and error.peer not in self._refused
        pause_s = self._policy.pause_s(error, self._num_failed, self._deadline.remaining_s, elsewhere=elsewhere)
        if pause_s is None:
            raise error
        if self._span:
            self._span.event("retry", {"error": str(error), "pause_ms": round(pause_s * 1e3, 1)})
        if error.peer:
            self._refused.add(error.peer)
        if error.peer and error.peer not in self.avoided and self._num_passed < MAX_PASSES:
            self.avoided = (*self.avoided, error.peer)[-MAX_PASSES:]
        await asyncio.sleep(pause_s)
        if isinstance(error, ConnectionLost):
            await self._connection.connected(self._deadline)

    def _was_declined(self, error: BusError) -> bool:
        """Whether one of those that refused before got it again, and said no more than that."""
        return (
            bool(self.avoided)
            and isinstance(error, RemoteFault)
            and error.fault.code == FaultCode.DECLINED
            and not error.fault.hops
        )


class _StreamCall:
    """One attempt at a stream: its frames in order, the credit for more, the word that nobody reads any further."""

    def __init__(
        self,
        connection: Connection,
        subject: Subject,
        subjects: Subjects,
        request_id: str,
        expiries: Expiries,
        last_type: type[Message],
    ) -> None:
        self.waiter = StreamWaiter(subject.name, expiries)
        self.request_id = request_id
        self.is_over = False
        """Whether the sender has ended it."""
        self._connection = connection
        self._subject = subject
        self._subjects = subjects
        self._last_types = (LastFrame, last_type)
        self._early: dict[int, tuple[Any, str]] = {}
        """Frames that overtook others, which those that travel by two servers may do."""
        self._credit_subject = ""

    async def next_frame(self, frame_type: Any, expected: int, deadline: Deadline, metered: "_Metered") -> Any:
        """The frame of number `expected`; one that comes a second time is passed over."""
        while expected not in self._early:
            message = await self._next_message(expected, deadline)
            metered.count(message)
            frame = _decoded(message, frame_type | StreamEnd, self._subject)
            seq = getattr(frame, "seq", None)
            if not isinstance(seq, int):
                raise RemoteProtocolError(
                    "a frame without a number: frames derive from Frame", subject=str(self._subject)
                )
            if seq >= expected:
                self._early[seq] = (frame, message.reply)
            if seq < 0 or len(self._early) > MAX_EARLY_FRAMES:
                raise self._gap(expected)
        frame, self._credit_subject = self._early.pop(expected)
        self.is_over = isinstance(frame, self._last_types)
        return frame

    async def _next_message(self, expected: int, deadline: Deadline) -> Msg:
        """What comes next; where later frames are here already, the one that is due has little time left."""
        if not self._early:
            return await self.waiter.next(deadline)
        try:
            return await self.waiter.next(Deadline.at(min(deadline.at_s, time.monotonic() + OVERTAKING_S)))
        except DeadlineExceeded:
            raise self._gap(expected) from None

    def _gap(self, expected: int) -> RemoteProtocolError:
        came = min(self._early, default=-1)
        return RemoteProtocolError(
            f"frame {came} came where {expected} was due: part of the stream is lost", subject=self._subject.name
        )

    def grant_more(self, num_read: int) -> None:
        """Answer a sender that asks how many frames were read."""
        if not self.is_over and may_be_answered(self._credit_subject, self._subject):
            with suppress(BusError):
                self._connection.publish_now(self._credit_subject, str(num_read).encode())

    def close(self) -> None:
        """Tell the sender to stop, if it hasn't."""
        if not self.is_over:
            self.is_over = True
            cancel(self._connection, self._subjects, self.request_id)


class _Metered:
    """Fills in a `CallMeter` as frames come."""

    def __init__(self, meter: CallMeter, sent_bytes: int) -> None:
        self._meter = meter
        self._started_s = time.perf_counter()
        meter.sent_bytes = sent_bytes

    def count(self, message: Msg) -> None:
        """One more frame."""
        self._meter.received_bytes += len(message.data)
        self._meter.elapsed_ms = (time.perf_counter() - self._started_s) * 1e3


def cancel(connection: Connection, subjects: Subjects, request_id: str) -> None:
    """Tell whoever works on a request that its caller is gone."""
    with suppress(BusError):
        connection.publish_now(subjects.cancel(request_id), b"")


def request_headers(
    deadline: Deadline,
    span: Span | None,
    request_id: str,
    avoided: Sequence[str] = (),
    *,
    window_frames: int = 0,
) -> bytes:
    """The headers of a request: our protocol version, what remains of the deadline, the request's id, the trace."""
    text = f"NATS/1.0\r\n{PROTOCOL_HEADER}: {PROTOCOL_VERSION}\r\n{TTL_HEADER}: {deadline.remaining_ms}\r\n"
    if request_id:
        text += f"{REQUEST_ID_HEADER}: {request_id}\r\n"
    if window_frames:
        text += f"{WINDOW_HEADER}: {window_frames}\r\n"
    if avoided:
        text += f"{AVOID_HEADER}: {','.join(avoided)}\r\n"
    return (text + trace_headers(span) + "\r\n").encode()


def trace_headers(span: Span | None) -> str:
    """The header lines of a trace, "" without one."""
    if span is None or span is NO_SPAN:
        return ""
    return header_lines(span)


def _send_span(subject: Subject, num_bytes: int, parent: Span | None) -> Span:
    if parent is None and not is_tracing():
        return current_span()  # records nothing, and carries on the trace that this request belongs to
    return start_span(
        f"send {subject.template}",
        kind=SpanKind.PRODUCER,
        parent=parent,
        attributes=lambda: {
            names.MESSAGING_SYSTEM: "nats",
            names.MESSAGING_OPERATION_NAME: "send",
            names.MESSAGING_OPERATION_TYPE: "send",
            names.MESSAGING_DESTINATION_NAME: subject.name,
            names.MESSAGING_DESTINATION_TEMPLATE: subject.template,
            names.MESSAGING_MESSAGE_BODY_SIZE: num_bytes,
        },
    )


@lru_cache(maxsize=256)
def _or_fault(reply_type: Any) -> Any:
    return reply_type | Fault


def _decoded(message: Msg, reply_type: Any, subject: Subject) -> Any:
    try:
        reply: Any = decode(message.data, _or_fault(reply_type))
    except MessageError as error:
        raise RemoteProtocolError(f"the reply is not what was asked for: {error}", subject=subject.name) from None
    if isinstance(reply, Fault):
        raise RemoteFault(reply, subject=subject.name)
    return reply
