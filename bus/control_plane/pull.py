"""A standing pull from a durable consumer: asks for as many messages as there are free slots, and never for more.

In: how many slots are free. Out: deliveries, each handed to a callback. One loop asks; requests are batched, so that
a busy worker sends one for many jobs.
Invariants: what was asked for and not yet delivered, plus what is being worked on, is at most the number of slots;
after a lost connection, a restarted server, a deleted consumer or silence it asks again, for as long as it is open.
After a reconnect the server may still serve what was asked before: then more deliveries come than slots are free, and
whoever takes them keeps them waiting (and alive).
Leaves out: acks and what a delivery is (`delivery`), heartbeats for work in progress (`bus.jobs.consumer`).
Source: ADR-13 (pull subscribe); 408, 409 and 503 are the server's words that a pull has ended.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextvars import Context

from bus.control_plane.connection import Connection, Msg, Subscription
from bus.control_plane.delivery import ACK_PREFIX, Delivery, delivery_of
from bus.control_plane.lease import Horizon, now_s
from bus.errors import BusError, ConnectionLost, PermissionDenied

MAX_BATCH = 32
LONGEST_REQUEST_S = 30.0
_GRACE_S = 5.0
"""A request is over so long after its own end, if the server's word for that was lost."""
_GATHER_S = 0.001
"""How long a small request waits for more free slots: a job's ack takes about as long."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_MICROSECONDS = 1_000_000
_TIME_IS_UP = "request timeout"
_LOG = logging.getLogger(__name__)


class PullSubscription:
    """Pulls until it is closed. `free_slots` is asked before each request; `restore` makes a lost consumer anew."""

    def __init__(
        self,
        connection: Connection,
        consumer: str,
        free_slots: Callable[[], int],
        on_delivery: Callable[[Delivery], None],
        restore: Callable[[], Awaitable[None]],
        horizon: Horizon,
    ) -> None:
        """`consumer`: `<stream>.<durable>`. `horizon` is moved when the server says that a request's time is up."""
        self._connection = connection
        self._next_subject = f"$JS.API.CONSUMER.MSG.NEXT.{consumer}"
        self._free_slots = free_slots
        self._on_delivery = on_delivery
        self._restore = restore
        self._horizon = horizon
        self.request_s = LONGEST_REQUEST_S
        """How long the server keeps a request. At most a third of the consumer's ack_wait: then a worker that was
        stopped has no request left when the jobs that it took are delivered again, and can't swallow them a second
        time; and the end of one is news of the server, often enough for the leases of what comes."""
        self._inbox = f"{connection.inbox_prefix}.pull{secrets.token_hex(6)}"
        self._subscription: Subscription | None = None
        self._asking: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._num_asked = 0
        self._num_requests = 0
        self._heard_at_s = time.monotonic()
        self._trouble = ""
        self._pause_s = _FIRST_PAUSE_S
        self._denied: PermissionDenied | None = None
        connection.on_loss(self._on_loss)

    async def open(self, timeout_s: float) -> None:
        """Subscribe and ask for the first time. Raises `PermissionDenied`, `ConnectionLost`."""
        self._subscription = await self._connection.subscribe(f"{self._inbox}.*", self._on_message, queue_group=None)
        self._horizon.advance(now_s())
        self._ask(self._free_slots())
        await self._connection.confirm_subscriptions(timeout_s)
        if self._denied:
            raise self._denied
        self._asking = asyncio.create_task(self._keep_asking(), context=Context())

    def slot_freed(self) -> None:
        """Tell that there is a slot more."""
        self._wake.set()

    async def close(self) -> None:
        """Ask no more; what the server has sent is still delivered before this returns."""
        if self._asking:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        if self._subscription:
            await self._connection.unsubscribe(self._subscription)

    async def _keep_asking(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.request_s + _GRACE_S):
                    await self._wake.wait()
            self._wake.clear()
            try:
                if self._trouble:
                    await self._recover()
                await self._ask_for_what_is_missing()
            except BusError as error:
                self._in_trouble(str(error))
            except Exception as error:  # this loop is the queue's only one: whatever it met, it goes on
                _LOG.exception("pulling from %s failed", self._next_subject)
                self._in_trouble(type(error).__name__)

    async def _ask_for_what_is_missing(self) -> None:
        if self._num_asked and time.monotonic() - self._heard_at_s > self.request_s + _GRACE_S:
            self._num_asked = 0
        missing = self._free_slots() - self._num_asked
        if 0 < missing < MAX_BATCH // 2 and self._num_asked:
            await asyncio.sleep(_GATHER_S)
            missing = self._free_slots() - self._num_asked
        self._ask(missing)

    async def _recover(self) -> None:
        trouble, self._trouble = self._trouble, ""
        _LOG.info("pulling from %s was interrupted (%s); trying again", self._next_subject, trouble)
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if not self._connection.is_connected:
            raise ConnectionLost("not connected to NATS right now")
        await self._restore()

    def _in_trouble(self, what: str) -> None:
        self._trouble = what
        self._wake.set()

    def _ask(self, num_messages: int) -> None:
        while num_messages > 0:
            if not self._connection.is_connected:
                raise ConnectionLost("not connected to NATS right now", subject=self._next_subject)
            batch = min(num_messages, MAX_BATCH)
            self._num_requests += 1
            self._heard_at_s = time.monotonic()
            request = {"batch": batch, "expires": int(self.request_s * 1e9)}
            self._connection.publish_now(
                self._next_subject, json.dumps(request).encode(), reply=f"{self._inbox}.{self._token()}"
            )
            self._num_asked += batch
            num_messages -= batch

    def _token(self) -> str:
        """A request's number and its end, which the server's word about it returns."""
        return f"{self._num_requests:x}-{int((now_s() + self.request_s) * _MICROSECONDS):x}"

    def _on_message(self, message: Msg) -> None:
        self._heard_at_s = time.monotonic()
        if message.reply.startswith(ACK_PREFIX):
            self._pause_s = _FIRST_PAUSE_S
            self._num_asked = max(0, self._num_asked - 1)
            delivery = delivery_of(message)
            if delivery is not None:
                self._on_delivery(delivery)
            return
        headers = message.headers
        status = headers.get("Status", "")
        if not status:
            return
        unserved = headers.get("Nats-Pending-Messages", "")
        self._num_asked = max(0, self._num_asked - int(unserved)) if unserved.isdigit() else 0
        if status == "408":  # its time is over, as agreed
            self._pause_s = _FIRST_PAUSE_S
            if headers.get("Description", "").lower() == _TIME_IS_UP:
                end = message.subject.rpartition("-")[2]
                self._horizon.advance(min(now_s(), int(end, 16) / _MICROSECONDS))
        else:
            self._trouble = f"{status} {headers.get('Description', '')}".strip()
        self._wake.set()

    def _on_loss(self, error: BusError, subject: str) -> None:
        if not subject or subject.lower() == self._next_subject.lower():
            if isinstance(error, PermissionDenied):
                self._denied = error
            self._num_asked = 0
            self._horizon.forget()
            self._in_trouble(str(error))
