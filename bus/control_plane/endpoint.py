"""The serving side of a request: a subject, a handler, and everything between them.

In: messages from anybody. Out: for each exactly one reply (or one stream of frames), which may be a fault.
The subscription's callback only stamps and enqueues; `concurrency` slots take from a bounded queue, so that a slow
request holds up no other and an overload is refused at once. Each request is checked (protocol, type, fields,
deadline) before the handler sees it, runs under its deadline inside a CONSUMER span, and an exception becomes a
typed fault. A reply is written in the encoding of its request and never echoes its headers.
"""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bus.control_plane.connection import Connection, Msg, Subscription
from bus.deadline import Deadline, working_under
from bus.errors import BusError, DeadlineExceeded, Draining, Overloaded, fault_of
from observability import semantic_conventions as names
from observability.active_span import SpanKind
from observability.propagation import extract
from observability.tracing import span
from schemas.codec import Encoding, MessageError, decode, encode, encoding_of
from schemas.fault import Fault
from schemas.message import Message
from schemas.protocol import (
    SERVICE_ERROR_CODE_HEADER,
    SERVICE_ERROR_HEADER,
    TTL_HEADER,
    WrongProtocol,
    check_protocol,
)
from schemas.subjects import InvalidIdentifier, Subject, may_be_answered

Handler = Callable[[Any], Awaitable[Message] | AsyncGenerator[Message, None]]
MAX_TTL_S = 3600.0

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """How one subject is served."""

    name: str
    subject: Subject
    request_type: type[Message]
    queue_group: str = ""
    concurrency: int = 16
    max_queued: int = 256
    """Requests that wait for a slot; one more is refused with `Overloaded`."""
    default_ttl_s: float = 60.0
    """For a request that brings no TTL header."""
    public: bool = False
    """Open to plain clients: the protocol header may be absent, and JSON is understood."""
    traced: bool = True
    """Off for the small calls inside an operation, which are events of its span."""


@dataclass(slots=True)
class EndpointStats:
    """Counters since the endpoint opened, as NATS ADR-32 names them."""

    num_requests: int = 0
    num_errors: int = 0
    processing_time_ns: int = 0
    last_error: str = ""


@dataclass(slots=True)
class _Received:
    message: Msg
    at_s: float = field(default_factory=time.monotonic)


class Endpoint:
    """One served subject; `open` subscribes, `drain` finishes what was taken."""

    def __init__(self, connection: Connection, worker_id: str, config: EndpointConfig, handler: Handler) -> None:
        self.config = config
        self.stats = EndpointStats()
        self._connection = connection
        self._worker_id = worker_id
        self._handler = handler
        self._queue: asyncio.Queue[_Received] = asyncio.Queue(maxsize=config.max_queued)
        self._slots: list[asyncio.Task[None]] = []
        self._subscription: Subscription | None = None
        self._draining = False

    async def open(self) -> None:
        """Start the slots and subscribe."""
        self._slots = [asyncio.create_task(self._slot()) for _ in range(self.config.concurrency)]
        self._subscription = await self._connection.subscribe(
            self.config.subject, self._on_message, queue_group=self.config.queue_group
        )

    async def drain(self, timeout_s: float) -> None:
        """Take no more, finish what was taken within `timeout_s`, then cancel what is left."""
        if self._subscription:
            await self._connection.unsubscribe(self._subscription)
        with contextlib.suppress(BusError):
            await self._connection.flush(min(timeout_s, 2.0))
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._queue.join()
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)

    async def _on_message(self, message: Msg) -> None:
        if not may_be_answered(message.reply, self.config.subject):
            self.stats.num_errors += 1
            self.stats.last_error = "a request without a reply subject, or with one of the bus's own, is not answered"
            return
        try:
            if self._draining:
                raise Draining("the worker is draining", subject=self.config.subject.name)
            self._queue.put_nowait(_Received(message))
        except (Draining, asyncio.QueueFull) as error:
            refusal = error if isinstance(error, Draining) else self._overloaded()
            encoding = encoding_of(message.data) if self.config.public else Encoding.MSGPACK
            await self._reply_fault(message, refusal, encoding, seq=0, trace_id="")

    def _overloaded(self) -> Overloaded:
        return Overloaded(
            f"{self.config.max_queued} requests wait for {self.config.concurrency} slots",
            subject=self.config.subject.name,
        )

    async def _slot(self) -> None:
        while True:
            received = await self._queue.get()
            started_ns = time.perf_counter_ns()
            try:
                await self._serve(received)
            except asyncio.CancelledError:
                raise
            except BusError as error:
                self._count_error(error)
                _LOG.warning("no reply could be sent on %s: %s", self.config.subject.template, error)
            finally:
                self.stats.num_requests += 1
                self.stats.processing_time_ns += time.perf_counter_ns() - started_ns
                self._queue.task_done()

    async def _serve(self, received: _Received) -> None:
        message = received.message
        encoding = encoding_of(message.data) if self.config.public else Encoding.MSGPACK
        with self._process_span(message, received) as process:
            reply = _Reply(self, message, encoding, process.trace_id)
            try:
                with working_under(_deadline(message.headers, received.at_s, self.config.default_ttl_s)) as deadline:
                    await self._answer(message, encoding, deadline, reply)
            except asyncio.CancelledError as error:
                process.fail(error)
                await reply.fault(Draining("the worker stopped while it worked on this"))
                if _task_is_cancelled():
                    raise
            except Exception as error:
                process.fail(error)
                self._log_fault(error, process.trace_id)
                await reply.fault(error)

    async def _answer(self, message: Msg, encoding: Encoding, deadline: Deadline, reply: "_Reply") -> None:
        if deadline.expired:
            raise DeadlineExceeded("the request's time was up before a slot took it", subject=self.config.subject.name)
        check_protocol(message.headers, required=not self.config.public)
        request = decode(message.data, self.config.request_type, encoding)
        try:
            async with asyncio.timeout(deadline.remaining_s):
                answer = self._handler(request)
                if inspect.isawaitable(answer):
                    await reply.frame(await answer)
                else:
                    async with contextlib.aclosing(answer) as frames:
                        async for frame in frames:
                            await reply.frame(frame)
        except TimeoutError:
            if not deadline.expired:
                raise
            raise DeadlineExceeded("the request's time was up", subject=self.config.subject.name) from None

    @contextlib.contextmanager
    def _process_span(self, message: Msg, received: _Received) -> Iterator[Any]:
        if not self.config.traced:
            yield _NO_SPAN
            return
        subject = self.config.subject
        with span(
            f"process {subject.template}",
            kind=SpanKind.CONSUMER,
            parent=extract(message.headers),
            attributes={
                names.MESSAGING_SYSTEM: "nats",
                names.MESSAGING_OPERATION_NAME: "process",
                names.MESSAGING_OPERATION_TYPE: "process",
                names.MESSAGING_DESTINATION_NAME: subject.name,
                names.MESSAGING_DESTINATION_TEMPLATE: subject.template,
                names.MESSAGING_CONSUMER_GROUP_NAME: self.config.queue_group,
                names.MESSAGING_CLIENT_ID: self._worker_id,
                names.MESSAGING_MESSAGE_BODY_SIZE: len(message.data),
                names.NIXL_WAIT_QUEUE_MS: round((time.monotonic() - received.at_s) * 1e3, 3),
            },
        ) as process:
            yield process

    async def _reply_fault(
        self, message: Msg, error: BaseException, encoding: Encoding, seq: int, trace_id: str
    ) -> None:
        fault = fault_of(error, worker_id=self._worker_id, trace_id=trace_id)
        self._count_error(error)
        await self._connection.publish(
            message.reply,
            encode(_numbered(fault, seq), encoding),
            headers={
                SERVICE_ERROR_HEADER: _one_line(fault.message),
                SERVICE_ERROR_CODE_HEADER: str(fault.http_status),
            },
        )

    def _count_error(self, error: BaseException) -> None:
        self.stats.num_errors += 1
        self.stats.last_error = str(error)[:200]

    def _log_fault(self, error: Exception, trace_id: str) -> None:
        if isinstance(error, (BusError, MessageError, WrongProtocol, InvalidIdentifier)):
            _LOG.info("%s refused a request (trace %s): %s", self.config.subject.template, trace_id or "-", error)
        else:
            _LOG.exception("%s failed (trace %s)", self.config.subject.template, trace_id or "-")


class _Reply:
    """The frames of one answer, counted."""

    def __init__(self, endpoint: Endpoint, message: Msg, encoding: Encoding, trace_id: str) -> None:
        self._endpoint = endpoint
        self._message = message
        self._encoding = encoding
        self._trace_id = trace_id
        self._num_frames = 0

    async def frame(self, message: Message) -> None:
        payload = encode(message, self._encoding)
        await self._endpoint._connection.publish(self._message.reply, payload)
        self._num_frames += 1

    async def fault(self, error: BaseException) -> None:
        await self._endpoint._reply_fault(self._message, error, self._encoding, self._num_frames, self._trace_id)


class _NoSpan:
    trace_id = ""

    def fail(self, error: BaseException) -> None:
        """Nothing records."""


_NO_SPAN = _NoSpan()


def _deadline(headers: Mapping[str, str] | None, received_at_s: float, default_ttl_s: float) -> Deadline:
    text = (headers or {}).get(TTL_HEADER)
    try:
        ttl_s = default_ttl_s if text is None else min(int(text) / 1000, MAX_TTL_S)
    except ValueError:
        ttl_s = default_ttl_s
    return Deadline(received_at_s + ttl_s)


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _numbered(fault: Fault, seq: int) -> Fault:
    return msgspec.structs.replace(fault, seq=seq) if seq else fault


def _one_line(text: str) -> str:
    return " ".join(text.split()).encode("ascii", "replace").decode()[:500]
