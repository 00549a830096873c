"""The NATS client protocol, cut where messages begin and end, and not changed.

In: the bytes of one direction of one connection, in pieces of any length. Out: the same bytes, as `Publication`s (one
message with its subject) and as `Passage`s (everything else).
Invariants: what comes out, put together, is what went in, whatever it was; at most `MAX_WHOLE_BYTES` are kept back, and
`rest` hands those out; any cutting of the input gives the same publications.
Leaves out: I/O, and the meaning of any command but the length of those that carry a payload.
Source: https://docs.nats.io/reference/reference-protocols/nats-protocol; nats-server's parser.go, which takes tabs as
spaces, commands in any case, and a bare line feed as the end of a line.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

MAX_LINE_BYTES = 1 << 20
"""nats-server's max_control_line is 4 KiB by default; a CONNECT with a long token or a large INFO may be longer."""
MAX_WHOLE_BYTES = 64 << 20
"""nats-server's upper limit for max_payload."""
_LINE_END = b"\n"
_PAYLOAD_END_BYTES = len(b"\r\n")


class Side(Enum):
    """Who sends what is parsed: the commands of theirs that carry a payload, whose last argument is its length."""

    CLIENT = (b"PUB", b"HPUB")
    SERVER = (b"MSG", b"HMSG")


@dataclass(frozen=True, slots=True)
class Publication:
    """A client's whole message: `raw` is its command, payload and all."""

    subject: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class Passage:
    """Anything else: one line, or where `is_line` is false a part of a payload or of a line over `MAX_LINE_BYTES`.

    `ends_command`: the next byte begins a command, so a message may be put in before it.
    """

    raw: bytes
    is_line: bool = True
    ends_command: bool = True


Piece = Publication | Passage


class ProtocolParser:
    """One direction of one connection. A server's payloads are passed on as they come, a client's are kept whole."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._pending = bytearray()
        self._scanned_bytes = 0
        """Of the pending ones, those that are known to hold no end of a line."""
        self._subject = ""
        self._whole_bytes = 0
        """Length of the publication that is pending; 0 when a command is due."""
        self._passing_bytes = 0
        """What is left of a payload that is passed on as it comes."""
        self._in_long_line = False

    def feed(self, received: bytes) -> list[Piece]:
        """What `received` completes, in order; to be written in this order."""
        self._pending += received
        return list(self._pieces())

    def rest(self) -> bytes:
        """What is kept back for a message that isn't whole; the end of the input."""
        kept, self._pending = bytes(self._pending), bytearray()
        self._scanned_bytes = self._whole_bytes = 0
        return kept

    def _pieces(self) -> Iterator[Piece]:
        while self._pending:
            if self._passing_bytes:
                raw = self._take(min(self._passing_bytes, len(self._pending)))
                self._passing_bytes -= len(raw)
                yield Passage(raw, is_line=False, ends_command=not self._passing_bytes)
            elif self._whole_bytes:
                if len(self._pending) < self._whole_bytes:
                    return
                yield Publication(self._subject, self._take(self._whole_bytes))
                self._whole_bytes = 0
            else:
                end = self._pending.find(_LINE_END, self._scanned_bytes) + 1
                if not end and len(self._pending) <= MAX_LINE_BYTES:
                    self._scanned_bytes = len(self._pending)
                    return
                yield from self._line(end)

    def _line(self, end: int) -> Iterator[Piece]:
        if not end or self._in_long_line:
            self._in_long_line = not end
            yield Passage(self._take(end or len(self._pending)), is_line=False, ends_command=bool(end))
            return
        subject, payload_bytes = self._command(bytes(self._pending[:end]))
        whole_bytes = end + payload_bytes + _PAYLOAD_END_BYTES
        if payload_bytes < 0:
            yield Passage(self._take(end))
        elif self._side is Side.SERVER or whole_bytes > MAX_WHOLE_BYTES:
            self._passing_bytes = payload_bytes + _PAYLOAD_END_BYTES
            yield Passage(self._take(end), ends_command=False)
        else:
            self._subject, self._whole_bytes = subject, whole_bytes

    def _command(self, line: bytes) -> tuple[str, int]:
        """The subject and the number of payload bytes that a line announces; -1 if it announces none."""
        words = line.split()
        if len(words) < 3 or words[0].upper() not in self._side.value or not words[-1].isdigit():
            return "", -1
        return words[1].decode("utf-8", "surrogateescape"), int(words[-1])

    def _take(self, num_bytes: int) -> bytes:
        taken = bytes(self._pending[:num_bytes])
        del self._pending[:num_bytes]
        self._scanned_bytes = 0
        return taken
