"""Whatever anybody sends to any subject of a worker, there is one typed fault, or nothing where nothing is due, and the
next request is served."""

import asyncio
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import Bus, BusConfig, EmbeddedServer, EndpointConfig, Frame
from schemas.fault import FaultCode
from schemas.message import Message
from schemas.protocol import PROTOCOL_VERSION
from schemas.subjects import Subject
from tests.bus.control_plane.waiting import until

FAULT_WITHIN_S = 3.0
"""Of a machine that does much else; it takes milliseconds."""
NUM_EXAMPLES = 60
CODES = {str(code) for code in FaultCode}
VERSION = {"Nixlbus-Protocol": str(PROTOCOL_VERSION)}


class Ask(Message, frozen=True, kw_only=True, tag="hostile.ask"):
    number: int
    text: str = ""
    nested: dict[str, Any] | None = None


class Told(Message, frozen=True, kw_only=True, tag="hostile.told"):
    number: int = 0


class Counted(Frame, frozen=True, kw_only=True, tag="hostile.counted"):
    number: int = 0


VALID = msgpack.packb({"type": "hostile.ask", "number": 7})


class Target:
    """A worker with every kind of endpoint, and clients of it, on an event loop in a thread of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.num_events = 0
        self.logged: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._stop = asyncio.Event()
        opened: Future[None] = Future()
        self._life = asyncio.run_coroutine_threadsafe(self._live(opened), self._loop)
        opened.result(20)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._life.result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()

    def ask(self, subject: str, payload: bytes, headers: "bytes | None" = None) -> list[Msg]:
        """What comes back, to the first last frame; nothing if there is nothing within a moment after a later probe."""
        return asyncio.run_coroutine_threadsafe(self._ask(subject, payload, headers), self._loop).result(20)

    def tell(self, subject: str, payload: bytes, headers: "bytes | None" = None) -> None:
        """Publish without a reply subject, and wait until the worker has seen it."""
        asyncio.run_coroutine_threadsafe(self._tell(subject, payload, headers), self._loop).result(20)

    def sizes(self) -> tuple[int, ...]:
        """What must not grow."""
        return asyncio.run_coroutine_threadsafe(self._sizes(), self._loop).result(20)

    async def _live(self, opened: "Future[None]") -> None:
        async def unary(request: Ask) -> Told:
            return Told(number=request.number)

        async def stream(request: Ask) -> AsyncGenerator[Counted, None]:
            for number in range(3):
                yield Counted(number=number)

        def event(message: Ask) -> None:
            self.num_events += 1

        config = BusConfig(worker_id="target", nats_url=self.url)
        self.client = Client()
        await self.client.connect(self.url)
        async with Bus.open(config, data_plane=False) as self.bus:
            for name, handler, public in (
                ("unary", unary, False),
                ("stream", stream, False),
                ("public", unary, True),
                ("public-stream", stream, True),
            ):
                subject = Subject(f"hostile.{name}", f"hostile.{name}")
                await self.bus.serve(EndpointConfig(name, subject, Ask, queue_group="q", public=public), handler)
            direct = self.bus.subjects.worker("target", "direct")
            await self.bus.serve(EndpointConfig("direct", direct, Ask), unary)
            await self.bus.subscribe(Subject("hostile.event", "hostile.event"), Ask, event)
            await self.bus.announce("hostile", "1.0.0", {})
            opened.set_result(None)
            await self._stop.wait()
            await self.client.close()

    async def _publish(self, subject: str, payload: bytes, reply: str, headers: bytes | None) -> None:
        if headers is None:
            command = f"PUB {subject} {reply} {len(payload)}\r\n".encode() + payload
        else:
            total = len(headers) + len(payload)
            command = f"HPUB {subject} {reply} {len(headers)} {total}\r\n".encode() + headers + payload
        await self.client._send_command(command + b"\r\n")
        await self.client._flush_pending()

    async def _ask(self, subject: str, payload: bytes, headers: bytes | None) -> list[Msg]:
        inbox = self.client.new_inbox()
        replies = await self.client.subscribe(inbox)
        await self._publish(subject, payload, inbox, headers)
        answers: list[Msg] = []
        with contextlib.suppress(Exception):
            while not answers or b"counted" in answers[-1].data:
                answers.append(await replies.next_msg(timeout=FAULT_WITHIN_S))
        await replies.unsubscribe()
        return answers

    async def _tell(self, subject: str, payload: bytes, headers: bytes | None) -> None:
        await self._publish(subject, payload, "", headers)
        await self.client.flush()
        await self.bus._connection.flush(5)
        for _ in range(3):
            await asyncio.sleep(0)

    async def _sizes(self) -> tuple[int, ...]:
        await asyncio.sleep(0.05)
        endpoints = self.bus._endpoints
        return (
            len(asyncio.all_tasks()),
            len(self.bus._inbox._waiters),
            sum(len(endpoint._running) + len(endpoint._waiting) for endpoint in endpoints),
            sum(len(endpoint._by_request_id) for endpoint in endpoints),
            self.bus.stats()["nats_reconnects"],
        )


@pytest.fixture(scope="module")
def target(server: EmbeddedServer) -> Iterator[Target]:
    running = Target(server.url)
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _serves_and_has_not_grown(target: Target) -> Iterator[None]:
    before = target.sizes()
    yield
    for subject in ("hostile.unary", "hostile.public", "nixlbus.v1.worker.target.direct"):
        (reply,) = target.ask(subject, VALID, header(VERSION))
        assert msgpack.unpackb(reply.data) == {"type": "hostile.told", "number": 7}
    assert [len(target.ask(name, VALID, header(VERSION))) for name in ("hostile.stream", "hostile.public-stream")] == [
        4,
        4,
    ]
    until_s = time.monotonic() + FAULT_WITHIN_S  # a stream whose window nobody widens ends when its caller is missed
    while target.sizes() != before and time.monotonic() < until_s:
        time.sleep(0.02)
    assert target.sizes() == before


def header(headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"NATS/1.0\r\n{lines}\r\n".encode()


def fault_of(replies: list[Msg]) -> dict[str, Any]:
    """The one fault that came."""
    assert len(replies) == 1, replies
    (reply,) = replies
    fault: dict[str, Any] = json.loads(reply.data) if reply.data[:1] == b"{" else msgpack.unpackb(reply.data)
    assert fault["type"] == "fault"
    assert fault["code"] in CODES
    assert fault["message"]
    text = f"{fault} {reply.headers}"
    assert "Traceback" not in text
    assert "object at 0x" not in text
    assert "Error(" not in text
    assert len(text) < 4000
    return fault


msgpack_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10) | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
)
maps = st.dictionaries(
    st.sampled_from(["type", "number", "text", "nested", "seq"]) | st.text(max_size=5), msgpack_values
)
typed_maps = maps.map(lambda fields: {**fields, "type": "hostile.ask", "number": "no number"})
payloads = (
    st.binary(max_size=300)
    | msgpack_values.map(msgpack.packb)
    | typed_maps.map(msgpack.packb)
    | st.integers(0, len(VALID) - 1).map(lambda end: VALID[:end])
    | st.binary(min_size=1, max_size=9).map(lambda rest: VALID + rest)
)
DEEP = [
    b"\x91" * 100_000 + b"\xc0",
    b"\x81\xa1a" * 100_000 + b"\xc0",
    b"\x83\xa4type\xabhostile.ask\xa6number\x01\xa6nested\x81\xa1a" + b"\x91" * 100_000 + b"\xc0",
    b"\x83\xa4type\xabhostile.ask\xa6number\x01\xa7unknown" + b"\x91" * 100_000 + b"\xc0",
    b"\xdd\xff\xff\xff\xff",  # an array of 4 billion, says its head
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x82\xa4type\xabhostile.ask\xa6number\xcf\xff\xff\xff\xff\xff\xff\xff\xff" + b"\x00",
    msgpack.packb({"type": "hostile.ask", **{f"k{number}": number for number in range(100_000)}}),
    msgpack.packb({"type": "x" * 1_000_000}),
    msgpack.packb({"type": "hostile.ask", "number": "x" * 1_000_000}),
]
DEEP_JSON = [b'{"a":' + b"[" * 100_000, b'{"a":' * 100_000, b'{"type": "' + b"x" * 1_000_000, b"{" + b" " * 100_000]

ENDPOINTS = [
    "hostile.unary",
    "hostile.stream",
    "hostile.public",
    "hostile.public-stream",
    "nixlbus.v1.worker.target.direct",
]
subjects = st.sampled_from(ENDPOINTS)
quick = settings(max_examples=NUM_EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
long = settings(max_examples=20 * NUM_EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])


def is_answered_with_a_fault(target: Target, subject: str, payload: bytes) -> None:
    replies = target.ask(subject, payload, header(VERSION))
    if any(b"told" in reply.data or b"counted" in reply.data for reply in replies):
        return  # it was a request after all
    fault_of(replies)


@quick
@given(subject=subjects, payload=payloads)
@example(subject="hostile.public", payload=b"")
@example(subject="hostile.stream", payload=b"\xc1")
def test_any_bytes_get_one_typed_fault(target: Target, subject: str, payload: bytes) -> None:
    is_answered_with_a_fault(target, subject, payload)


@pytest.mark.full
@long
@given(subject=subjects, payload=payloads)
def test_any_bytes_get_one_typed_fault_for_long(target: Target, subject: str, payload: bytes) -> None:
    is_answered_with_a_fault(target, subject, payload)


@pytest.mark.parametrize("number", range(len(DEEP)))
@pytest.mark.parametrize("subject", ["hostile.unary", "hostile.stream", "hostile.public"])
def test_depth_and_size_are_no_way_in(target: Target, subject: str, number: int) -> None:
    fault = fault_of(target.ask(subject, DEEP[number], header(VERSION)))
    assert fault["code"] != "internal"


@pytest.mark.parametrize("number", range(len(DEEP_JSON)))
def test_depth_and_size_are_no_way_in_by_json(target: Target, number: int) -> None:
    fault = fault_of(target.ask("hostile.public", DEEP_JSON[number]))
    assert fault["code"] != "internal"


header_names = st.sampled_from(
    [
        "Nixlbus-Protocol",
        "Nixlbus-Ttl-Ms",
        "Nixlbus-Request-Id",
        "Nixlbus-Window",
        "Nixlbus-Avoid",
        "Nixlbus-Probe",
        "traceparent",
        "tracestate",
        "baggage",
        "Status",
        "Nats-Expected-Stream",
        "nixlbus-ttl-ms",
    ]
)
header_values = st.sampled_from(
    [
        *("", "0", "-1", "1", "2", "1e9", "9" * 400, "٣", "²", "NaN", "target", "target,target", ",", "a.b>*"),
        *("00-x-y-z", "00-" + "1" * 32 + "-" + "2" * 16 + "-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-ff"),
    ]
) | st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=40)
header_blocks = (
    st.dictionaries(header_names, header_values, max_size=8).map(header)
    | st.dictionaries(header_names, header_values, max_size=4).map(lambda some: header({**some, **VERSION}))
    | st.binary(max_size=200).map(lambda garbage: b"NATS/1.0\r\n" + garbage + b"\r\n\r\n")
    | st.binary(max_size=60).map(lambda garbage: b"NATS/1.0" + garbage.replace(b"\n", b"") + b"\r\n\r\n")
)


def is_answered_once(target: Target, subject: str, block: bytes) -> None:
    replies = target.ask(subject, VALID, block)
    if replies and (b"told" in replies[-1].data or b"stream.end" in replies[-1].data):
        return
    if any(b"counted" in reply.data for reply in replies):  # a window that nobody widens, or no time left: ended below
        return
    fault_of(replies)


@quick
@given(subject=subjects, block=header_blocks)
@example(subject="hostile.unary", block=header({**VERSION, "Nixlbus-Ttl-Ms": "0"}))
@example(subject="hostile.unary", block=header({**VERSION, "Nixlbus-Avoid": "target"}))
@example(subject="hostile.unary", block=header({**VERSION, "Nixlbus-Avoid": "x," * 30_000}))
@example(subject="hostile.unary", block=header({"Nixlbus-Protocol": "99"}))
@example(subject="hostile.stream", block=header({**VERSION, "Nixlbus-Window": "9" * 5000}))
@example(subject="hostile.unary", block=header({**VERSION, **{f"X-{number}": "y" for number in range(20_000)}}))
def test_any_headers_get_one_answer(target: Target, subject: str, block: bytes) -> None:
    is_answered_once(target, subject, block)


@pytest.mark.full
@long
@given(subject=subjects, block=header_blocks)
def test_any_headers_get_one_answer_for_long(target: Target, subject: str, block: bytes) -> None:
    is_answered_once(target, subject, block)


@quick
@given(payload=payloads, block=st.none() | header_blocks)
def test_what_asks_for_no_answer_gets_none_and_breaks_nothing(
    target: Target, payload: bytes, block: bytes | None
) -> None:
    inbox = target.bus._inbox._prefix
    for subject in (
        "hostile.event",
        "hostile.unary",
        "hostile.stream",
        "nixlbus.v1.cancel.f00",
        f"nixlbus.v1.cancel.{'x' * 300}",
        f"{inbox}.1",
        f"{inbox}.ffff",
        "$SRV.PING",
        "$SRV.INFO.hostile",
    ):
        target.tell(subject, payload, block)


def test_an_event_that_is_none_is_dropped_and_the_next_one_taken(target: Target) -> None:
    before = target.num_events
    for payload in (b"", b"\xc1", b"{}", msgpack.packb({"type": "other"})):
        target.tell("hostile.event", payload)
    target.tell("hostile.event", VALID)
    for _ in range(100):
        if target.num_events > before:
            break
        target.tell("hostile.nothing", b"")
    assert target.num_events == before + 1


@quick
@given(payload=payloads, block=st.none() | header_blocks)
def test_discovery_answers_anybody(target: Target, payload: bytes, block: bytes | None) -> None:
    for verb in ("PING", "INFO", "STATS"):
        (reply,) = target.ask(f"$SRV.{verb}.hostile.target", payload, block)
        assert json.loads(reply.data)["id"] == "target"


@pytest.mark.parametrize(
    "reply", ["hostile.unary", "hostile.stream", "hostile.event", "$SRV.PING", "nixlbus.v1.cancel.x"]
)
def test_a_worker_that_is_made_to_answer_itself_does_not_go_round_in_circles(target: Target, reply: str) -> None:
    async def ask_for_it() -> int:
        for subject, payload in itertools.product(["hostile.unary", "hostile.stream", "$SRV.INFO"], [VALID, b"\xc1"]):
            await target._publish(subject, payload, reply, header(VERSION))
        await target.client.flush()
        await asyncio.sleep(0.1)
        before = target.bus.stats()["nats_in_msgs"]
        await asyncio.sleep(0.1)
        return target.bus.stats()["nats_in_msgs"] - before

    assert asyncio.run_coroutine_threadsafe(ask_for_it(), target._loop).result(10) == 0


def test_nonsense_by_the_thousand_leaves_nothing(target: Target) -> None:
    """Growth would show in what the fixture counts; each has an id, so that each is entered somewhere."""

    async def flood() -> None:
        for number in range(3000):
            block = header({**VERSION, "Nixlbus-Request-Id": f"{number:x}", "Nixlbus-Window": "1"})
            payload = VALID if number % 2 else os.urandom(20)
            await target._publish(ENDPOINTS[number % len(ENDPOINTS)], payload, f"nobody.{number}", block)
            if number % 50 == 0:
                await target.client.flush()
        for number in range(3000):
            await target._publish(f"nixlbus.v1.cancel.{number:x}", b"", "", None)
        await target.client.flush()
        await until(lambda: not any(each._running or each._waiting for each in target.bus._endpoints), 10)

    asyncio.run_coroutine_threadsafe(flood(), target._loop).result(20)
