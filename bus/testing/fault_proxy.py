"""A network between clients and a nats-server, and its faults: a TCP proxy that reads the NATS protocol as it passes.

In: the server's URL, and connections of any client to the proxy's. Out: the same bytes at the other end, but for what
the rules do to published messages (`fault_rules`) and for what `cut` and `pause` do to connections.
Invariants: without a rule nothing is changed but INFO's list of further servers, which would lead clients around the
proxy; a message is written whole or not at all, between two others; a peer that doesn't read stops the one that sends
to it, and what is held back is bounded by `MAX_HELD_BYTES`.
Leaves out: TLS, WebSocket, and faults of single messages on their way from the server to a client: put who publishes
them behind the proxy.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import msgspec

from bus.testing.fault_rules import Fault, FaultRule, FaultRules, Parcel
from bus.testing.protocol_parser import Passage, ProtocolParser, Publication, Side

MAX_HELD_BYTES = 64 << 20
"""Delayed and reordered messages; a client that publishes past it has to wait until some have gone."""
_DEFAULT_PORT = 4222
_READ_BYTES = 1 << 16
_SERVER_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0
_CALL_TIMEOUT_S = 5.0
_FURTHER_SERVERS = ("connect_urls", "ws_connect_urls")
_LOG = logging.getLogger(__name__)


class ProxyError(Exception):
    """The server can't be put behind the proxy; the text says why and what to do."""


class FaultProxy:
    """`async with FaultProxy(server.url) as faults`, then give `faults.url` to whatever is to have a bad network.

    The methods may be called from any thread; none of them waits for longer than the proxy's loop takes to turn.
    """

    def __init__(self, server_url: str) -> None:
        """Takes one `nats://` URL. Raises `ProxyError` for any other."""
        parts = urlsplit(server_url)
        if parts.scheme != "nats" or not parts.hostname or "," in server_url:
            raise ProxyError("the fault proxy goes before one nats:// URL; it speaks neither TLS nor WebSocket")
        self._host, self._port = parts.hostname, parts.port or _DEFAULT_PORT
        credentials, at, _ = parts.netloc.rpartition("@")
        self._credentials = credentials + at
        self._rules = FaultRules()
        self._ways: set[_Way] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._held_bytes = 0
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> "FaultProxy":
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._flowing, self._has_room = asyncio.Event(), asyncio.Event()
        self._flowing.set()
        await self._check_server()
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        assert self._listener is not None
        self._listener.close()
        self._abort_all()
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """For clients; with the user and password of the server's URL, if it has them."""
        assert self._listener is not None, "enter the proxy first"
        return f"nats://{self._credentials}127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    @property
    def num_connections(self) -> int:
        """Clients that are connected through the proxy right now."""
        return len(self._ways)

    def drop(self, pattern: str, *, count: int | None = 1) -> FaultRule:
        """Lose the next `count` messages on subjects of `pattern`, or all of them (None).

        This and the other rules match what *clients* publish, replies and acks included, and raise `ValueError` for
        a pattern, count or time that can't be meant.
        """
        return self._add(FaultRule(Fault.DROP, pattern, count))

    def delay(self, pattern: str, seconds: float, *, count: int | None = 1) -> FaultRule:
        """Let messages come `seconds` late. What their connection publishes meanwhile overtakes them."""
        return self._add(FaultRule(Fault.DELAY, pattern, count, seconds))

    def duplicate(self, pattern: str, *, count: int | None = 1) -> FaultRule:
        """Let messages come twice, the second copy right behind the first."""
        return self._add(FaultRule(Fault.DUPLICATE, pattern, count))

    def reorder(self, pattern: str, *, count: int = 2, within_s: float = 1.0) -> FaultRule:
        """Let the next `count` messages come in the opposite order.

        Those that have come go on as they came when the others don't within `within_s`, or when the rule is removed.
        """
        return self._add(FaultRule(Fault.REORDER, pattern, count, within_s))

    def cut(self) -> None:
        """Reset every connection. Clients may come back at once; what was held back of theirs is lost."""
        self._call(self._abort_all)

    def pause(self) -> None:
        """Be a black hole: connections stay open and nothing passes, either way, not even a connection's end."""
        self._call(self._flowing.clear)

    def resume(self) -> None:
        """Go on where `pause` stopped; nothing was lost."""
        self._call(self._flowing.set)

    def clear(self) -> None:
        """Remove all rules and resume. Messages that are late already stay late."""
        self._call(lambda: self._let_go(self._rules.remove()))
        self.resume()

    def _add(self, rule: FaultRule) -> FaultRule:
        rule._remove = lambda removed: self._call(lambda: self._let_go(self._rules.remove(removed)))
        self._rules.add(rule)
        return rule

    def _call(self, function: Callable[[], None]) -> None:
        if self._loop.is_closed() or threading.get_ident() == self._thread_id:
            function()
            return

        async def call() -> None:
            function()

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(_CALL_TIMEOUT_S)

    def _abort_all(self) -> None:
        for way in list(self._ways):
            way.abort()

    async def _check_server(self) -> None:
        try:
            async with asyncio.timeout(_SERVER_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                try:
                    line = await reader.readline()
                finally:
                    writer.transport.abort()
            greeting = _info_of(line)
        except (OSError, TimeoutError, ValueError) as error:
            reason = str(error) or "no answer"
            raise ProxyError(f"no nats-server greets at {self._host}:{self._port}: {reason}") from None
        if greeting.get("tls_required"):
            raise ProxyError(
                f"the nats-server at {self._host}:{self._port} requires TLS, which the fault proxy can't read; "
                "test against a server without it"
            )

    def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self._start(self._carry(from_client, to_client))

    async def _carry(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            await self._flowing.wait()
            async with asyncio.timeout(_SERVER_TIMEOUT_S):
                from_server, to_server = await asyncio.open_connection(self._host, self._port)
            way = _Way(self, from_client, to_client, from_server, to_server)
            self._ways.add(way)
            try:
                await way.run()
            finally:
                self._ways.discard(way)
        except (OSError, TimeoutError) as error:
            _LOG.debug("the nats-server at %s:%s is away: %s", self._host, self._port, error)
        finally:
            to_client.transport.abort()

    async def _forward(self, message: Publication, way: "_Way") -> None:
        verdict = self._rules.decide(message.subject, Parcel(way, message.raw))
        if verdict.held_by is not None:
            self._held_bytes += len(message.raw)
            self._start(self._let_go_late(verdict.held_by))
        elif verdict.after_s:
            self._held_bytes += len(message.raw)
            self._start(self._deliver_late(verdict.forward, verdict.after_s))
        else:
            for parcel in verdict.forward:
                _deliver(parcel)
            # All but this message itself, and its second copy, were held back until now.
            self._release(parcel for parcel in verdict.forward if parcel.raw is not message.raw)
        while self._held_bytes > MAX_HELD_BYTES:
            self._has_room.clear()
            await self._has_room.wait()

    async def _deliver_late(self, parcels: Iterable[Parcel], after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self._flowing.wait()
        for parcel in parcels:
            _deliver(parcel)
        self._release(parcels)

    async def _let_go_late(self, rule: FaultRule) -> None:
        await asyncio.sleep(rule.seconds)
        self._let_go(self._rules.let_go(rule))

    def _let_go(self, parcels: list[Parcel]) -> None:
        if parcels and not self._loop.is_closed():
            self._start(self._deliver_late(parcels, 0.0))

    def _release(self, parcels: Iterable[Parcel]) -> None:
        self._held_bytes -= sum(len(parcel.raw) for parcel in parcels)
        self._has_room.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Way:
    """One client's connection and its continuation to the server."""

    def __init__(
        self,
        proxy: FaultProxy,
        from_client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = from_client, to_client
        self._from_server, self._to_server = from_server, to_server
        self._is_between_commands = True
        self._waiting: deque[bytes] = deque()
        self._pumps: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Carry both directions until either side ends, then end the other, with all that it was sent."""
        self._pumps = [asyncio.create_task(self._to_server_side()), asyncio.create_task(self._to_client_side())]
        try:
            await asyncio.wait(self._pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in self._pumps:
                pump.cancel()
            for ended in await asyncio.gather(*self._pumps, return_exceptions=True):
                if isinstance(ended, Exception) and not isinstance(ended, OSError):
                    _LOG.error("the fault proxy lost a connection by a mistake of its own", exc_info=ended)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._close()
        finally:
            self.abort()

    def send(self, message: bytes) -> None:
        """Write one whole message to the server, now or when the command that is being written has ended."""
        if self._to_server.is_closing():
            return
        if self._is_between_commands:
            self._to_server.write(message)
        else:
            self._waiting.append(message)

    def abort(self) -> None:
        """Reset both connections."""
        for pump in self._pumps:
            pump.cancel()
        self._to_client.transport.abort()
        self._to_server.transport.abort()

    async def _close(self) -> None:
        for writer in (self._to_server, self._to_client):
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _to_server_side(self) -> None:
        parser = ProtocolParser(Side.CLIENT)
        while received := await self._from_client.read(_READ_BYTES):
            await self._proxy._flowing.wait()
            for piece in parser.feed(received):
                if isinstance(piece, Publication):
                    await self._proxy._forward(piece, self)
                else:
                    self._pass(piece)
            await self._to_server.drain()
        await self._proxy._flowing.wait()
        self._to_server.write(parser.rest())

    def _pass(self, passage: Passage) -> None:
        self._to_server.write(passage.raw)
        self._is_between_commands = passage.ends_command
        while self._is_between_commands and self._waiting:
            self._to_server.write(self._waiting.popleft())

    async def _to_client_side(self) -> None:
        parser = ProtocolParser(Side.SERVER)
        while received := await self._from_server.read(_READ_BYTES):
            await self._proxy._flowing.wait()
            for piece in parser.feed(received):
                is_line = isinstance(piece, Passage) and piece.is_line
                self._to_client.write(_without_further_servers(piece.raw) if is_line else piece.raw)
            await self._to_client.drain()
        await self._proxy._flowing.wait()
        self._to_client.write(parser.rest())


def _deliver(parcel: Parcel) -> None:
    assert isinstance(parcel.way, _Way)
    parcel.way.send(parcel.raw)


def _without_further_servers(raw: bytes) -> bytes:
    """An INFO line without the addresses of other servers; anything else as it is."""
    if raw[:5].upper() != b"INFO ":
        return raw
    try:
        greeting = _info_of(raw)
    except ValueError:
        return raw
    if not any(name in greeting for name in _FURTHER_SERVERS):
        return raw
    kept = {name: value for name, value in greeting.items() if name not in _FURTHER_SERVERS}
    return b"INFO " + msgspec.json.encode(kept) + b"\r\n"


def _info_of(line: bytes) -> dict[str, Any]:
    """The fields of an INFO line. Raises `ValueError` for any other."""
    command, _, fields = line.partition(b" ")
    if command.upper() != b"INFO":
        raise ValueError("the greeting is not a nats-server's")
    try:
        return msgspec.json.decode(fields, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ValueError(f"the greeting is not JSON: {error}") from None
