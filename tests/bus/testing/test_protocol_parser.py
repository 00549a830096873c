"""The parser is pure: bytes in, pieces out; whatever the bytes are and however they are cut."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from bus.testing import protocol_parser
from bus.testing.protocol_parser import MAX_LINE_BYTES, Passage, Piece, ProtocolParser, Publication, Side

TOKENS = st.text("abcXYZ09_-$", min_size=1, max_size=8)
SUBJECTS = st.lists(TOKENS, min_size=1, max_size=4).map(".".join)
PAYLOADS = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"\r\n", b"PUB a 3\r\nabc\r\n", b"INFO {}\r\n", b"\n\n\n", b"HPUB", b"x" * 5000]),
)
BLANKS = st.sampled_from([b" ", b"\t", b"  ", b" \t "])


@st.composite
def publications(draw: st.DrawFn) -> tuple[str, bytes]:
    subject, payload, blank = draw(SUBJECTS), draw(PAYLOADS), draw(BLANKS)
    reply = [draw(SUBJECTS).encode()] if draw(st.booleans()) else []
    if draw(st.booleans()):
        headers = b"NATS/1.0\r\nA: " + draw(TOKENS).encode() + b"\r\n\r\n"
        words = [b"HPUB", subject.encode(), *reply, b"%d" % len(headers), b"%d" % (len(headers) + len(payload))]
        payload = headers + payload
    else:
        words = [b"PUB", subject.encode(), *reply, b"%d" % len(payload)]
    words[0] = draw(st.sampled_from([words[0], words[0].lower(), words[0].title()]))
    return subject, blank.join(words) + b"\r\n" + payload + b"\r\n"


OTHER_COMMANDS = st.sampled_from(
    [
        b'CONNECT {"verbose":false,"name":"PUB a 3"}\r\n',
        b"PING\r\n",
        b"PONG\r\n",
        b"SUB a.> group 1\r\n",
        b"UNSUB 1 5\r\n",
        b"\r\n",
        b"FUTURE command 12\r\n",
        b"PUB a notanumber\r\n",
        b"PUB 3\r\n",
        b"PUB\n",
    ]
)


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted({index % (len(stream) + 1) for index in at}), len(stream)]
    return [stream[begin:end] for begin, end in itertools.pairwise(edges)]


def parse(chunks: list[bytes], side: Side = Side.CLIENT) -> tuple[list[Piece], bytes]:
    parser = ProtocolParser(side)
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)]
    return pieces, parser.rest()


CUTS = st.lists(st.integers(0, 1 << 20), max_size=12)


@given(st.lists(st.one_of(publications(), OTHER_COMMANDS.map(lambda raw: ("", raw))), max_size=8), CUTS)
def test_any_cutting_gives_the_same_messages(commands: list[tuple[str, bytes]], at: list[int]) -> None:
    stream = b"".join(raw for _, raw in commands)
    pieces, rest = parse(cut(stream, at))
    assert rest == b""
    assert [(getattr(piece, "subject", ""), piece.raw) for piece in pieces] == commands
    assert all(isinstance(piece, Publication) or piece.ends_command for piece in pieces)


@given(st.binary(max_size=400), CUTS, st.sampled_from(Side))
def test_whatever_comes_goes_on_unchanged(stream: bytes, at: list[int], side: Side) -> None:
    pieces, rest = parse(cut(stream, at), side)
    assert b"".join(piece.raw for piece in pieces) + rest == stream


@given(st.lists(st.one_of(publications().map(lambda command: command[1]), st.binary(max_size=40)), max_size=8), CUTS)
def test_nothing_is_lost_among_garbage(parts: list[bytes], at: list[int]) -> None:
    stream = b"".join(parts)
    pieces, rest = parse(cut(stream, at))
    assert b"".join(piece.raw for piece in pieces) + rest == stream
    assert [piece.raw for piece in pieces] == [piece.raw for piece in parse([stream])[0]]


@given(st.binary(max_size=300), CUTS)
def test_a_server_s_payload_is_never_taken_for_a_line(payload: bytes, at: list[int]) -> None:
    payload = b'INFO {"connect_urls":[]}\r\n' + payload
    line = b"HMSG a.b 1 12 %d\r\n" % len(payload)
    info = b'INFO {"server_id":"x"}\r\n'
    pieces, rest = parse(cut(line + payload + b"\r\n" + info, at), Side.SERVER)
    assert rest == b""
    assert [piece.raw for piece in pieces if isinstance(piece, Passage) and piece.is_line] == [line, info]
    assert b"".join(piece.raw for piece in pieces) == line + payload + b"\r\n" + info


def test_a_server_s_payload_goes_on_before_it_is_whole() -> None:
    parser = ProtocolParser(Side.SERVER)
    pieces = parser.feed(b"MSG a 1 10\r\nabc")
    assert pieces == [
        Passage(b"MSG a 1 10\r\n", ends_command=False),
        Passage(b"abc", is_line=False, ends_command=False),
    ]


def test_a_message_over_the_limit_of_nats_is_passed_on_and_not_kept() -> None:
    num_bytes = protocol_parser.MAX_WHOLE_BYTES
    line = b"PUB a %d\r\n" % num_bytes
    pieces, rest = parse([line, b"x" * 100])
    assert pieces == [Passage(line, ends_command=False), Passage(b"x" * 100, is_line=False, ends_command=False)]
    assert rest == b""


def test_a_line_that_never_ends_is_passed_on_and_not_kept() -> None:
    parser = ProtocolParser(Side.CLIENT)
    for _ in range(5):
        parser.feed(b"x" * MAX_LINE_BYTES)
    assert len(parser.rest()) <= MAX_LINE_BYTES
    pieces, _ = parse([b"x" * (MAX_LINE_BYTES + 1), b"PUB a 1\r\n", b"PUB a 1\r\nz\r\n"])
    assert pieces == [
        Passage(b"x" * (MAX_LINE_BYTES + 1), is_line=False, ends_command=False),
        Passage(b"PUB a 1\r\n", is_line=False),
        Publication("a", b"PUB a 1\r\nz\r\n"),
    ]
