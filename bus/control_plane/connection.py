"""One connection to NATS: publish, subscribe, and the size check that keeps the connection alive.

In: subjects, payloads, headers. Out: the same on the wire, or a typed error; nats-py's own errors end here.
Invariants: a message over max_payload, headers counted, is never sent (the server would close the connection, and
nats-py would not come back); a subscription's callback never raises (nats-py would end it silently); whoever waits
for an answer hears of a lost connection or a denied subject at once, through the listeners.
Leaves out: replies (`inbox`), typed messages (`call`, `endpoint`).
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from nats.aio.msg import Msg as Msg
from nats.aio.subscription import Subscription as Subscription
from nats.errors import Error as NatsError

from bus.control_plane.nats_url import redacted as redacted
from bus.control_plane.tls_client import TlsClient
from bus.errors import BusError, ConnectionLost, ControlPlaneError, PayloadTooLarge, PermissionDenied
from schemas.subjects import Subject

MessageCallback = Callable[[Msg], Awaitable[None]]
LossListener = Callable[[BusError, str], None]
"""Called with the error and the subject it concerns ("" = all of them)."""

_LOG = logging.getLogger(__name__)
_HEADER_OVERHEAD_BYTES = len(b"NATS/1.0\r\n\r\n")
_HEADER_LINE_OVERHEAD_BYTES = len(b": \r\n")
_DENIED = re.compile(r'permissions violation for (?:publish|subscription) to "([^"]+)"', re.IGNORECASE)
_CALLBACK_QUEUE_MESSAGES = 65_536
_CALLBACK_QUEUE_BYTES = 256 << 20


class Connection:
    """An open connection; made by `Connection.open`, ended by `close`."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolves, with the reason, when the connection is gone for good."""
        self._url = url
        self._client = TlsClient()
        self._listeners: list[LossListener] = []
        self._last_error = ""
        self._denied_subscription = ""

    @classmethod
    async def open(
        cls, url: str, name: str, timeout_s: float, *, options: Mapping[str, Any] | None = None
    ) -> "Connection":
        """Connect, retrying for up to `timeout_s`; `options` are the credentials for nats-py's `connect`.

        Raises `ConnectionLost` that says what the last try met.
        """
        self = cls(url, name)
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.connect(
                    servers=url.split(","),
                    name=name,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.25,  # type: ignore[arg-type]  # a sleep; its annotation says int
                    ping_interval=10,
                    inbox_prefix=f"_INBOX.{name}",
                    skip_subject_validation=True,  # ours are built by schemas.subjects, which checks every part
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnected,
                    closed_cb=self._on_closed,
                    **(options or {}),
                )
        except (TimeoutError, OSError, NatsError) as error:
            await self.close()
            reason = self._last_error or str(error) or "no answer"
            raise ConnectionLost(f"no connection to NATS at {redacted(url)} within {timeout_s:g} s: {reason}") from None
        return self

    @property
    def max_payload_bytes(self) -> int:
        """The server's limit for one message, headers included."""
        return self._client.max_payload

    @property
    def is_connected(self) -> bool:
        """Whether the connection is up right now."""
        return self._client.is_connected

    @property
    def inbox_prefix(self) -> str:
        """Prefix of reply subjects that only this client listens on."""
        return f"_INBOX.{self.name}"

    def on_loss(self, listener: LossListener) -> None:
        """Call `listener` when the connection drops or the server denies a subject."""
        self._listeners.append(listener)

    async def publish(
        self,
        subject: Subject | str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Hand one message to the connection. Raises `PayloadTooLarge` or `ConnectionLost`; nothing was sent then."""
        self._check_size(subject, payload, headers)
        try:
            await self._client.publish(str(subject), payload, reply=reply, headers=dict(headers) if headers else None)
        except NatsError as error:
            raise ConnectionLost(f"could not publish: {error}", subject=str(subject)) from None

    def publish_now(
        self,
        subject: Subject | str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`publish` without a suspension, for small messages: no task, no turn of the event loop.

        nats-py's publish appends to its buffer and then wakes its flusher; it can only suspend in the second, when
        that has been woken a thousand times already, so there is nothing left to wait for.
        """
        self._check_size(subject, payload, headers)
        publishing = self._client.publish(
            str(subject), payload, reply=reply, headers=dict(headers) if headers else None
        )
        try:
            publishing.send(None)
        except StopIteration:
            return
        except NatsError as error:
            raise ConnectionLost(f"could not publish: {error}", subject=str(subject)) from None
        publishing.close()

    def _check_size(self, subject: Subject | str, payload: bytes, headers: Mapping[str, str] | None) -> None:
        num_bytes = len(payload) + (header_bytes(headers) if headers else 0)
        if num_bytes > self._client.max_payload:
            raise PayloadTooLarge(
                f"a message of {num_bytes:,} bytes is over the NATS server's max_payload of {self.max_payload_bytes:,}",
                num_bytes=num_bytes,
                subject=str(subject),
            )

    async def subscribe(
        self, subject: Subject | str, callback: MessageCallback, *, queue_group: str = ""
    ) -> Subscription:
        """Call `callback` for each message, one after the other: it only enqueues. Raises `ConnectionLost`."""
        try:
            return await self._client.subscribe(
                str(subject),
                queue=queue_group,
                cb=_guarded(callback, str(subject)),
                pending_msgs_limit=_CALLBACK_QUEUE_MESSAGES,
                pending_bytes_limit=_CALLBACK_QUEUE_BYTES,
            )
        except NatsError as error:
            raise ConnectionLost(f"could not subscribe: {error}", subject=str(subject)) from None

    async def unsubscribe(self, subscription: Subscription, timeout_s: float = 2.0) -> None:
        """Take no further messages; those that the server has sent are still called back before this returns.

        nats-py's own drain drops what comes after one flush, and under load something does; so the server is told
        first, and the subscription kept until two flushes are through (see `confirm_subscriptions`).
        """
        if not self._client.is_connected:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._client._send_unsubscribe(subscription._id)
                await self.confirm_subscriptions(timeout_s)
                await subscription.drain()  # type: ignore[no-untyped-call]
        except (TimeoutError, OSError, NatsError, ConnectionLost) as error:
            _LOG.debug("unsubscribing from %s: %s", subscription.subject, error)

    async def flush(self, timeout_s: float) -> None:
        """Wait until the server has seen everything published and subscribed so far."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.flush()
        except (TimeoutError, NatsError) as error:
            raise ConnectionLost(f"NATS did not answer a flush within {timeout_s:g} s: {error}") from None

    async def confirm_subscriptions(self, timeout_s: float) -> None:
        """Wait until a message from any other connection finds what was subscribed to so far.

        Two flushes: with nats-server 2.15, after one, a request from another connection met "no responders" in 2 to 7
        of 100 tries; after two in none of 1,500. Raises `PermissionDenied` if the server denied one of them.
        """
        await self.flush(timeout_s)
        await self.flush(timeout_s)
        denied, self._denied_subscription = self._denied_subscription, ""
        if denied:  # the server's refusal came before its answer to the flush
            raise PermissionDenied("the NATS server denied a subscription", subject=denied)

    def statistics(self) -> dict[str, int]:
        """Messages and bytes in and out, and reconnects, since the connection was opened."""
        return dict(self._client.stats)

    async def close(self, timeout_s: float = 2.0) -> None:
        """Flush what was published and close; ends within `timeout_s` even if the server is gone."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._client.is_connected:
                    await self._client.flush()
                await self._client.close()
        except (TimeoutError, OSError, RuntimeError, NatsError) as error:  # a lost server is no reason not to close
            _LOG.debug("closing %s: %s", self.name, error)

    async def _on_error(self, error: Exception) -> None:
        self._last_error = str(error)
        denied = _DENIED.search(str(error))
        if denied:
            subject = denied.group(1)
            if "for subscription to" in str(error).lower():
                self._denied_subscription = subject
            self._tell(PermissionDenied("the NATS server denied the subject", subject=subject), subject)
        elif self._client.is_connected:
            _LOG.warning("NATS reports to %s: %s", self.name, error)

    async def _on_disconnected(self) -> None:
        self._tell(ConnectionLost("the connection to NATS was lost"), "")

    async def _on_closed(self) -> None:
        if not self.closed.done():
            self.closed.set_result(self._last_error or "closed")

    def _tell(self, error: ControlPlaneError, subject: str) -> None:
        for listener in self._listeners:
            listener(error, subject)


def header_bytes(headers: Mapping[str, str] | None) -> int:
    """Bytes that headers take on the wire, as the server counts them."""
    if not headers:
        return 0
    return _HEADER_OVERHEAD_BYTES + sum(
        len(name.encode()) + len(value.encode()) + _HEADER_LINE_OVERHEAD_BYTES for name, value in headers.items()
    )


def _guarded(callback: MessageCallback, subject: str) -> MessageCallback:
    async def call(message: Msg) -> None:
        try:
            await callback(message)
        except BusError as error:
            _LOG.warning("a message on %s was dropped: %s", subject, error)
        except Exception:
            _LOG.exception("the callback for %s failed", subject)

    return call
