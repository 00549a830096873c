"""nats-py's client with a shorter way in and out, and without the ways in which it goes silent.

In: commands to send, the server's messages. Out: the same on the wire; each message handed to its subscription's
callback as it is parsed, without the queue and the task that nats-py puts between; everything sent in one turn of the
event loop written at once.
Invariants: a callback's exception doesn't end the read loop; an error that the server sends leads to a new connection
and not to a client that is closed for good; a broken connection is known when it is noticed, not when its socket has
been closed, which on a link that swallows packets takes a quarter of an hour.
It overrides private methods of nats-py, hence the narrow pin of its version; each is held against what nats-py does by
itself in `tests/bus/control_plane/test_nats_traps.py`.
Source: nats-py 2.16, `nats/aio/client.py`.
"""

import asyncio
import logging
import re
from collections.abc import Callable

from nats import errors
from nats.aio.client import Client

from bus.control_plane.direct_parser import DirectParser
from bus.control_plane.tls_client import TlsClient

HEADER_LINE = b"NATS/1.0"
_STATUS_CHARACTERS = 3
_HEADER = re.compile(r"\n([^:\r\n]++):([^\r\n]*+)\r")
"""Possessive, so that whatever a peer sends is read in one pass."""
MAX_HEADER_BYTES = 64 << 10
"""A longer block counts as none: the headers that anybody needs take less than a kilobyte."""
_INHERENT_ERRORS = ("stale connection",)
"""What the base class treats as a broken connection already."""

_LOG = logging.getLogger(__name__)


class Msg:
    """A message as it came. Attributes: `subject`, `reply` ("" if none is wanted), `data`, `headers`."""

    __slots__ = ("_headers", "data", "header_block", "reply", "subject")

    def __init__(self, subject: str, reply: str, data: bytes, header_block: bytes | None = None) -> None:
        self.subject = subject
        self.reply = reply
        self.data = data
        self.header_block = header_block
        """The headers as they came."""
        self._headers: dict[str, str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Header names, as they were written, to values; a status line of the server is under `Status`."""
        if self._headers is None:
            self._headers = parse_headers(self.header_block) if self.header_block else {}
        return self._headers


class DirectClient(TlsClient):
    """A connection to one server of a pool."""

    def __init__(self, on_broken: Callable[[str], None]) -> None:
        """`on_broken` is told the reason as soon as the connection is known to be broken."""
        super().__init__()
        self._ps = DirectParser(self)
        self._receivers: dict[int, Callable[[Msg], None]] = {}
        self._on_broken = on_broken
        self._write_is_due = False
        self._num_sent_together = 0
        self.is_leaving = False
        """Whether its server has said that it will stop."""
        self._loop = asyncio.get_running_loop()

    async def receive(self, subject: str, queue_group: str, callback: Callable[[Msg], None]) -> int:
        """Subscribe; `callback` is called from the read loop and neither blocks nor waits. Returns an id."""
        subscription = await self.subscribe(subject, queue=queue_group)
        number: int = subscription._id
        self._receivers[number] = callback
        return number

    async def stop_receiving(self, number: int) -> None:
        """Tell the server to send no more; what is under way still arrives, until `forget`."""
        await self._send_unsubscribe(number)

    def forget(self, number: int) -> None:
        """Call the callback no more."""
        self._receivers.pop(number, None)
        self._remove_sub(number)

    def send(self, command: bytes) -> None:
        """Write a command: at once where commands come one by one, else with all others of this turn of the event loop.

        While there is no connection it is kept for the next one, up to nats-py's `pending_size`: more raises
        `OutboundBufferLimitError`.
        """
        if self._status != Client.CONNECTED:
            if self.is_closed:
                raise errors.ConnectionClosedError
            if self._pending_data_size + len(command) > self._max_pending_size:
                raise errors.OutboundBufferLimitError
        self._pending.append(command)
        self._pending_data_size += len(command)
        if not self._write_is_due:
            self._write_is_due = True
            self._loop.call_soon(self._end_turn)
            if self._num_sent_together <= 1:
                self.write()
            self._num_sent_together = 0
        self._num_sent_together += 1

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the socket hasn't taken yet."""
        writer = getattr(self._transport, "_io_writer", None)
        buffered = writer.transport.get_write_buffer_size() if writer is not None else 0
        return int(self._pending_data_size + buffered)

    async def sent(self) -> None:
        """Wait until the socket has taken most of what was sent."""
        if self._transport is not None and self.is_connected:
            self.write()
            await self._transport.drain()  # type: ignore[no-untyped-call]

    def _end_turn(self) -> None:
        self._write_is_due = False
        self.write()

    def write(self) -> None:
        """Write what was sent in this turn so far."""
        if self._pending and self.is_connected and self._transport is not None:
            commands, self._pending, self._pending_data_size = self._pending, [], 0
            self._transport.write(commands[0] if len(commands) == 1 else b"".join(commands))

    def deliver(self, number: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> bool:
        """Hand a message to its subscription's callback; returns whether it has one of ours."""
        receive = self._receivers.get(number)
        if receive is None:
            return False
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        try:
            receive(Msg(subject.decode(), reply.decode(), data, headers))
        except Exception:
            _LOG.exception("the callback for %s failed", subject.decode(errors="replace"))
        return True

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        if not self.deliver(sid, subject, reply, data, headers):
            await super()._process_msg(sid, subject, reply, data, headers)  # nats-py's own: JetStream

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():  # of a flush that was given up: nats-py sets its future all the same,
            self._pongs.pop(0)  # and its read loop ends with the error
            self._pings_outstanding = 0
            return
        await super()._process_pong()

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except BaseException:
            self._abort()  # nats-py leaves the socket of a greeting that failed to the garbage collector
            raise

    async def _process_err(self, err_msg: str) -> None:
        text = err_msg.lower()
        if self.is_connecting or "permissions violation" in text or any(known in text for known in _INHERENT_ERRORS):
            await super()._process_err(err_msg)
            return
        error = errors.Error(f"nats: {err_msg}".replace("'", ""))
        self._err = error
        await self._error_cb(error)
        if "invalid" not in text:  # an invalid subject is refused, and the connection stays
            await self._process_op_err(error)

    async def _process_op_err(self, e: Exception) -> None:
        if not (self.is_closed or self.is_reconnecting):
            self._abort()
            self._on_broken(str(e) or type(e).__name__)
        await super()._process_op_err(e)

    def _abort(self) -> None:
        """Drop the socket without waiting for the peer to agree."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()


def header_block(headers: dict[str, str]) -> bytes:
    """The bytes of a message's headers. Raises `ValueError` for what would end a header early."""
    lines = [HEADER_LINE.decode()]
    for name, value in headers.items():
        if not name or not name.isascii() or any(c in name for c in ": \r\n") or "\r" in value or "\n" in value:
            raise ValueError(f"{name[:80]!r} is no header")
        lines.append(f"{name}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def parse_headers(block: bytes) -> dict[str, str]:
    """Header names to values. Never raises, whatever a peer sent: a line that is no header is left out."""
    if len(block) > MAX_HEADER_BYTES:
        return {}
    text = block.decode(errors="replace")
    headers = {name: value.strip(" \t") for name, value in _HEADER.findall(text)}
    if not text.startswith("NATS/1.0\r"):
        status = text.partition("\r\n")[0][len(HEADER_LINE) :].strip()
        headers["Status"] = status[:_STATUS_CHARACTERS]
        headers["Description"] = status[_STATUS_CHARACTERS:].strip()
    return headers
