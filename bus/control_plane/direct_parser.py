"""Messages cut out of what the socket gave, in one pass.

In: bytes from a server. Out: messages, to the client's `deliver`; everything else goes to nats-py's own parser, which
takes two regular expressions, three copies and a coroutine per message.
Source: NATS client protocol, MSG and HMSG; nats-py 2.16, `nats/protocol/parser.py`.
"""

from typing import Protocol

from nats.errors import ProtocolError
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

_MSG, _HMSG = b"M"[0], b"H"[0]


class Taker(Protocol):
    """Who is told of messages: nats-py's client, with a shorter way in."""

    def deliver(self, number: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> bool:
        """Hand a message to its subscription's callback; returns whether it has one."""

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:  # nats-py's own way
        ...


class DirectParser(Parser):
    """Stands in for nats-py's parser."""

    nc: Taker

    def reset(self) -> None:
        """Forget what was kept: there is another connection."""
        super().reset()
        self._awaited_bytes = 0

    async def parse(self, data: bytes = b"") -> None:
        """Take what was read; what is no whole message yet is kept."""
        if self.state != AWAITING_CONTROL_LINE:
            await super().parse(data)  # in the middle of a message that the base class has begun
            return
        if self.buf:
            self.buf.extend(data)
            if len(self.buf) < self._awaited_bytes:
                return  # of a large message: it is looked at again when it is whole
            data = bytes(self.buf)
        self._awaited_bytes = 0
        start, end = 0, len(data)
        while start < end and (data[start] == _MSG or data[start] == _HMSG):
            line_end = data.find(b"\r\n", start)
            if line_end < 0:
                break
            fields = data[start:line_end].split(b" ")
            has_headers = data[start] == _HMSG
            try:
                size = int(fields[-1])
                header_size = int(fields[-2]) if has_headers else 0
                has_reply = len(fields) == 5 + has_headers
                subject, number, reply = fields[1], int(fields[2]), fields[3] if has_reply else b""
                if not 0 <= header_size <= size:
                    raise ValueError
            except (ValueError, IndexError):
                raise ProtocolError("nats: malformed MSG") from None
            body = line_end + 2
            if body + size + 2 > end:
                self._awaited_bytes = body + size + 2 - start
                break
            headers = data[body : body + header_size] if has_headers else None
            start = body + size + 2
            payload = data[body + header_size : body + size]
            if not self.nc.deliver(number, subject, reply, payload, headers):
                await self.nc._process_msg(number, subject, reply, payload, headers)  # type: ignore[arg-type]
        self.buf = bytearray(data[start:])
        if self.buf and self.buf[0] not in (_MSG, _HMSG):
            await super().parse()
