"""The parser alone, against nats-py's own: the same messages from the same bytes, however these are cut."""

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from bus.control_plane.direct_parser import DirectParser


class Recorder:
    """Stands where the client stands, and writes down what it is told."""

    def __init__(self, numbers_of_ours: set[int]) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.ours = numbers_of_ours

    def deliver(self, number: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> bool:
        if number not in self.ours:
            return False
        self.told.append(("message", number, subject, reply, data, headers))
        return True

    async def _process_msg(self, number: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.told.append(("message", number, subject, reply, data, headers))

    async def _process_ping(self) -> None:
        self.told.append(("ping",))

    async def _process_pong(self) -> None:
        self.told.append(("pong",))

    async def _process_err(self, text: str) -> None:
        self.told.append(("err", text))

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.told.append(("info", info))


SUBJECTS = st.sampled_from([b"a", b"nixlbus.v1.graph.vlm.decode", b"_INBOX.w.12.ab"])
PAYLOADS = st.binary(max_size=60) | st.just(b"MSG a 1 3\r\nabc\r\n") | st.just(b"\r\n") | st.just(b"PING\r\n" * 3)


@st.composite
def commands(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["msg", "msg", "hmsg", "hmsg", "ping", "pong", "ok", "err", "info"]))
    subject, number = draw(SUBJECTS), draw(st.integers(1, 4))
    reply = draw(st.sampled_from([b"", b"_INBOX.x.1 "]))
    payload = draw(PAYLOADS)
    if kind == "msg":
        return b"MSG %b %d %b%d\r\n%b\r\n" % (subject, number, reply, len(payload), payload)
    if kind == "hmsg":
        block = b"NATS/1.0\r\nA: %b\r\n\r\n" % draw(st.sampled_from([b"1", b"MSG", b""]))
        size = len(block) + len(payload)
        return b"HMSG %b %d %b%d %d\r\n%b%b\r\n" % (subject, number, reply, len(block), size, block, payload)
    others = {"ping": b"PING\r\n", "pong": b"PONG\r\n", "ok": b"+OK\r\n", "err": b"-ERR 'Some Error'\r\n"}
    return others.get(kind, b'INFO {"max_payload": 8}\r\n')


@given(wire=st.lists(commands(), max_size=12).map(b"".join), cuts=st.lists(st.integers(0, 900), max_size=30))
def test_the_same_messages_come_from_the_same_bytes_however_they_are_cut(wire: bytes, cuts: list[int]) -> None:
    whole = Recorder(set())
    asyncio.run(Parser(whole).parse(wire))
    cut = Recorder({1, 2})
    parser = DirectParser(cut)

    async def feed() -> None:
        edges = [0, *sorted(at for at in cuts if at < len(wire)), len(wire)]
        for start, end in itertools.pairwise(edges):
            await parser.parse(wire[start:end])

    asyncio.run(feed())
    assert cut.told == whole.told
    assert not parser.buf


@pytest.mark.parametrize("line", [b"MSG a\r\n", b"MSG a x 3\r\nabc\r\n", b"HMSG a 1 x 3\r\n\r\n", b"MSG a 1 -3\r\n"])
def test_a_malformed_message_is_a_protocol_error(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        asyncio.run(DirectParser(Recorder({1})).parse(line))


def test_a_large_message_is_not_looked_at_again_for_every_piece_of_it() -> None:
    recorder = Recorder({1})
    parser = DirectParser(recorder)

    async def feed() -> None:
        await parser.parse(b"MSG a 1 4000000\r\n")
        for _ in range(1000):
            buffer = parser.buf
            await parser.parse(b"x" * 4000)
            assert parser.buf is buffer  # it was extended, and not copied
        await parser.parse(b"\r\n")

    asyncio.run(feed())
    assert len(recorder.told[0][4]) == 4_000_000
