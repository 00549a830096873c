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
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

from bus.control_plane.connection import Connection, Msg, Subscription
from bus.control_plane.inbox import Inbox
from bus.control_plane.listing import Listing, Load, Statistics
from bus.control_plane.request_context import Middleware, working_on
from bus.control_plane.work import MAX_TTL_S as MAX_TTL_S
from bus.control_plane.work import Work
from bus.deadline import work_under
from bus.errors import BusError, Cancelled, DeadlineExceeded, Declined, Draining, LocalProtocolError, Overloaded
from observability import semantic_conventions as names
from observability.active_span import ROOT, Span, SpanKind
from observability.propagation import extract, span_context_of
from observability.tracing import is_tracing, span
from schemas.codec import Encoding, MessageError, decode, encoding_of
from schemas.message import Message
from schemas.protocol import (
    WrongProtocol,
    check_protocol,
)
from schemas.subjects import InvalidIdentifier, Subject, may_be_answered

Handler = Callable[[Any], Awaitable[Message | None] | AsyncGenerator[Message, None]]
PROBE_AFTER_S = 0.05
"""When a request takes so long that its caller is looked for, and told where to look for us: a message more is little
then. A worker that is killed before is missed by nothing but the caller's deadline."""
STOP_GRACE_S = 1.0
"""What a handler may take to end that was cancelled at the end of a drain."""
PROBE_INTERVAL_S = 1.0
"""How often then."""
_MIN_RETRY_AFTER_MS = 5

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
    one_way: bool = False
    """For events: there is no reply, whatever the handler returns, and no deadline but `default_ttl_s`."""
    middleware: tuple[Middleware, ...] = ()
    reply_type: Any = None
    """What discovery tells of the answer: a message class, a union of frames, or None."""

    def __post_init__(self) -> None:
        """Raises `LocalProtocolError` for a number that can't be used."""
        for name, low, high in (("concurrency", 1, 1 << 20), ("max_queued", 0, 1 << 24)):
            if not low <= getattr(self, name) <= high:
                raise LocalProtocolError(f"{name}={getattr(self, name)} of endpoint {self.name} is not from {low} up")
        if not 0 < self.default_ttl_s <= MAX_TTL_S:
            raise LocalProtocolError(
                f"a time of {self.default_ttl_s} s for endpoint {self.name} is not above 0 and up to {MAX_TTL_S:g}"
            )


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


class Endpoint:
    """One served subject; `open` subscribes, `drain` finishes what was taken."""

    def __init__(
        self, connection: Connection, inbox: Inbox, worker_id: str, config: EndpointConfig, handler: Handler
    ) -> None:
        self.config = config
        self.stats = EndpointStats()
        self.connection = connection
        self.inbox = inbox
        self.worker_id = worker_id
        self._handler: Callable[[Any], Any] = handler
        self.name = config.name
        self.default_ttl_s = config.default_ttl_s
        self.one_way = config.one_way
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

    def listing(self) -> Listing:
        """What discovery tells of it."""
        config = self.config
        return Listing(
            name=config.name,
            subject=config.subject.name,
            queue_group=config.queue_group,
            kind="event" if config.one_way else "stream" if self._is_stream else "unary",
            request_type=config.request_type,
            reply_type=None if config.one_way else config.reply_type,
            concurrency=config.concurrency,
            max_queued=config.max_queued,
            timeout_s=config.default_ttl_s,
            public=config.public,
        )

    def statistics(self) -> Statistics:
        """What discovery tells of its work."""
        config, stats = self.config, self.stats
        return Statistics(
            name=config.name,
            subject=config.subject.name,
            queue_group=config.queue_group,
            num_requests=stats.num_requests,
            num_errors=stats.num_errors,
            last_error=stats.last_error,
            processing_time=stats.processing_time_ns,
            average_processing_time=stats.processing_time_ns // stats.num_requests if stats.num_requests else 0,
            data=Load(
                refused=stats.num_refused,
                cancelled=stats.num_cancelled,
                active=stats.num_active,
                queued=len(self._waiting),
            ),
        )

    async def open(self) -> None:
        """Subscribe."""
        self._subscription = await self.connection.subscribe(
            self.config.subject, self._on_message, queue_group=self.config.queue_group
        )

    async def drain(self, timeout_s: float) -> None:
        """Take no more, finish what was taken within `timeout_s`, then cancel what is left."""
        deadline = self._loop.time() + timeout_s
        if self._subscription:
            await self.connection.unsubscribe(self._subscription)
        self._draining = True
        if self._running:
            self._idle = self._loop.create_future()
            self._loop.call_at(deadline, _settle, self._idle)
            await self._idle
        self._stopping = True
        for work in list(self._running):
            work.stop()
        tasks = [work.task for work in self._running if work.task]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_GRACE_S)
        for work in list(self._running):  # of handlers that won't be stopped
            _LOG.warning("%s: a handler goes on though it was cancelled", self.config.subject.template)
            stopped = Cancelled("the worker stopped while it worked on this")
            self._refused(work, stopped, None, stopped)
        while self._waiting:
            work = self._waiting.popleft()
            work.let_go()
            self._refuse(work, Draining("the worker stopped before it began this"))
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
            work.let_go()
            del self._by_request_id[request_id]
            self.stats.num_cancelled += 1
        return True

    def _on_message(self, message: Msg) -> None:
        if not (self.config.one_way or may_be_answered(message.reply, self.config.subject)):
            self._count_error("a request without a reply subject, or with one of the bus's own, is not answered")
            return
        work = Work(message, self, encoding_of(message.data) if self.config.public else Encoding.MSGPACK)
        if self._draining:
            self._refuse(work, Draining("the worker is draining", subject=self.config.subject.name))
        elif work.avoided and self.worker_id in work.avoided:
            self._refuse(work, Declined("this worker has refused the request before"))
        elif len(self._running) < self.config.concurrency:
            self._start(work)
        elif len(self._waiting) < self.config.max_queued:
            self._waiting.append(work)
            if work.request_id:
                self._by_request_id[work.request_id] = work
        else:
            self._refuse(work, self._overloaded())

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

    def _refuse(self, work: Work, refusal: BusError) -> None:
        if isinstance(refusal, Declined):
            work.fault(refusal)  # it was counted when it was refused
            return
        self.stats.num_refused += 1
        self._refused(work, refusal, None, refusal)

    def _start(self, work: Work) -> None:
        self._running.add(work)
        self.stats.num_active = len(self._running)
        if work.request_id:
            self._by_request_id[work.request_id] = work
            if self._probing is None:
                self._probing = self._loop.call_later(PROBE_AFTER_S, self._probe, context=Context())
        run = self._run_all(work) if self.config.one_way else self._run(work)
        work.task = self._loop.create_task(run, context=self._context.copy())

    async def _run_all(self, work: Work) -> None:
        """One event, and those that came meanwhile: a task for each would cost more than most handlers do."""
        task = work.task
        while True:
            work.begin_its_time(self.default_ttl_s)
            await self._run(work)
            if self._stopping or not self._waiting:
                return
            while task is not None and task.cancelling():
                task.uncancel()  # that was for the event before
            work = self._waiting.popleft()
            self._running.add(work)
            work.task = task

    async def _run(self, work: Work) -> None:
        began_ns = time.perf_counter_ns()
        work.has_begun = True
        expiry = self.inbox.expiries.add(work, work.deadline.at_s)
        work_under(work.deadline)
        working_on.set(work)
        scope = self._process_span(work) if self._is_traced(work) else None
        process = scope.__enter__() if scope else None
        try:
            request = self._admitted(work)
            if self.config.middleware:
                await self._in_middleware(work)
            elif self._is_stream:
                await work.stream(self._handler(request))
            else:
                work.reply(await self._handler(request))
        except asyncio.CancelledError as cancelled:
            self._refused(work, self._why_cancelled(work), process, cancelled)
        except Exception as error:
            self._log_fault(error, process)
            self._refused(work, error, process, error)
        finally:
            if scope:
                scope.__exit__(None, None, None)
            self.inbox.expiries.discard(work, expiry)
            self._finished(work)
            self.stats.num_requests += 1
            self.stats.processing_time_ns += time.perf_counter_ns() - began_ns

    def _is_traced(self, work: Work) -> bool:
        begins_a_trace = is_tracing() and not self.config.one_way
        return self.config.traced and (begins_a_trace or work.brings_a_trace)

    def _finished(self, work: Work) -> None:
        work.let_go()
        self._running.discard(work)
        self._by_request_id.pop(work.request_id, None)
        if not self.config.one_way:
            while self._waiting and len(self._running) < self.config.concurrency and not self._stopping:
                self._start(self._waiting.popleft())
        self.stats.num_active = len(self._running)
        if self._idle is not None and not self._running and not self._waiting:
            _settle(self._idle)

    def _refused(self, work: Work, error: Exception | None, process: Span | None, cause: BaseException) -> None:
        """Tell the caller of `error`, None if there is no caller any more."""
        if process:
            process.fail(error or cause)
        if error is None:
            self.stats.num_cancelled += 1
            return
        self._count_error(str(error))
        try:
            work.fault(error, process.trace_id if process else "")
        except BusError as failure:
            _LOG.warning("no reply could be sent on %s: %s", self.config.subject.template, failure)

    def _why_cancelled(self, work: Work) -> BusError | None:
        """What to tell the caller, None if there is none any more."""
        if work.caller_is_gone:
            return None
        if work.expired:
            return DeadlineExceeded("the request's time was up", subject=self.config.subject.name)
        if self._draining:
            return Cancelled("the worker stopped while it worked on this")  # it was begun: no refusal
        return Cancelled("something that the handler waited for was cancelled")

    def _admitted(self, work: Work) -> Message:
        """The request, if it is one and may begin."""
        message = work.message
        if work.caller_is_gone:
            raise asyncio.CancelledError
        if self._stopping:
            raise Draining("the worker stopped before it began this")
        if work.deadline.at_s <= time.monotonic():
            raise DeadlineExceeded("the request's time was up before a slot took it", subject=self.config.subject.name)
        check_protocol(work.protocol, required=not (self.config.public or self.config.one_way))
        request: Message = decode(message.data, self.config.request_type, work.encoding)
        work.request = request
        return request

    async def _in_middleware(self, work: Work) -> None:
        context = work.context
        assert context is not None
        async with AsyncExitStack() as stack:
            for middleware in self.config.middleware:
                await stack.enter_async_context(middleware(context))
            if self._is_stream:
                await work.stream(self._handler(context.message))
            else:
                work.reply(await self._handler(context.message))
        if not (work.is_answered or self.config.one_way):
            raise RuntimeError("a middleware swallowed what the handler raised: raise what the caller is to be told")

    def _process_span(self, work: Work) -> Any:
        subject, message = self.config.subject, work.message
        return span(
            f"process {subject.template}",
            kind=SpanKind.CONSUMER,
            parent=(span_context_of(work.traceparent) if work.traceparent else extract(message.headers)) or ROOT,
            attributes=lambda: {
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

    def _probe(self) -> None:
        """Look for the callers of what takes or waits long, and go on as long as something runs."""
        self._probing = None
        now_s = time.monotonic()
        for work in (*self._running, *self._waiting):
            if work.request_id and work.message.reply and work.received_at_s <= now_s - PROBE_AFTER_S:
                with contextlib.suppress(BusError):
                    work.look_for_caller(now_s - PROBE_INTERVAL_S)
        if self._running:
            self._probing = self._loop.call_later(PROBE_AFTER_S, self._probe, context=Context())

    def _count_error(self, text: str) -> None:
        self.stats.num_errors += 1
        self.stats.last_error = text[:200]

    def _log_fault(self, error: Exception, process: Span | None) -> None:
        trace_id = process.trace_id if process else ""
        if isinstance(error, (BusError, MessageError, WrongProtocol, InvalidIdentifier)):
            _LOG.info("%s refused a request (trace %s): %s", self.config.subject.template, trace_id or "-", error)
        else:
            _LOG.exception("%s failed (trace %s)", self.config.subject.template, trace_id or "-")


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
