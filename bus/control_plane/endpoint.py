"""The serving side of a request: a subject, a handler, and everything between them.

In: messages from anybody. Out: for each exactly one reply (or one stream of frames), which may be a fault.
`concurrency` requests are worked on at once, `max_queued` wait, and one more is refused with the time after which to
come back: a slow request holds up no other. Each request is checked (protocol, type, fields, deadline) before the
handler sees it, runs under its deadline inside a CONSUMER span, ends when its caller is gone, and an exception becomes
a typed fault. A reply is written in the encoding of its request and never echoes its headers.
"""

import asyncio
import contextlib
import inspect
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import Any

import msgspec

from bus.control_plane.caller_link import CallerLink
from bus.control_plane.connection import Connection, Msg, Subscription
from bus.control_plane.inbox import Inbox
from bus.deadline import Deadline, work_under
from bus.errors import BusError, Cancelled, DeadlineExceeded, Declined, Draining, Overloaded, fault_of
from observability import semantic_conventions as names
from observability.active_span import ROOT, Span, SpanKind
from observability.propagation import extract
from observability.tracing import is_tracing, span
from schemas.codec import Encoding, MessageError, decode, encode, encoding_of
from schemas.message import Message
from schemas.protocol import (
    AVOID_HEADER,
    REQUEST_ID_HEADER,
    SERVICE_ERROR_CODE_HEADER,
    SERVICE_ERROR_HEADER,
    TTL_HEADER,
    WINDOW_HEADER,
    WrongProtocol,
    check_protocol,
)
from schemas.stream import UNNUMBERED, Frame, LastFrame, StreamEnd
from schemas.subjects import InvalidIdentifier, Subject

Handler = Callable[[Any], Awaitable[Message | None] | AsyncGenerator[Message, None]]
MAX_TTL_S = 3600.0
MAX_WINDOW_FRAMES = 65_536
PROBE_INTERVAL_S = 1.0
"""How often the caller of a request that takes longer than this is looked for."""
_MIN_RETRY_AFTER_MS = 5

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class RequestContext:
    """What a middleware, or a handler by `current_request()`, may know of the request beside its message."""

    endpoint: str
    subject: str
    """As it was published to."""
    headers: dict[str, str]
    deadline: Deadline
    worker_id: str
    message: Message
    """What the handler is given; a middleware may put another of the same type."""

    @property
    def request_id(self) -> str:
        """The caller's id for it; "" from a plain client."""
        return self.headers.get(REQUEST_ID_HEADER, "")


Middleware = Callable[[RequestContext], AbstractAsyncContextManager[None]]
"""Around every request of an endpoint, the outermost first: an `@asynccontextmanager` of the context. It may refuse by
raising, sees the handler's exceptions, and may put another `message`."""


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
    one_way: bool = False
    """For events: there is no reply, whatever the handler returns, and no deadline but `default_ttl_s`."""
    middleware: tuple[Middleware, ...] = ()
    reply_type: Any = None
    """What discovery tells of the answer: a message class, a union of frames, or None."""


@dataclass(slots=True)
class EndpointStats:
    """Counters since the endpoint opened, as NATS ADR-32 names them, and what they leave out."""

    num_requests: int = 0
    num_errors: int = 0
    processing_time_ns: int = 0
    last_error: str = ""
    num_refused: int = 0
    num_cancelled: int = 0
    num_active: int = 0


class Work:
    """One request that was taken: waiting, or running in a task."""

    __slots__ = (
        "avoided",
        "caller_is_gone",
        "context",
        "deadline",
        "endpoint",
        "expired",
        "has_begun",
        "link",
        "message",
        "received_at_s",
        "request",
        "request_id",
        "task",
    )

    def __init__(self, message: Msg, endpoint: "Endpoint") -> None:
        self.message = message
        self.request: Message | None = None
        self.context: RequestContext | None = None
        self.endpoint = endpoint
        self.received_at_s = time.monotonic()
        self.request_id = ""
        self.avoided: Sequence[str] = ()
        ttl_s = endpoint.config.default_ttl_s
        if message.header_block:
            headers = message.headers
            self.request_id = headers.get(REQUEST_ID_HEADER, "")
            avoided = headers.get(AVOID_HEADER)
            if avoided:
                self.avoided = avoided.split(",")
            ttl_ms = headers.get(TTL_HEADER, "")
            if ttl_ms.isdecimal() and len(ttl_ms) < 16:
                ttl_s = min(int(ttl_ms) / 1000, MAX_TTL_S)
        self.deadline = Deadline(self.received_at_s + ttl_s)
        self.task: asyncio.Task[None] | None = None
        self.link: CallerLink | None = None
        self.has_begun = False
        self.caller_is_gone = False
        self.expired = False

    def stop(self) -> None:
        """End it. A task that has not begun would never run: it looks for itself when it does."""
        if self.task and self.has_begun:
            self.task.cancel()

    def cancel_for_caller(self) -> None:
        """End it: there is nobody to answer."""
        self.caller_is_gone = True
        self.stop()

    def expire(self) -> None:
        """End it: its time is up."""
        self.expired = True
        self.stop()


_work: ContextVar[Work | None] = ContextVar("nixlbus_work", default=None)


def current_request() -> RequestContext | None:
    """The request that the current task works on, None outside of a handler."""
    work = _work.get()
    if work is None or work.request is None:
        return None
    if work.context is None:
        work.context = _context_of(work)
    return work.context


def _context_of(work: Work) -> RequestContext:
    assert work.request is not None
    endpoint, message = work.endpoint, work.message
    return RequestContext(
        endpoint.config.name, message.subject, message.headers, work.deadline, endpoint.worker_id, work.request
    )


class Endpoint:
    """One served subject; `open` subscribes, `drain` finishes what was taken."""

    def __init__(
        self, connection: Connection, inbox: Inbox, worker_id: str, config: EndpointConfig, handler: Handler
    ) -> None:
        self.config = config
        self.stats = EndpointStats()
        self._connection = connection
        self._inbox = inbox
        self.worker_id = worker_id
        self._handler: Callable[[Any], Any] = handler
        self._is_stream = inspect.isasyncgenfunction(handler)
        self._waiting: deque[Work] = deque()
        self._running: set[Work] = set()
        self._by_request_id: dict[str, Work] = {}
        self._subscription: Subscription | None = None
        self._probing: asyncio.TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None
        self._draining = False
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()

    async def open(self) -> None:
        """Subscribe."""
        self._subscription = await self._connection.subscribe(
            self.config.subject, self._on_message, queue_group=self.config.queue_group
        )

    async def drain(self, timeout_s: float) -> None:
        """Take no more, finish what was taken within `timeout_s`, then cancel what is left."""
        deadline = self._loop.time() + timeout_s
        if self._subscription:
            await self._connection.unsubscribe(self._subscription)
        self._draining = True
        if self._running:
            self._idle = self._loop.create_future()
            self._loop.call_at(deadline, _settle, self._idle)
            await self._idle
        self._stopping = True
        for work in list(self._running):
            work.stop()
        tasks = [work.task for work in self._running if work.task]
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._waiting:
            self._refuse(self._waiting.popleft().message, Draining("the worker stopped before it began this"))
        self._by_request_id.clear()
        if self._probing:
            self._probing.cancel()

    def cancel(self, request_id: str) -> bool:
        """The caller of a request is gone. Returns whether it was one of ours."""
        work = self._by_request_id.get(request_id)
        if work is None:
            return False
        if work.task:
            work.cancel_for_caller()
        else:
            self._waiting.remove(work)
            del self._by_request_id[request_id]
            self.stats.num_cancelled += 1
        return True

    def _on_message(self, message: Msg) -> None:
        if not message.reply and not self.config.one_way:
            self._count_error("a request without a reply subject has nobody to answer")
            return
        if self._draining:
            self._refuse(message, Draining("the worker is draining", subject=self.config.subject.name))
            return
        work = Work(message, self)
        if self.worker_id in work.avoided:
            self._refuse(message, Declined("this worker has refused the request before"))
        elif len(self._running) < self.config.concurrency:
            self._start(work)
        elif len(self._waiting) < self.config.max_queued:
            self._waiting.append(work)
            if work.request_id:
                self._by_request_id[work.request_id] = work
        else:
            self._refuse(message, self._overloaded())

    def _overloaded(self) -> Overloaded:
        return Overloaded(
            f"{self.config.max_queued} requests wait for {self.config.concurrency} slots",
            subject=self.config.subject.name,
            retry_after_ms=max(_MIN_RETRY_AFTER_MS, self._mean_ms()),
        )

    def _mean_ms(self) -> int:
        """How long until a slot is free, if requests go on to take what they took."""
        stats = self.stats
        mean_ns = stats.processing_time_ns / stats.num_requests if stats.num_requests else 0.0
        return int(mean_ns / 1e6 * (1 + len(self._waiting) / (2 * self.config.concurrency)))

    def _refuse(self, message: Msg, refusal: BusError) -> None:
        self.stats.num_refused += 1
        if message.reply and not self.config.one_way:
            encoding = encoding_of(message.data) if self.config.public else Encoding.MSGPACK
            try:
                self._reply_fault(message, refusal, encoding, seq=0, trace_id="")
            except BusError as error:
                _LOG.debug("a refusal could not be sent on %s: %s", self.config.subject.template, error)

    def _start(self, work: Work) -> None:
        self._running.add(work)
        self.stats.num_active = len(self._running)
        if work.request_id:
            self._by_request_id[work.request_id] = work
            if self._probing is None:
                self._probing = self._loop.call_later(PROBE_INTERVAL_S, self._probe, context=Context())
        work.task = self._loop.create_task(self._run(work), context=self._context.copy())

    async def _run(self, work: Work) -> None:
        started_ns = time.perf_counter_ns()
        work.has_begun = True
        expiry = self._inbox.expiries.add(work, work.deadline.at_s)
        work_under(work.deadline)
        _work.set(work)
        try:
            if work.caller_is_gone:
                self.stats.num_cancelled += 1
            elif self._is_traced(work.message):
                with self._process_span(work) as process:
                    await self._answered(work, process)
            else:
                await self._answered(work, None)
        except asyncio.CancelledError:
            pass  # it was answered, if there was somebody
        except BusError as error:
            self._count_error(str(error))
            _LOG.warning("no reply could be sent on %s: %s", self.config.subject.template, error)
        finally:
            self._inbox.expiries.discard(work, expiry)
            self._finished(work)
            self.stats.num_requests += 1
            self.stats.processing_time_ns += time.perf_counter_ns() - started_ns

    def _is_traced(self, message: Msg) -> bool:
        if not self.config.traced:
            return False
        begins_a_trace = is_tracing() and not self.config.one_way
        return begins_a_trace or _brings_a_trace(message)

    def _finished(self, work: Work) -> None:
        if work.link:
            work.link.close()
        self._running.discard(work)
        self._by_request_id.pop(work.request_id, None)
        while self._waiting and len(self._running) < self.config.concurrency and not self._stopping:
            self._start(self._waiting.popleft())
        self.stats.num_active = len(self._running)
        if self._idle is not None and not self._running:
            _settle(self._idle)

    async def _answered(self, work: Work, process: Span | None) -> None:
        encoding = encoding_of(work.message.data) if self.config.public else Encoding.MSGPACK
        reply = _Reply(self, work, encoding, process.trace_id if process else "")
        try:
            request = self._admitted(work, encoding)
            if self.config.middleware:
                await self._in_middleware(work, request, reply)
            elif self._is_stream:
                await reply.stream(self._handler(request))
            else:
                reply.only(await self._handler(request))
        except asyncio.CancelledError as cancelled:
            error = self._why_cancelled(work)
            if process:
                process.fail(error or cancelled)
            if error:
                reply.fault(error)
            if not work.expired and _task_is_cancelled():
                raise
        except Exception as error:
            if process:
                process.fail(error)
            self._log_fault(error, reply.trace_id)
            reply.fault(error)

    def _why_cancelled(self, work: Work) -> BusError | None:
        """What to tell the caller, None if there is none any more."""
        if work.caller_is_gone:
            self.stats.num_cancelled += 1
            return None
        if work.expired:
            return DeadlineExceeded("the request's time was up", subject=self.config.subject.name)
        if self._draining:
            return Draining("the worker stopped while it worked on this")
        return Cancelled("something that the handler waited for was cancelled")

    def _admitted(self, work: Work, encoding: Encoding) -> Message:
        """The request, if it is one and may begin."""
        message = work.message
        if self._stopping:
            raise Draining("the worker stopped before it began this")
        if work.deadline.at_s <= time.monotonic():
            raise DeadlineExceeded("the request's time was up before a slot took it", subject=self.config.subject.name)
        check_protocol(message.headers, required=not (self.config.public or self.config.one_way))
        request: Message = decode(message.data, self.config.request_type, encoding)
        work.request = request
        return request

    async def _in_middleware(self, work: Work, request: Message, reply: "_Reply") -> None:
        context = work.context = _context_of(work)
        async with AsyncExitStack() as stack:
            for middleware in self.config.middleware:
                await stack.enter_async_context(middleware(context))
            if self._is_stream:
                await reply.stream(self._handler(context.message))
            else:
                reply.only(await self._handler(context.message))

    def _process_span(self, work: Work) -> Any:
        subject, message = self.config.subject, work.message
        return span(
            f"process {subject.template}",
            kind=SpanKind.CONSUMER,
            parent=extract(message.headers) or ROOT,
            attributes={
                names.MESSAGING_SYSTEM: "nats",
                names.MESSAGING_OPERATION_NAME: "process",
                names.MESSAGING_OPERATION_TYPE: "process",
                names.MESSAGING_DESTINATION_NAME: subject.name,
                names.MESSAGING_DESTINATION_TEMPLATE: subject.template,
                names.MESSAGING_CONSUMER_GROUP_NAME: self.config.queue_group,
                names.MESSAGING_CLIENT_ID: self.worker_id,
                names.MESSAGING_MESSAGE_BODY_SIZE: len(message.data),
                names.NIXL_WAIT_QUEUE_MS: round((time.monotonic() - work.received_at_s) * 1e3, 3),
            },
        )

    def _link(self, work: Work, window_frames: int = 0) -> CallerLink:
        return CallerLink(self._connection, self._inbox, work.message.reply, window_frames, work.cancel_for_caller)

    def _probe(self) -> None:
        """Look for the callers of what has run for a while, and go on as long as something runs."""
        self._probing = None
        asked_before_s = time.monotonic() - PROBE_INTERVAL_S
        for work in self._running:
            if work.request_id and work.message.reply and work.received_at_s < asked_before_s:
                with contextlib.suppress(BusError):
                    work.link = work.link or self._link(work)
                    work.link.probe()
        if self._running:
            self._probing = self._loop.call_later(PROBE_INTERVAL_S, self._probe, context=Context())

    def _reply_fault(self, message: Msg, error: BaseException, encoding: Encoding, seq: int, trace_id: str) -> None:
        fault = fault_of(error, worker_id=self.worker_id, trace_id=trace_id)
        self._count_error(str(error))
        if self.config.one_way:
            return
        self._connection.publish_now(
            message.reply,
            encode(msgspec.structs.replace(fault, seq=seq) if seq else fault, encoding),
            headers={
                SERVICE_ERROR_HEADER: _one_line(fault.message),
                SERVICE_ERROR_CODE_HEADER: str(fault.http_status),
            },
        )

    def _count_error(self, text: str) -> None:
        self.stats.num_errors += 1
        self.stats.last_error = text[:200]

    def _log_fault(self, error: Exception, trace_id: str) -> None:
        if isinstance(error, (BusError, MessageError, WrongProtocol, InvalidIdentifier)):
            _LOG.info("%s refused a request (trace %s): %s", self.config.subject.template, trace_id or "-", error)
        else:
            _LOG.exception("%s failed (trace %s)", self.config.subject.template, trace_id or "-")


class _Reply:
    """The frames of one answer, counted."""

    __slots__ = ("_encoding", "_endpoint", "_ends_itself", "_is_over", "_num_frames", "_work", "trace_id")

    def __init__(self, endpoint: Endpoint, work: Work, encoding: Encoding, trace_id: str) -> None:
        self.trace_id = trace_id
        self._endpoint = endpoint
        self._work = work
        self._encoding = encoding
        self._num_frames = 0
        self._ends_itself = False
        self._is_over = False

    def only(self, message: Message | None) -> None:
        """The one reply."""
        if self._endpoint.config.one_way:
            return
        if not isinstance(message, Message):
            raise TypeError(f"{self._endpoint.config.name} returned {type(message).__name__}, which is no Message")
        self._endpoint._connection.publish_now(self._work.message.reply, encode(message, self._encoding))
        self._is_over = True

    def _begin_stream(self) -> None:
        """Listen for the caller's credit, if it asked for a window."""
        text = self._work.message.headers.get(WINDOW_HEADER, "")
        window_frames = int(text) if text.isdecimal() and len(text) < 10 else 0
        if window_frames and self._work.request_id:
            if self._work.link:  # of a probe, while a middleware took its time
                self._work.link.close()
            self._work.link = self._endpoint._link(self._work, min(window_frames, MAX_WINDOW_FRAMES))

    async def stream(self, frames: AsyncGenerator[Message, None]) -> None:
        """Frame by frame."""
        self._begin_stream()
        async with contextlib.aclosing(frames):
            async for frame in frames:
                await self._frame(frame)
        self._end()

    async def _frame(self, message: Message) -> None:
        """The next frame of a stream; waits while its reader is behind."""
        number = self._num_frames
        if isinstance(message, Frame):
            self._ends_itself = isinstance(message, LastFrame)
            if message.seq == UNNUMBERED:
                message = msgspec.structs.replace(message, seq=number)
        else:
            self._ends_itself = True  # frames that number themselves also end themselves
        payload = encode(message, self._encoding)
        credit = ""
        if self._work.link:
            await self._work.link.window(number)
            credit = self._work.link.credit_subject(number)
        await self._endpoint._connection.publish(self._work.message.reply, payload, reply=credit)
        self._num_frames += 1

    def _end(self) -> None:
        """The end of a stream whose handler has nothing more to say."""
        if not self._ends_itself:
            end = encode(StreamEnd(seq=self._num_frames), self._encoding)
            self._endpoint._connection.publish_now(self._work.message.reply, end)
        self._is_over = True

    def fault(self, error: BaseException) -> None:
        """Instead of a reply, or of the rest of a stream."""
        if self._is_over:
            return  # a middleware failed after the reply
        self._is_over = True
        self._endpoint._reply_fault(self._work.message, error, self._encoding, self._num_frames, self.trace_id)


def _brings_a_trace(message: Msg) -> bool:
    return message.header_block is not None and b"raceparent:" in message.header_block


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _one_line(text: str) -> str:
    return " ".join(text.split()).encode("ascii", "replace").decode()[:500]
