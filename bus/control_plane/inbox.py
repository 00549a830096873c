"""The replies to our own requests: one wildcard subscription, and a table of who waits for what.

In: messages on `_INBOX.<client>.<nonce>.<token>`. Out: each to the waiter of its token, or an error to it.
Invariants: a waiter is told at once of "no responders", a lost connection and a denied subject (nats-py's own
request() would time out); a token is used once and forgotten when its waiter leaves, so late replies are dropped.
A message that asks for nothing but whether somebody is here (`PROBE_HEADER`) reaches no waiter: that it could be
delivered is the answer, unless nobody waits for that reply any more, which is said. A worker probes while a request
takes long; from then on its caller probes too, and hears of its death so.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from typing import Protocol

from bus.control_plane.connection import Connection, Msg
from bus.control_plane.expiry import Expiries
from bus.control_plane.random_ids import RandomIds
from bus.deadline import Deadline
from bus.errors import BusError, ConnectionLost, DeadlineExceeded, NoResponders, PeerLost, RemoteProtocolError
from schemas.subjects import INBOX, Subject

MAX_UNREAD_REPLIES = 65_536
"""Replies that wait unread before the waiter is failed: tokens of a stream whose consumer stopped reading."""
MAX_UNREAD_BYTES = 64 << 20
"""The same in bytes: a sender that keeps to the window stays far below."""
PROBE_HEADER = "Nixlbus-Probe"
PROBE = f"NATS/1.0\r\n{PROBE_HEADER}: 1\r\n\r\n".encode()
LOOK_INTERVAL_S = 1.0
"""How often a caller looks for the worker of a request that takes long."""
MAX_MISSES = 2
"""A worker that is not found so often in a row is gone; once, it may have lost its connection for a moment."""
_NOBODY_WAITS = b"NATS/1.0 503\r\n\r\n"


class Waiter(Protocol):
    """What stands in the table."""

    subject: str

    def take(self, message: Msg) -> None:
        """Be given a reply."""

    def fail(self, error: BusError) -> None:
        """Be told that there will be none."""


class SingleWaiter:
    """One request's only reply: await `reply`."""

    __slots__ = ("reply", "reply_subject", "subject")

    def __init__(self, subject: str, reply_subject: str) -> None:
        self.subject = subject
        self.reply_subject = reply_subject
        self.reply: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

    def take(self, message: Msg) -> None:
        """Resolve `reply`."""
        if message.header_block and is_no_responders(message):
            self.fail(NoResponders("nobody listens", subject=self.subject))
            return
        if not self.reply.done():
            self.reply.set_result(message)

    def fail(self, error: BusError) -> None:
        """Make `reply` raise `error`."""
        if not self.reply.done():
            self.reply.set_exception(error)

    def expire(self) -> None:
        """Its time is up."""
        self.fail(DeadlineExceeded("no reply within the deadline", subject=self.subject))


class StreamWaiter:
    """One request's replies, in order of arrival."""

    def __init__(self, subject: str, expiries: Expiries) -> None:
        self.subject = subject
        self._expiries = expiries
        self._replies: deque[Msg | BusError] = deque()
        self._num_unread_bytes = 0
        self._arrived: asyncio.Future[None] | None = None

    async def next(self, deadline: Deadline) -> Msg:
        """The next reply. Raises `DeadlineExceeded`, or what the waiter was failed with."""
        while not self._replies:
            arrived = self._arrived = asyncio.get_running_loop().create_future()
            expiry = self._expiries.add(self, deadline.at_s)
            try:
                await arrived
            finally:
                self._expiries.discard(self, expiry)
                self._arrived = None
        reply = self._replies.popleft()
        if isinstance(reply, BusError):
            raise reply
        self._num_unread_bytes -= len(reply.data)
        return reply

    def take(self, message: Msg) -> None:
        """Queue a reply for `next`."""
        if message.header_block and is_no_responders(message):
            self.fail(NoResponders("nobody listens", subject=self.subject))
            return
        self._put(message)

    def fail(self, error: BusError) -> None:
        """Make `next` raise `error`, after the replies already here."""
        self._put(error)

    def expire(self) -> None:
        """Its time is up."""
        self._put(DeadlineExceeded("no reply within the deadline", subject=self.subject))

    def _put(self, item: Msg | BusError) -> None:
        if isinstance(item, Msg):
            self._num_unread_bytes += len(item.data)
        if len(self._replies) >= MAX_UNREAD_REPLIES or self._num_unread_bytes > MAX_UNREAD_BYTES:
            self._replies.clear()
            self._num_unread_bytes = 0
            item = RemoteProtocolError("replies came faster than they were read", subject=self.subject)
        self._replies.append(item)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)


@dataclass(slots=True)
class _Worker:
    """Who works on one of our requests."""

    link_subject: str
    num_misses: int = 0


class Inbox:
    """The table of waiters of one connection."""

    def __init__(self, connection: Connection) -> None:
        self.expiries = Expiries()
        """For whoever waits on this connection."""
        self._connection = connection
        self._prefix = f"{connection.inbox_prefix}.{secrets.token_hex(6)}"
        self._waiters: dict[str, Waiter] = {}
        self._workers: dict[str, _Worker] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._new_id = RandomIds().new
        connection.on_loss(self._on_loss)

    async def open(self) -> None:
        """Subscribe."""
        await self._connection.subscribe(f"{self._prefix}.*", self._on_reply, queue_group=None)

    @property
    def num_waiters(self) -> int:
        """Requests in flight."""
        return sum(isinstance(waiter, (SingleWaiter, StreamWaiter)) for waiter in self._waiters.values())

    async def single(self, subject: Subject, deadline: Deadline, send: Callable[[str], None]) -> Msg:
        """The reply to the one request that `send` publishes with the reply subject that it is given.

        Raises `ConnectionLost` when not connected, `DeadlineExceeded`, `NoResponders`, and what `send` raises.
        """
        token = self._new_token(subject)
        waiter = self._waiters[token] = SingleWaiter(subject.name, f"{self._prefix}.{token}")
        expiry = self.expiries.add(waiter, deadline.at_s)
        try:
            send(waiter.reply_subject)
            return await waiter.reply
        finally:
            self.expiries.discard(waiter, expiry)
            del self._waiters[token]

    @asynccontextmanager
    async def waiting(self, subject: Subject | str) -> AsyncIterator[tuple[str, StreamWaiter]]:
        """A reply subject for one request to `subject`, and its waiter. Raises `ConnectionLost` when not connected."""
        waiter = StreamWaiter(str(subject), self.expiries)
        with self.listening(waiter) as reply_subject:
            yield reply_subject, waiter

    @contextmanager
    def listening(self, waiter: Waiter) -> Iterator[str]:
        """A reply subject whose messages `waiter` takes. Raises `ConnectionLost` when not connected."""
        token = self._new_token(waiter.subject)
        self._waiters[token] = waiter
        try:
            yield f"{self._prefix}.{token}"
        finally:
            del self._waiters[token]

    def _new_token(self, subject: Subject | str) -> str:
        if not self._connection.is_connected:
            raise ConnectionLost("not connected to NATS right now", subject=str(subject))
        return self._new_id()  # everybody may publish to an inbox: only who was told the name can answer

    def _on_reply(self, message: Msg) -> None:
        token = message.subject.rpartition(".")[2]
        waiter = self._waiters.get(token)
        if message.header_block and not message.data and self._tells_of_the_other_side(message, token, waiter):
            return
        if waiter is not None:
            waiter.take(message)

    def _tells_of_the_other_side(self, message: Msg, token: str, waiter: Waiter | None) -> bool:
        if PROBE_HEADER in message.headers:
            if not message.reply.startswith(f"{INBOX}."):
                return True  # nobody makes us publish anywhere else
            if waiter is None:
                self._say_that_nobody_waits(message.reply)
            elif isinstance(waiter, (SingleWaiter, StreamWaiter)):
                self._workers[token] = _Worker(message.reply)
                if self._looking is None:
                    self._look_later()
            return True
        worker = self._workers.get(token)
        if worker is None or waiter is None or not is_no_responders(message):
            return False
        worker.num_misses += 1
        if worker.num_misses >= MAX_MISSES:
            del self._workers[token]
            waiter.fail(PeerLost("the worker that had taken the request is gone", subject=waiter.subject))
        return True

    def _say_that_nobody_waits(self, link_subject: str) -> None:
        """The answer that the server gives for a process that is gone."""
        with suppress(BusError):
            self._connection.publish_now(link_subject, b"", headers=_NOBODY_WAITS)

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(LOOK_INTERVAL_S, self._look, context=Context())

    def _look(self) -> None:
        self._looking = None
        self._workers = {token: worker for token, worker in self._workers.items() if token in self._waiters}
        for token, worker in self._workers.items():
            with suppress(BusError):
                self._connection.publish_now(worker.link_subject, b"", reply=f"{self._prefix}.{token}", headers=PROBE)
        if self._workers:
            self._look_later()

    def _on_loss(self, error: BusError, subject: str) -> None:
        for waiter in list(self._waiters.values()):
            if not subject:
                waiter.fail(error)
            elif waiter.subject.lower() == subject.lower():  # the server's word is in lower case
                waiter.fail(type(error)(error.what, remedy=error.remedy, subject=waiter.subject))


def is_no_responders(message: Msg) -> bool:
    """Whether this is the server's own answer that nobody listens (an empty message with status 503)."""
    return not message.data and message.headers.get("Status") == "503"
