"""One request that an endpoint took: how long it may take, whether its caller is still there, and its answer.

In: a message and the endpoint's means. Out: one reply, numbered frames, or a fault; nothing after any of these.
Invariants: a task that has not begun is not cancelled (it would never run, and nobody would be answered): it looks for
itself when it does.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import msgspec

from bus.control_plane.caller_link import CallerLink
from bus.control_plane.connection import Connection, Msg
from bus.control_plane.inbox import Inbox
from bus.control_plane.request_context import RequestContext
from bus.deadline import Deadline
from bus.errors import Overloaded, RequestRefused, fault_of
from observability.propagation import TRACEPARENT
from schemas.codec import Encoding, encode
from schemas.message import Message
from schemas.protocol import (
    AVOID_HEADER,
    PROTOCOL_HEADER,
    REQUEST_ID_HEADER,
    SERVICE_ERROR_CODE_HEADER,
    SERVICE_ERROR_HEADER,
    TTL_HEADER,
    WINDOW_HEADER,
)
from schemas.stream import Frame, LastFrame, StreamEnd

MAX_TTL_S = 3600.0
MAX_WINDOW_FRAMES = 65_536
_MAX_DIGITS = 15
_TTL_AND_ID_ALONE = re.compile(
    rb"NATS/1\.0\r\nNixlbus-Protocol: (\d{1,9})\r\nNixlbus-Ttl-Ms: (\d{1,15})\r\n"
    rb"Nixlbus-Request-Id: ([\w-]{1,64})\r\n(?:traceparent: ([!-~]{1,64})\r\n)?\r\n"
)
"""The headers of a plain request of ours: read without making a dictionary of them."""


class Host(Protocol):
    """What an endpoint lends to its requests."""

    connection: Connection
    inbox: Inbox
    worker_id: str
    name: str
    default_ttl_s: float
    one_way: bool


class Work:
    """A request: waiting, or running in a task."""

    __slots__ = (
        "_context",
        "_ends_itself",
        "_host",
        "_link",
        "_num_frames",
        "avoided",
        "brings_a_trace",
        "caller_is_gone",
        "deadline",
        "encoding",
        "expired",
        "has_begun",
        "is_answered",
        "message",
        "protocol",
        "received_at_s",
        "request",
        "request_id",
        "task",
        "traceparent",
    )

    def __init__(self, message: Msg, host: Host, encoding: Encoding) -> None:
        self.message = message
        self.encoding = encoding
        self.received_at_s = time.monotonic()
        self.request_id = ""
        self.protocol: str | None = None
        """The version that the caller speaks, if it says one."""
        self.brings_a_trace = False
        self.traceparent = ""
        """The trace, where it came without companions in other headers."""
        self.avoided: Sequence[str] = ()
        """Workers that the caller would rather not have it."""
        self.request: Message | None = None
        """Its message, once it was found to be one."""
        self.task: asyncio.Task[None] | None = None
        self.has_begun = False
        self.caller_is_gone = False
        self.expired = False
        self.is_answered = False
        self._host = host
        self._link: CallerLink | None = None
        self._context: RequestContext | None = None
        self._num_frames = 0
        self._ends_itself = False
        self.deadline = Deadline(self.received_at_s + self._read_headers(message, host.default_ttl_s))
        if host.one_way:
            self.request_id = ""  # nobody waits for an event: its sender is neither looked for nor heard

    def _read_headers(self, message: Msg, ttl_s: float) -> float:
        """Take what is there; returns the time to live."""
        if not message.header_block:
            return ttl_s
        alone = _TTL_AND_ID_ALONE.fullmatch(message.header_block)
        if alone:
            self.protocol = alone[1].decode()
            self.request_id = alone[3].decode()
            if alone[4]:
                self.brings_a_trace = True
                self.traceparent = alone[4].decode()
            return min(int(alone[2]) / 1000, MAX_TTL_S)
        headers = message.headers
        self.protocol = headers.get(PROTOCOL_HEADER)
        self.brings_a_trace = any(name.lower() == TRACEPARENT for name in headers)
        self.request_id = headers.get(REQUEST_ID_HEADER, "")
        avoided = headers.get(AVOID_HEADER)
        if avoided:
            self.avoided = avoided.split(",")
        ttl_ms = headers.get(TTL_HEADER, "")
        is_number = ttl_ms.isdecimal() and len(ttl_ms) <= _MAX_DIGITS
        return min(int(ttl_ms) / 1000, MAX_TTL_S) if is_number else ttl_s

    @property
    def context(self) -> RequestContext | None:
        """What a handler or a middleware may know; None before the request was found to be one."""
        if self._context is None and self.request is not None:
            message, host = self.message, self._host
            self._context = RequestContext(
                host.name, message.subject, message.headers, self.deadline, host.worker_id, self.request
            )
        return self._context

    def begin_its_time(self, duration_s: float) -> None:
        """Count its time from now: an event is not late because others were before it."""
        self.deadline = Deadline(time.monotonic() + duration_s)

    def stop(self) -> None:
        """End it, now or as soon as it begins."""
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

    def look_for_caller(self, unless_since_s: float) -> None:
        """Find out whether somebody still waits for the answer; `cancel_for_caller` if not."""
        if self._link is None:
            self._link = self._linked(0)
        if self._link.probed_at_s <= unless_since_s:
            self._link.probe()

    def reply(self, message: Message | None) -> None:
        """The one answer. Raises `TypeError` for what is no message, and what publishing raises."""
        if self._host.one_way:
            return
        if not isinstance(message, Message):
            raise TypeError(f"{self._host.name} returned {type(message).__name__}, which is no Message")
        self._host.connection.publish_now(self.message.reply, encode(message, self.encoding))
        self.is_answered = True

    async def stream(self, frames: AsyncGenerator[Message, None]) -> None:
        """Frame by frame, as many as the caller's window lets through."""
        text = self.message.headers.get(WINDOW_HEADER, "")
        window_frames = int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else 0
        if window_frames and self.request_id:
            self.let_go()  # of a probe, while a middleware took its time
            self._link = self._linked(min(window_frames, MAX_WINDOW_FRAMES))
        async with contextlib.aclosing(frames):
            async for frame in frames:
                await self._frame(frame)
        if not self._ends_itself:
            end = encode(StreamEnd(seq=self._num_frames), self.encoding)
            self._host.connection.publish_now(self.message.reply, end)
        self.is_answered = True

    def fault(self, error: BaseException, trace_id: str = "") -> None:
        """Instead of an answer, or of the rest of a stream."""
        if self.is_answered or self._host.one_way:
            return  # a middleware failed after the reply; or nobody waits for one
        self.is_answered = True
        fault = fault_of(error, worker_id=self._host.worker_id, trace_id=trace_id)
        has_begun = self.request is not None and not isinstance(error, (RequestRefused, Overloaded))
        if has_begun or self._num_frames:
            fault = msgspec.structs.replace(fault, seq=self._num_frames, begun=has_begun)
        headers = {
            SERVICE_ERROR_HEADER: _one_line(fault.message),
            SERVICE_ERROR_CODE_HEADER: str(fault.http_status),
        }
        self._host.connection.publish_now(self.message.reply, encode(fault, self.encoding), headers=headers)

    def let_go(self) -> None:
        """Listen to the caller no more."""
        if self._link:
            self._link.close()
            self._link = None

    async def _frame(self, message: Message) -> None:
        number = self._num_frames
        if isinstance(message, Frame):
            self._ends_itself = isinstance(message, LastFrame)
            if message.seq != number:  # unnumbered, or passed on from another stream
                message = msgspec.structs.replace(message, seq=number)
        else:
            self._ends_itself = True  # frames that number themselves also end themselves
        payload = encode(message, self.encoding)
        credit_subject = ""
        if self._link:
            await self._link.window(number)
            credit_subject = self._link.credit_subject(number)
        await self._host.connection.publish(self.message.reply, payload, reply=credit_subject)
        self._num_frames += 1

    def _linked(self, window_frames: int) -> CallerLink:
        host = self._host
        return CallerLink(host.connection, host.inbox, self.message.reply, window_frames, self.cancel_for_caller)


def _one_line(text: str) -> str:
    return " ".join(text.split()).encode("ascii", "replace").decode()[:500]
