"""A stream in good order: its window, its numbers, its end, and what happens when either side stops."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import msgpack
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import Bus, DeadlineExceeded, EndpointConfig, Frame, LastFrame, RemoteFault, RemoteProtocolError, RetryPolicy
from bus.control_plane import inbox
from schemas.message import Message
from schemas.subjects import Subject
from tests.bus.control_plane.waiting import SOON_S, until

LONG_S = 30.0


class Ask(Message, frozen=True, kw_only=True, tag="streams.ask"):
    number: int = 0


class Counted(Frame, frozen=True, kw_only=True, tag="streams.counted"):
    number: int = 0


class Summed(LastFrame, frozen=True, kw_only=True, tag="streams.summed"):
    total: int = 0


def subject(name: str) -> Subject:
    return Subject(f"streams.{name}", f"streams.{name}")


class Producer:
    """Counts up, and knows how far it got."""

    def __init__(self) -> None:
        self.num_made = 0
        self.num_sent = 0
        self.ended = asyncio.Event()

    def handler(self) -> Callable[[Ask], AsyncGenerator[Counted, None]]:
        async def count(request: Ask) -> AsyncGenerator[Counted, None]:
            try:
                for number in range(request.number):
                    self.num_made = number + 1
                    yield Counted(number=number)
                    self.num_sent = number + 1
            finally:
                self.ended.set()

        return count


async def serve(bus: Bus, name: str, handler: object, **fields: object) -> None:
    await bus.serve(EndpointConfig(name, subject(name), Ask, **fields), handler)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 16, 256])
async def test_a_slow_reader_holds_up_the_sender(bus: Bus, caller: Bus, window: int) -> None:
    producer = Producer()
    await serve(bus, f"slow{window}", producer.handler())
    stream = caller.stream(subject(f"slow{window}"), Ask(number=800), Counted, timeout_s=LONG_S, window_frames=window)
    num_read, furthest = 0, 0
    async with aclosing(stream) as frames:
        async for _ in frames:
            num_read += 1
            if num_read in (1, 2, 7, 100):
                await asyncio.sleep(0.05)
                assert producer.num_sent - num_read < window + 1
                furthest = max(furthest, producer.num_sent - num_read)
    assert num_read == 800
    if window > 1:
        assert furthest > 0  # it does run ahead, within its window


async def test_a_fast_reader_is_not_slowed_down_by_orders(bus: Bus, caller: Bus) -> None:
    await serve(bus, "fast", Producer().handler())

    async def seconds(window: int) -> float:
        started_s = time.perf_counter()
        stream = caller.stream(subject("fast"), Ask(number=4000), Counted, timeout_s=LONG_S, window_frames=window)
        assert [frame.number async for frame in stream] == list(range(4000))
        return time.perf_counter() - started_s

    without, with_window = [], []
    for _ in range(3):
        without.append(await seconds(0))
        with_window.append(await seconds(256))
    assert min(with_window) < 4 * min(without)


async def test_a_plain_client_that_asks_for_no_window_gets_everything(bus: Bus, raw: Client) -> None:
    await serve(bus, "plain", Producer().handler(), public=True)
    frames: list[dict[str, object]] = []
    replies: list[str] = []
    over = asyncio.Event()

    async def take(message: Msg) -> None:
        frames.append(msgpack.unpackb(message.data))
        replies.append(message.reply)
        if frames[-1]["type"] == "stream.end":
            over.set()

    own = raw.new_inbox()
    await raw.subscribe(own, cb=take)
    await raw.publish("streams.plain", msgpack.packb({"type": "streams.ask", "number": 1000}), reply=own)
    await asyncio.wait_for(over.wait(), 10)
    assert [frame["seq"] for frame in frames] == list(range(1001))
    assert set(replies) == {""}


async def test_a_stream_ends_with_its_own_last_frame_or_with_the_endpoint_s(bus: Bus, caller: Bus) -> None:
    async def sums(request: Ask) -> AsyncGenerator[Counted | Summed, None]:
        for number in range(request.number):
            yield Counted(number=number)
        yield Summed(total=sum(range(request.number)))

    await serve(bus, "sums", sums)
    await serve(bus, "counts", Producer().handler())
    last = [f async for f in caller.stream(subject("sums"), Ask(number=5), Counted | Summed, timeout_s=5)][-1]
    assert (last.total, last.seq) == (10, 5)
    for number in (0, 1, 2):
        stream = caller.stream(subject("counts"), Ask(number=number), Counted, timeout_s=5)
        assert [frame.seq async for frame in stream] == list(range(number))
    assert len(caller._inbox._waiters) == len(bus._inbox._waiters) == 0


async def test_a_fault_midway_comes_after_the_frames_and_is_not_retried(bus: Bus, caller: Bus) -> None:
    num_calls = 0

    async def breaks(request: Ask) -> AsyncGenerator[Counted, None]:
        nonlocal num_calls
        num_calls += 1
        yield Counted(number=1)
        yield Counted(number=2)
        raise ConnectionError("secret")

    await serve(bus, "breaks", breaks)
    harmless = RetryPolicy(attempts=5, idempotent=True)
    frames = caller.stream(subject("breaks"), Ask(), Counted, timeout_s=5, retry=harmless)
    assert [(await anext(frames)).number, (await anext(frames)).number] == [1, 2]
    with pytest.raises(RemoteFault) as caught:
        await anext(frames)
    assert (num_calls, caught.value.fault.code, caught.value.fault.seq) == (1, "internal", 2)
    assert "secret" not in str(caught.value)


@pytest.fixture
async def scripted(raw: Client) -> Callable[[str, list[dict[str, object]]], Awaitable[None]]:
    """A sender that is not ours, and sends what it is told."""

    async def serve_script(name: str, script: list[dict[str, object]]) -> None:
        async def play(message: Msg) -> None:
            for frame in script:
                await raw.publish(message.reply, msgpack.packb(frame))

        await raw.subscribe(f"streams.{name}", cb=play)
        await raw.flush()
        await raw.flush()

    return serve_script


def counted(seq: int) -> dict[str, object]:
    return {"type": "streams.counted", "seq": seq, "number": seq}


async def test_a_frame_that_comes_twice_is_yielded_once(caller: Bus, scripted: Callable[..., Awaitable[None]]) -> None:
    script = [counted(0), counted(0), counted(1), counted(0), counted(1), counted(2), {"type": "stream.end", "seq": 3}]
    await scripted("twice", script)
    stream = caller.stream(subject("twice"), Ask(), Counted, timeout_s=5)
    assert [frame.seq async for frame in stream] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("gap", [counted(0), counted(2)]),
        ("late-end", [counted(0), {"type": "stream.end", "seq": 2}]),
        ("unnumbered", [{"type": "streams.counted"}]),
        ("negative", [counted(-5)]),
        ("foreign", [counted(0), {"type": "nonsense"}]),
        ("no-map", [counted(0), 7]),
    ],
)
async def test_a_sender_that_breaks_the_order_is_told_on_and_stopped(
    caller: Bus, raw: Client, scripted: Callable[..., Awaitable[None]], name: str, script: list[object]
) -> None:
    cancelled = asyncio.Event()

    async def hear(message: Msg) -> None:
        cancelled.set()

    await raw.subscribe(caller.subjects.cancellations().name, cb=hear)
    await scripted(name, script)
    with pytest.raises(RemoteProtocolError):
        _ = [f async for f in caller.stream(subject(name), Ask(), Counted, timeout_s=5)]
    await asyncio.wait_for(cancelled.wait(), SOON_S)
    assert caller.stats()["requests_in_flight"] == 0


async def test_a_reader_s_deadline_ends_stream_and_sender(bus: Bus, caller: Bus) -> None:
    ended = asyncio.Event()

    async def stalls(request: Ask) -> AsyncGenerator[Counted, None]:
        try:
            yield Counted()
            await asyncio.sleep(LONG_S)
        finally:
            ended.set()

    await serve(bus, "stalls", stalls)
    with pytest.raises((DeadlineExceeded, RemoteFault)):
        _ = [f async for f in caller.stream(subject("stalls"), Ask(), Counted, timeout_s=0.3)]
    await asyncio.wait_for(ended.wait(), SOON_S)


async def test_a_sender_that_waits_for_its_window_ends_at_its_deadline(bus: Bus, caller: Bus) -> None:
    producer = Producer()
    await serve(bus, "stuck", producer.handler())
    stream = caller.stream(subject("stuck"), Ask(number=100), Counted, timeout_s=0.5, window_frames=4)
    async with aclosing(stream) as frames:
        assert (await anext(frames)).seq == 0
        await asyncio.wait_for(producer.ended.wait(), SOON_S)  # nobody reads, and nobody closes
        assert producer.num_sent < 6
    assert not bus._inbox._waiters


async def test_credit_that_nobody_gave_is_not_believed(bus: Bus, raw: Client) -> None:
    producer = Producer()
    await serve(bus, "forged", producer.handler())
    own = raw.new_inbox()
    replies = await raw.subscribe(own)
    headers = {"Nixlbus-Protocol": "2", "Nixlbus-Request-Id": "f00d", "Nixlbus-Window": "2"}
    payload = msgpack.packb({"type": "streams.ask", "number": 50})
    await raw.publish("streams.forged", payload, reply=own, headers=headers)
    first = await replies.next_msg(timeout=SOON_S)
    await replies.next_msg(timeout=SOON_S)
    assert first.reply
    for nonsense in (b"", b"-1", b"1e9", b"x" * 100_000, b"9" * 5000, "²".encode(), b"\xff\xfe", b" 7"):
        await raw.publish(first.reply, nonsense)
    await raw.flush()
    await asyncio.sleep(0.1)
    assert producer.num_sent == 2
    await raw.publish(first.reply, b"4")
    await replies.next_msg(timeout=SOON_S)
    await raw.publish(bus.subjects.cancel("f00d").name, b"")
    await asyncio.wait_for(producer.ended.wait(), SOON_S)


async def read_after(event: asyncio.Event, frames: AsyncGenerator[Counted, None]) -> None:
    async for _ in frames:
        await asyncio.wait_for(event.wait(), 10)


async def test_replies_that_nobody_reads_end_the_stream_and_not_the_memory(
    bus: Bus, caller: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "MAX_UNREAD_REPLIES", 50)
    producer = Producer()
    await serve(bus, "flood", producer.handler())
    async with aclosing(
        caller.stream(subject("flood"), Ask(number=3000), Counted, timeout_s=LONG_S, window_frames=0)
    ) as frames:
        with pytest.raises(RemoteProtocolError, match="faster than they were read"):
            await read_after(producer.ended, frames)


async def test_a_middleware_that_takes_its_time_leaves_nothing_of_a_stream(bus: Bus, caller: Bus) -> None:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def slow(context: object) -> AsyncIterator[None]:
        await asyncio.sleep(1.6)  # longer than until the caller is looked for
        yield

    await serve(bus, "slow-middleware", Producer().handler(), middleware=(slow,))
    stream = caller.stream(subject("slow-middleware"), Ask(number=3), Counted, timeout_s=LONG_S)
    assert len([frame async for frame in stream]) == 3
    await until(lambda: not bus._inbox._waiters)


async def test_frames_that_overtake_others_are_put_in_order(caller: Bus, raw: Client) -> None:
    async def answer(message: Msg) -> None:
        for seq in (0, 3, 1, 2, 5, 4):
            await raw.publish(message.reply, msgpack.packb({"type": "streams.counted", "seq": seq, "number": seq}))
        await raw.publish(message.reply, msgpack.packb({"type": "stream.end", "seq": 6}))

    await raw.subscribe("streams.overtaken", cb=answer)
    await raw.flush()
    await raw.flush()
    frames = caller.stream(subject("overtaken"), Ask(), Counted, timeout_s=LONG_S)
    assert [frame.number async for frame in frames] == [0, 1, 2, 3, 4, 5]


async def test_a_stream_that_passes_on_another_is_numbered_anew(bus: Bus, caller: Bus) -> None:
    async def odd(request: Ask) -> AsyncGenerator[Counted, None]:
        async with aclosing(bus.stream(subject("source"), request, Counted, timeout_s=LONG_S)) as frames:
            async for frame in frames:
                if frame.number % 2:
                    yield frame

    await serve(bus, "source", Producer().handler())
    await serve(bus, "odd", odd)
    frames = [frame async for frame in caller.stream(subject("odd"), Ask(number=9), Counted, timeout_s=LONG_S)]
    assert [(frame.seq, frame.number) for frame in frames] == [(0, 1), (1, 3), (2, 5), (3, 7)]


async def test_frames_without_numbers_are_a_protocol_error(bus: Bus, caller: Bus) -> None:
    async def plain(request: Ask) -> AsyncGenerator[Ask, None]:
        yield Ask()

    await serve(bus, "plain", plain)
    with pytest.raises(RemoteProtocolError, match="without a number"):
        _ = [frame async for frame in caller.stream(subject("plain"), Ask(), Ask, timeout_s=LONG_S)]


async def test_unread_frames_are_bounded_in_bytes(caller: Bus, raw: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "MAX_UNREAD_BYTES", 1 << 20)
    frame = msgpack.packb({"type": "streams.counted", "seq": 0, "number": 1, "padding": b"x" * (300 << 10)})

    async def flood(message: Msg) -> None:
        for _ in range(8):
            await raw.publish(message.reply, frame)

    await raw.subscribe("streams.flood", cb=flood)
    await raw.flush()
    await raw.flush()
    async with aclosing(caller.stream(subject("flood"), Ask(), Counted, timeout_s=LONG_S)) as frames:
        assert (await anext(frames)).number == 1
        await asyncio.sleep(0.5)
        with pytest.raises(RemoteProtocolError, match="faster than they were read"):
            await anext(frames)
