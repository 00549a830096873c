"""The replies to our own requests: one wildcard subscription, and a table of who waits for what.

In: messages on `_INBOX.<client>.<nonce>.<token>`. Out: each to the waiter of its token, or an error to it.
Invariants: a waiter is told at once of "no responders", a lost connection and a denied subject (nats-py's own
request() would time out); a token is used once and forgotten when its waiter leaves, so late replies are dropped.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from bus.control_plane.connection import Connection, Msg
from bus.deadline import Deadline
from bus.errors import BusError, ConnectionLost, DeadlineExceeded, NoResponders, RemoteProtocolError
from schemas.subjects import Subject

MAX_UNREAD_REPLIES = 65_536
"""Replies that wait unread before the waiter is failed: tokens of a stream whose consumer stopped reading."""


class SingleWaiter:
    """One request's only reply: await `reply`."""

    __slots__ = ("_timer", "reply", "reply_subject", "subject")

    def __init__(self, subject: str, reply_subject: str, deadline: Deadline) -> None:
        loop = asyncio.get_running_loop()
        self.subject = subject
        self.reply_subject = reply_subject
        self.reply: asyncio.Future[Msg] = loop.create_future()
        self._timer = loop.call_later(deadline.remaining_s, self._expire)

    def take(self, message: Msg) -> None:
        """Resolve `reply`."""
        if is_no_responders(message):
            self.fail(NoResponders("nobody listens", subject=self.subject))
        elif not self.reply.done():
            self.reply.set_result(message)

    def fail(self, error: BusError) -> None:
        """Make `reply` raise `error`."""
        if not self.reply.done():
            self.reply.set_exception(error)

    def close(self) -> None:
        """Wait no longer."""
        self._timer.cancel()
        self.reply.cancel()

    def _expire(self) -> None:
        self.fail(DeadlineExceeded("no reply within the deadline", subject=self.subject))


class StreamWaiter:
    """One request's replies, in order of arrival."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self._replies: asyncio.Queue[Msg | BusError] = asyncio.Queue(maxsize=MAX_UNREAD_REPLIES)

    async def next(self, deadline: Deadline) -> Msg:
        """The next reply. Raises `DeadlineExceeded`, or what the waiter was failed with."""
        try:
            async with asyncio.timeout(deadline.remaining_s):
                reply = await self._replies.get()
        except TimeoutError:
            raise DeadlineExceeded("no reply within the deadline", subject=self.subject) from None
        if isinstance(reply, BusError):
            raise reply
        return reply

    def take(self, message: Msg) -> None:
        """Queue a reply for `next`."""
        if is_no_responders(message):
            self.fail(NoResponders("nobody listens", subject=self.subject))
        else:
            self._put(message)

    def fail(self, error: BusError) -> None:
        """Make `next` raise `error`, after the replies already here."""
        self._put(error)

    def _put(self, item: Msg | BusError) -> None:
        if self._replies.full():
            while not self._replies.empty():
                self._replies.get_nowait()
            item = RemoteProtocolError("replies came faster than they were read", subject=self.subject)
        self._replies.put_nowait(item)


class Inbox:
    """The table of waiters of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._prefix = f"{connection.inbox_prefix}.{secrets.token_hex(6)}"
        self._waiters: dict[str, SingleWaiter | StreamWaiter] = {}
        self._serial = 0
        connection.on_loss(self._on_loss)

    async def open(self) -> None:
        """Subscribe."""
        await self._connection.subscribe(f"{self._prefix}.*", self._on_reply)

    @property
    def num_waiters(self) -> int:
        """Requests in flight."""
        return len(self._waiters)

    async def single(self, subject: Subject, deadline: Deadline, send: Callable[[str], None]) -> Msg:
        """The reply to the one request that `send` publishes with the reply subject that it is given.

        Raises `ConnectionLost` when not connected, `DeadlineExceeded`, `NoResponders`, and what `send` raises.
        """
        token = self._new_token(subject)
        waiter = self._waiters[token] = SingleWaiter(subject.name, f"{self._prefix}.{token}", deadline)
        try:
            send(waiter.reply_subject)
            return await waiter.reply
        finally:
            waiter.close()
            del self._waiters[token]

    @asynccontextmanager
    async def waiting(self, subject: Subject | str) -> AsyncIterator[tuple[str, StreamWaiter]]:
        """A reply subject for one request to `subject`, and its waiter. Raises `ConnectionLost` when not connected."""
        token = self._new_token(subject)
        waiter = self._waiters[token] = StreamWaiter(str(subject))
        try:
            yield f"{self._prefix}.{token}", waiter
        finally:
            del self._waiters[token]

    def _new_token(self, subject: Subject | str) -> str:
        if not self._connection.is_connected:
            raise ConnectionLost("not connected to NATS right now", subject=str(subject))
        self._serial += 1
        return f"{self._serial:x}"

    async def _on_reply(self, message: Msg) -> None:
        waiter = self._waiters.get(message.subject.rpartition(".")[2])
        if waiter is not None:
            waiter.take(message)

    def _on_loss(self, error: BusError, subject: str) -> None:
        for waiter in list(self._waiters.values()):
            if not subject or waiter.subject.lower() == subject.lower():
                waiter.fail(error)


def is_no_responders(message: Msg) -> bool:
    """Whether this is the server's own answer that nobody listens (an empty message with status 503)."""
    return not message.data and bool(message.headers) and (message.headers or {}).get("Status") == "503"
