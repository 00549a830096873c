"""One connection to NATS that lasts: publish, subscribe, and the size check that keeps it alive.

In: subjects, payloads, headers. Out: the same on the wire, or a typed error; nats-py's own errors end here.
Invariants: a message over max_payload, headers counted, is never sent (the server would close the connection); whoever
waits for an answer hears of a lost connection or a denied subject at once, through the listeners. Whatever closed
the connection, another is made, with all subscriptions, for as long as it isn't closed here. From a server that
says that it will stop it moves to another, if there is one, before it is dropped: subscriptions are in a queue group
(their own, or one that is the connection's alone), so that nothing is delivered twice while there are two.
Leaves out: replies (`inbox`), typed messages (`call`, `endpoint`).
"""

import asyncio
import itertools
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from nats.errors import Error as NatsError
from nats.js import JetStreamContext

from bus.control_plane.direct_client import DirectClient, header_block
from bus.control_plane.direct_client import Msg as Msg
from bus.control_plane.nats_url import names_user
from bus.control_plane.nats_url import redacted as redacted
from bus.deadline import Deadline
from bus.errors import BusError, ConnectionLost, ControlPlaneError, PayloadTooLarge, PermissionDenied
from schemas.subjects import INBOX, Subject

MessageCallback = Callable[[Msg], None]
"""Called from the read loop: it looks up, answers or enqueues, and doesn't wait."""
LossListener = Callable[[BusError, str], None]
"""Called with the error and the subject it concerns ("" = all of them)."""

REBUILD_PAUSES_S = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Between tries to make a connection anew; the last for all further ones."""
STUCK_S = 30.0
"""A client that isn't back after this long is given up for a new one; nats-py tries every quarter of a second."""
MAX_UNSENT_BYTES = 4 << 20
"""More than this in our buffers makes `publish` wait for the socket."""
_LOOK_AGAIN_S = 0.02
LINGER_S = 0.5
"""How long the old connection still delivers after a move: servers of a cluster tell each other of subscriptions."""

_LOG = logging.getLogger(__name__)
_DENIED = re.compile(r'permissions violation for (?:publish|subscription) to "([^"]+)"', re.IGNORECASE)
_REFUSED = re.compile("authorization violation|authentication expired|authentication revoked", re.IGNORECASE)


@dataclass(eq=False, slots=True)
class Subscription:
    """A subject that is listened to, on whichever client the connection has."""

    subject: str
    queue_group: str
    callback: MessageCallback
    numbers: dict[DirectClient, int] = field(default_factory=dict)


class Connection:
    """An open connection; made by `Connection.open`, ended by `close`."""

    def __init__(self, url: str, name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self.num_rebuilt = 0
        """Clients made anew: after an error that nats-py doesn't come back from, or a move."""
        self._url = url
        self._options = options
        self._own_group = f"{name.replace('.', '-')}-{secrets.token_hex(4)}"
        self._subscriptions: set[Subscription] = set()
        self._listeners: list[LossListener] = []
        self._last_error = ""
        self._denied: set[str] = set()
        self._num_subscribed = 0
        self._is_open = False
        self._rebuilding: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._stuck: asyncio.TimerHandle | None = None
        self._client = self._new_client()

    @classmethod
    async def open(
        cls, url: str, name: str, timeout_s: float, *, options: Mapping[str, Any] | None = None
    ) -> "Connection":
        """Connect, retrying for up to `timeout_s`; `options` are the credentials for nats-py's `connect`.

        Raises `ConnectionLost` that says what the last try met; at once if the only server refuses the credentials.
        """
        self = cls(url, name, options or {})
        try:
            await self._connect(self._client, self._url.split(","), timeout_s)
        except ConnectionLost:
            await self.close()
            raise
        self._is_open = True
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

    def jetstream(self, timeout_s: float = 5.0) -> JetStreamContext:
        """nats-py's JetStream on the client of now; ask again for each use, since the client may be another by then."""
        return self._client.jetstream(timeout=timeout_s)

    async def connected(self, deadline: Deadline) -> bool:
        """Wait for the connection to be up; returns whether it is, at the latest at `deadline`."""
        while not self.is_connected and not deadline.expired:  # noqa: ASYNC110  # during an outage alone
            await asyncio.sleep(min(_LOOK_AGAIN_S, max(0.0, deadline.remaining_s)))
        return self.is_connected

    def on_loss(self, listener: LossListener) -> None:
        """Call `listener` when the connection drops or the server denies a subject."""
        self._listeners.append(listener)

    async def publish(
        self,
        subject: Subject | str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | bytes | None = None,
    ) -> None:
        """`publish_now`, and wait for the socket where much is unsent."""
        self.publish_now(subject, payload, reply=reply, headers=headers)
        if self._client.unsent_bytes > MAX_UNSENT_BYTES:
            try:
                await self._client.sent()
            except OSError as error:
                raise ConnectionLost(f"could not publish: {error}", subject=str(subject)) from None

    def publish_now(
        self,
        subject: Subject | str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | bytes | None = None,
    ) -> None:
        """Hand one message over, to be written at the end of this turn of the event loop.

        `headers` may be the bytes of `header_block`. Raises `PayloadTooLarge`, `ConnectionLost`: nothing was sent then.
        """
        block = headers if isinstance(headers, bytes) else header_block(dict(headers)) if headers else b""
        num_bytes = len(payload) + len(block)
        client = self._client
        if num_bytes > client.max_payload:
            raise PayloadTooLarge(
                f"a message of {num_bytes:,} bytes is over the NATS server's max_payload of {self.max_payload_bytes:,}",
                num_bytes=num_bytes,
                subject=str(subject),
            )
        name = subject if isinstance(subject, str) else subject.name
        if block:
            command = f"HPUB {name} {reply} {len(block)} {num_bytes}\r\n".encode()
        else:
            command = f"PUB {name} {reply} {num_bytes}\r\n".encode()
        try:
            client.send(b"%b%b%b\r\n" % (command, block, payload))
        except NatsError as error:
            raise ConnectionLost(f"could not publish: {error or type(error).__name__}", subject=name) from None
        client.stats["out_msgs"] += 1
        client.stats["out_bytes"] += num_bytes

    async def subscribe(
        self, subject: Subject | str, callback: MessageCallback, *, queue_group: str | None = ""
    ) -> Subscription:
        """Call `callback` for each message, in the order in which they came. Raises `ConnectionLost`.

        `queue_group` None: none at all, where the server's "no responders" is to arrive, which it sends to such
        subscriptions alone; what comes during a move may then come twice.
        """
        self._num_subscribed += 1
        own_group = f"{self._own_group}-{self._num_subscribed}"  # the server merges a group over all its subjects
        group = "" if queue_group is None else queue_group or own_group
        subscription = Subscription(str(subject), group, callback)
        self._subscriptions.add(subscription)
        try:
            await self._listen(self._client, subscription)
        except NatsError as error:
            self._subscriptions.discard(subscription)
            raise ConnectionLost(f"could not subscribe: {error}", subject=str(subject)) from None
        return subscription

    async def unsubscribe(self, subscription: Subscription, timeout_s: float = 2.0) -> None:
        """Take no further messages; those that the server has sent are still called back before this returns.

        The server is told first, and the subscription kept until two flushes are through (`confirm_subscriptions`).
        """
        self._subscriptions.discard(subscription)
        numbers = dict(subscription.numbers)  # two during a move
        subscription.numbers.clear()
        await asyncio.gather(*(self._stop_listening(client, number, timeout_s) for client, number in numbers.items()))

    async def flush(self, timeout_s: float) -> None:
        """Wait until the server has seen everything published and subscribed so far."""
        await self._flush(self._client, timeout_s)

    async def confirm_subscriptions(self, timeout_s: float, *subjects: Subject | str) -> None:
        """Wait until a message from any other connection finds what was subscribed to so far.

        Two flushes: with nats-server 2.15, after one, a request from another connection met "no responders" in 2 to 7
        of 100 tries; after two in none of 1,500. Raises `PermissionDenied` if the server denied one of `subjects`,
        or of all where none is named.
        """
        await self._flush_twice(self._client, timeout_s)
        # A refusal comes before the answer to the flush.
        denied = self._denied & {str(subject).lower() for subject in subjects} if subjects else set(self._denied)
        self._denied -= denied
        if denied:
            raise self._permission_denied("the NATS server denied a subscription", min(denied))

    def statistics(self) -> dict[str, int]:
        """Messages and bytes in and out, and reconnects, of the client of now; and how many clients were made anew."""
        return {**self._client.stats, "rebuilt": self.num_rebuilt}

    async def close(self, timeout_s: float = 2.0) -> None:
        """Flush what was published and close; ends within `timeout_s` even if the server is gone."""
        self._is_open = False
        self._tell(ConnectionLost("the connection to NATS was closed here"), "")
        if self._stuck:
            self._stuck.cancel()
        ending = [*self._retiring, *([self._rebuilding] if self._rebuilding else [])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await self._end(self._client, timeout_s)

    def _new_client(self) -> DirectClient:
        def on_broken(reason: str) -> None:
            self._on_broken(client, reason)

        client = DirectClient(on_broken)
        return client

    async def _connect(self, client: DirectClient, servers: list[str], timeout_s: float) -> None:
        is_refused = False

        async def on_error(error: Exception) -> None:
            nonlocal is_refused
            self._on_error(client, error)
            if self._is_open or not _REFUSED.search(str(error)):
                return
            is_refused = True
            if len(servers) == 1:  # it will say the same again
                with suppress(RuntimeError):  # the wait is over already
                    limit.reschedule(asyncio.get_running_loop().time())

        async def on_reconnected() -> None:
            self._on_reconnected(client)

        async def on_closed() -> None:
            self._rebuild(client, "the connection was closed")

        async def on_lame_duck() -> None:
            client.is_leaving = True
            self._rebuild(client, "the server is about to stop")

        try:
            async with asyncio.timeout(timeout_s) as limit:
                await client.connect(
                    **{
                        "servers": servers,
                        "name": self.name,
                        "max_reconnect_attempts": -1,
                        "reconnect_time_wait": 0.25,
                        "connect_timeout": 2,
                        "ping_interval": 5,
                        "inbox_prefix": self.inbox_prefix,
                        "skip_subject_validation": True,  # ours are built by schemas.subjects, which checks every part
                        **self._options,
                        "error_cb": on_error,
                        "reconnected_cb": on_reconnected,
                        "closed_cb": on_closed,
                        "lame_duck_mode_cb": on_lame_duck,
                    }
                )
        except (TimeoutError, OSError, NatsError) as error:
            reason = self._last_error or str(error) or "no answer"
            if is_refused:
                raise ConnectionLost(
                    f"the NATS server at {redacted(self._url)} refused these credentials: {reason}",
                    remedy=self._about_credentials(),
                ) from None
            raise ConnectionLost(
                f"no connection to NATS at {redacted(self._url)} within {timeout_s:g} s: {reason}"
            ) from None

    async def _listen(self, client: DirectClient, subscription: Subscription) -> None:
        number = await client.receive(subscription.subject, subscription.queue_group, subscription.callback)
        if subscription in self._subscriptions:
            subscription.numbers[client] = number
        else:  # it was unsubscribed meanwhile
            await self._stop_listening(client, number, 2.0)

    async def _stop_listening(self, client: DirectClient, number: int, timeout_s: float) -> None:
        try:
            if client.is_connected:
                async with asyncio.timeout(timeout_s):
                    await client.stop_receiving(number)
                    await self._flush_twice(client, timeout_s)
        except (TimeoutError, OSError, NatsError, ConnectionLost) as error:
            _LOG.debug("%s unsubscribes: %s", self.name, error)
        finally:
            client.forget(number)  # nor will a reconnect subscribe to it again

    async def _flush(self, client: DirectClient, timeout_s: float) -> None:
        if not client.is_connected:  # nats-py would return at once, as if all were well
            raise ConnectionLost("not connected to NATS right now")
        try:
            async with asyncio.timeout(timeout_s):
                client.write()  # nats-py's PING goes ahead of what is still to be written
                await client.flush()
        except (TimeoutError, OSError, NatsError) as error:
            raise ConnectionLost(f"NATS did not answer a flush within {timeout_s:g} s: {error}") from None

    async def _flush_twice(self, client: DirectClient, timeout_s: float) -> None:
        await self._flush(client, timeout_s)
        await self._flush(client, timeout_s)

    def _on_error(self, client: DirectClient, error: Exception) -> None:
        self._last_error = str(error) or type(error).__name__
        denied = _DENIED.search(str(error))
        if denied:
            subject = denied.group(1)
            if "for subscription to" in str(error).lower():
                self._denied.add(subject.lower())
            self._tell(self._permission_denied("the NATS server denied the subject", subject), subject)
        elif client.is_connected and self._is_open:
            _LOG.warning("NATS reports to %s: %s", self.name, error)

    def _permission_denied(self, what: str, subject: str) -> PermissionDenied:
        """The error for a subject as the server writes it, which nats-py puts in lower case."""
        as_written = (each.subject for each in self._subscriptions if each.subject.lower() == subject)
        is_inbox = subject.startswith(f"{INBOX}.".lower())
        remedy = (
            f"a user's inboxes are {INBOX}.<user>.> alone, and a worker's first part of its id names the user: "
            "set NIXLBUS_IDENTITY to the name of the user whose credentials these are"
        )
        return PermissionDenied(what, subject=next(as_written, subject), remedy=remedy if is_inbox else "")

    def _about_credentials(self) -> str:
        if "nkeys_seed" in self._options:
            used = "NIXLBUS_NATS_NKEY"
        elif "user_credentials" in self._options:
            used = "NIXLBUS_NATS_CREDS"
        elif names_user(self._url):
            used = "the user in NIXLBUS_NATS_URL"
        else:
            return "none were given: set NIXLBUS_NATS_NKEY, NIXLBUS_NATS_CREDS, or a user in NIXLBUS_NATS_URL"
        return f"check {used}, and that the server's configuration has this user"

    def _on_broken(self, client: DirectClient, reason: str) -> None:
        if client is not self._client or not self._is_open:
            return
        remedy = self._about_credentials() if _REFUSED.search(reason) else ""
        self._tell(ConnectionLost(f"the connection to NATS was lost: {reason}", remedy=remedy), "")
        self._watch_for_return(client)

    def _on_reconnected(self, client: DirectClient) -> None:
        client.is_leaving = False
        if client is self._client and self._stuck:
            self._stuck.cancel()

    def _watch_for_return(self, client: DirectClient) -> None:
        if self._stuck:
            self._stuck.cancel()
        loop = asyncio.get_running_loop()
        self._stuck = loop.call_later(STUCK_S, self._rebuild, client, "it did not come back", context=Context())

    def _rebuild(self, client: DirectClient, reason: str) -> None:
        """Replace `client`, which is closed, stuck or about to be dropped."""
        is_busy = self._rebuilding is not None and not self._rebuilding.done()
        if client is not self._client or is_busy or not self._is_open:
            return
        _LOG.warning("%s makes a new connection to NATS: %s", self.name, reason)
        self._rebuilding = asyncio.get_running_loop().create_task(self._replace(client), context=Context())

    async def _replace(self, old: DirectClient) -> None:
        if not old.is_connected:
            self._tell(ConnectionLost("the connection to NATS was lost"), "")
        servers = self._servers_known_to(old)
        for attempt in itertools.count():
            client = self._new_client()
            try:
                await self._connect(client, servers, 5.0)
                await self._take_over(client)
                break
            except (ConnectionLost, OSError, NatsError) as error:
                _LOG.info("%s has no new connection yet: %s", self.name, error)
                await self._discard(client)
            except asyncio.CancelledError:
                await self._discard(client)
                raise
            await asyncio.sleep(REBUILD_PAUSES_S[min(attempt, len(REBUILD_PAUSES_S) - 1)])
            if old.is_connected and not old.is_leaving:
                return  # it came back by itself
        self._client = client
        self.num_rebuilt += 1
        self._rebuilding = None
        retiring = asyncio.get_running_loop().create_task(self._retire(old), context=Context())
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)
        if client.is_closed or client.is_leaving:  # since it was made
            self._rebuild(client, "the new server is about to stop too")

    async def _take_over(self, client: DirectClient) -> None:
        """Subscribe to what isn't subscribed to on `client`, in one round: what comes meanwhile needs another."""
        missing = [subscription for subscription in self._subscriptions if client not in subscription.numbers]
        for subscription in missing:
            if subscription in self._subscriptions:
                await self._listen(client, subscription)
        await self._flush_twice(client, 5.0)

    def _servers_known_to(self, client: DirectClient) -> list[str]:
        """Ours, and those that the cluster told of, if nothing in our URL belongs to our own servers alone."""
        told = [] if "@" in self._url else [s.uri.geturl() for s in client._server_pool if s.discovered]
        return list(dict.fromkeys([*self._url.split(","), *told]))

    async def _retire(self, old: DirectClient) -> None:
        """Let what the old client's server has sent arrive, then close it."""
        try:
            await self._take_over(self._client)  # what was subscribed to while it took over
            if old.is_connected:
                await asyncio.sleep(LINGER_S)
                for subscription in list(self._subscriptions):
                    if old in subscription.numbers:
                        await old.stop_receiving(subscription.numbers[old])
                await self._flush_twice(old, 2.0)
        except (OSError, NatsError, ConnectionLost) as error:
            _LOG.debug("leaving a server, %s: %s", self.name, error)
        finally:
            await self._discard(old)

    async def _discard(self, client: DirectClient) -> None:
        await self._end(client, 2.0)
        for subscription in list(self._subscriptions):
            subscription.numbers.pop(client, None)

    async def _end(self, client: DirectClient, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                if client.is_connected:
                    await client.flush()
                await client.close()
        except (TimeoutError, OSError, RuntimeError, NatsError) as error:  # a lost server is no reason not to close
            _LOG.debug("closing %s: %s", self.name, error)

    def _tell(self, error: ControlPlaneError, subject: str) -> None:
        for listener in self._listeners:
            listener(error, subject)
