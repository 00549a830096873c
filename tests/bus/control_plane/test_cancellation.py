"""Work ends with whoever wanted it, however the caller goes: cancelled, closed, late, killed."""

import asyncio
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgpack
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import Bus, BusConfig, DeadlineExceeded, EmbeddedServer, EndpointConfig, Frame, PeerLost, RemoteFault
from bus.control_plane.endpoint import PROBE_INTERVAL_S, Endpoint
from schemas.message import Message
from schemas.subjects import Subject
from tests.bus.control_plane.waiting import SOON_S, until

LONG_S = 30.0


class Ask(Message, frozen=True, kw_only=True, tag="cancellation.ask"):
    text: str = ""


class Told(Message, frozen=True, kw_only=True, tag="cancellation.told"):
    text: str = ""


class Counted(Frame, frozen=True, kw_only=True, tag="cancellation.counted"):
    number: int = 0


class Held:
    """A handler that is held, and tells of its beginning and its end."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.release = asyncio.Event()
        self.num_begun = 0

    async def __call__(self, request: Ask) -> Told:
        self.num_begun += 1
        self.begun.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.ended.set()
            raise
        return Told(text=request.text)


def subject(name: str) -> Subject:
    return Subject(f"cancellation.{name}", f"cancellation.{name}")


async def serve(bus: Bus, name: str, handler: object, **fields: object) -> Endpoint:
    config = EndpointConfig(name, subject(name), Ask, **fields)  # type: ignore[arg-type]
    await bus.serve(config, handler)  # type: ignore[arg-type]
    return bus._endpoints[-1]


async def cancelled(task: "asyncio.Task[object]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_request_ends_its_handler_and_leaves_nothing(bus: Bus, caller: Bus) -> None:
    held = Held()
    endpoint = await serve(bus, "held", held, concurrency=1)
    request = asyncio.create_task(caller.request(subject("held"), Ask(), Told, timeout_s=LONG_S))
    await asyncio.wait_for(held.begun.wait(), SOON_S)
    await cancelled(request)
    await asyncio.wait_for(held.ended.wait(), SOON_S)
    await until(lambda: endpoint.stats.num_active == 0)
    assert endpoint.stats.num_cancelled == 1
    assert not endpoint._by_request_id
    assert len(caller._inbox._waiters) == len(bus._inbox._waiters) == 0
    held.release.set()
    assert await caller.request(subject("held"), Ask(text="next"), Told, timeout_s=5) == Told(text="next")


async def test_a_cancellation_travels_down_three_hops(bus: Bus, caller: Bus, server: EmbeddedServer) -> None:
    last = Held()
    ended: list[str] = []

    def hop(of: Bus, name: str, onward: str) -> Callable[[Ask], object]:
        async def handler(request: Ask) -> Told:
            try:
                return await of.request(subject(onward), request, Told, timeout_s=LONG_S)
            except asyncio.CancelledError:
                ended.append(name)
                raise

        return handler

    async with Bus.open(BusConfig(worker_id="second", nats_url=server.url), data_plane=False) as second:
        endpoints = [
            await serve(bus, "first", hop(bus, "first", "second")),
            await serve(second, "second", hop(second, "second", "third")),
            await serve(bus, "third", last),
        ]
        request = asyncio.create_task(caller.request(subject("first"), Ask(), Told, timeout_s=LONG_S))
        await asyncio.wait_for(last.begun.wait(), SOON_S)
        await cancelled(request)
        await asyncio.wait_for(last.ended.wait(), SOON_S)
        await until(lambda: all(endpoint.stats.num_active == 0 for endpoint in endpoints))
        assert ended == ["first", "second"]
        assert [endpoint.stats.num_cancelled for endpoint in endpoints] == [1, 1, 1]
        assert [each.stats()["requests_in_flight"] for each in (caller, bus, second)] == [0, 0, 0]


async def test_the_timeout_of_a_caller_s_own_cancels_the_work(bus: Bus, caller: Bus) -> None:
    held = Held()
    await serve(bus, "timed", held)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await caller.request(subject("timed"), Ask(), Told, timeout_s=LONG_S)
    await asyncio.wait_for(held.ended.wait(), SOON_S)


async def test_a_stream_that_is_closed_early_ends_its_handler(bus: Bus, caller: Bus, raw: Client) -> None:
    ended, told = asyncio.Event(), asyncio.Event()

    async def hear(message: Msg) -> None:
        told.set()

    await raw.subscribe(caller.subjects.cancellations().name, cb=hear)
    await raw.flush()

    async def count(request: Ask) -> AsyncGenerator[Counted, None]:
        try:
            for number in range(1_000_000):
                yield Counted(number=number)
        finally:
            ended.set()

    endpoint = await serve(bus, "count", count)
    async with aclosing(caller.stream(subject("count"), Ask(), Counted, timeout_s=LONG_S)) as frames:
        async for frame in frames:
            if frame.number == 10:
                break
    await asyncio.wait_for(ended.wait(), SOON_S)
    await asyncio.wait_for(told.wait(), SOON_S)  # and the worker needn't have missed its reader first
    await until(lambda: endpoint.stats.num_active == 0)
    await until(lambda: not bus._inbox._waiters)
    assert (endpoint.stats.num_cancelled, caller.stats()["requests_in_flight"]) == (1, 0)


async def test_a_stream_whose_reader_is_cancelled_ends_its_handler(bus: Bus, caller: Bus) -> None:
    ended = asyncio.Event()

    async def pause(request: Ask) -> AsyncGenerator[Counted, None]:
        try:
            yield Counted()
            await asyncio.sleep(LONG_S)
        finally:
            ended.set()

    await serve(bus, "pause", pause)
    read = asyncio.Event()

    async def reader() -> None:
        async for _ in caller.stream(subject("pause"), Ask(), Counted, timeout_s=LONG_S):
            read.set()

    task: asyncio.Task[object] = asyncio.create_task(reader())
    await asyncio.wait_for(read.wait(), SOON_S)
    await cancelled(task)
    await asyncio.wait_for(ended.wait(), SOON_S)
    assert caller.stats()["requests_in_flight"] == 0


async def test_a_request_that_is_cancelled_in_the_queue_never_begins(bus: Bus, caller: Bus) -> None:
    held = Held()
    endpoint = await serve(bus, "queued", held, concurrency=1)
    first = asyncio.create_task(caller.request(subject("queued"), Ask(text="1"), Told, timeout_s=LONG_S))
    await asyncio.wait_for(held.begun.wait(), SOON_S)
    second: asyncio.Task[object] = asyncio.create_task(
        caller.request(subject("queued"), Ask(text="2"), Told, timeout_s=LONG_S)
    )
    await until(lambda: len(endpoint._waiting) == 1)
    await cancelled(second)
    await until(lambda: not endpoint._waiting)
    held.release.set()
    assert await first == Told(text="1")
    assert (held.num_begun, endpoint.stats.num_cancelled, endpoint._by_request_id) == (1, 1, {})


async def test_a_cancellation_that_comes_before_the_task_began_is_not_lost(bus: Bus, raw: Client) -> None:
    held = Held()
    endpoint = await serve(bus, "at-once", held)
    headers = {"Nixlbus-Protocol": "2", "Nixlbus-Request-Id": "f00"}
    for _ in range(50):  # both come in one read, before the event loop has run the handler's task
        await raw.publish("cancellation.at-once", msgpack.packb({"type": "cancellation.ask"}), "x.y", headers)
        await raw.publish(bus.subjects.cancel("f00").name, b"")
    await raw.flush()
    await until(lambda: endpoint.stats.num_cancelled == 50)
    await until(lambda: endpoint.stats.num_active == 0)
    assert not endpoint._by_request_id


async def test_the_cancellation_of_another_request_does_nothing(bus: Bus, caller: Bus, raw: Client) -> None:
    held = Held()
    endpoint = await serve(bus, "mine", held)
    request = asyncio.create_task(caller.request(subject("mine"), Ask(text="a"), Told, timeout_s=LONG_S))
    await asyncio.wait_for(held.begun.wait(), SOON_S)
    for other in ("0" * 16, "x", "A-B_c"):
        await raw.publish(bus.subjects.cancel(other).name, b"")
    await raw.flush()
    held.release.set()
    assert await request == Told(text="a")
    assert endpoint.stats.num_cancelled == 0


async def test_a_cancellation_reaches_a_worker_that_drains(server: EmbeddedServer, caller: Bus) -> None:
    held = Held()
    async with Bus.open(BusConfig(worker_id="leaving", nats_url=server.url), data_plane=False) as leaving:
        await serve(leaving, "draining", held, concurrency=1)
        request = asyncio.create_task(caller.request(subject("draining"), Ask(), Told, timeout_s=LONG_S))
        await asyncio.wait_for(held.begun.wait(), SOON_S)
        drain = asyncio.create_task(leaving.drain(LONG_S))
        await asyncio.sleep(0.1)
        await cancelled(request)
        await asyncio.wait_for(held.ended.wait(), PROBE_INTERVAL_S / 2)  # told, and not found out by a probe
        await asyncio.wait_for(drain, SOON_S)


async def test_a_killed_client_s_work_ends_within_seconds(bus: Bus, server: EmbeddedServer) -> None:
    held, streaming = Held(), asyncio.Event()
    stream_ended = asyncio.Event()

    async def pause(request: Ask) -> AsyncGenerator[Counted, None]:
        try:
            yield Counted()
            streaming.set()
            await asyncio.sleep(LONG_S)
        finally:
            stream_ended.set()

    endpoints = [await serve(bus, "killed", held), await serve(bus, "killed-stream", pause)]
    client = subprocess.Popen([sys.executable, "-c", CLIENT, server.url])  # noqa: ASYNC220
    try:
        await asyncio.wait_for(held.begun.wait(), 20)
        await asyncio.wait_for(streaming.wait(), SOON_S)
        await asyncio.sleep(1.5 * PROBE_INTERVAL_S)
        assert not held.ended.is_set()  # a client that lives is only asked
        client.send_signal(signal.SIGKILL)
        started_s = time.monotonic()
        await asyncio.wait_for(held.ended.wait(), 3 * PROBE_INTERVAL_S + 2)
        await asyncio.wait_for(stream_ended.wait(), 3 * PROBE_INTERVAL_S + 2)
        assert time.monotonic() - started_s < 3 * PROBE_INTERVAL_S + 2
    finally:
        client.kill()
        client.wait()
    await until(lambda: all(endpoint.stats.num_active == 0 for endpoint in endpoints))
    assert [endpoint.stats.num_cancelled for endpoint in endpoints] == [1, 1]
    assert not bus._inbox._waiters


CLIENT = textwrap.dedent("""
    import asyncio, sys
    from bus import Bus, BusConfig, Frame
    from schemas.message import Message
    from schemas.subjects import Subject

    class Ask(Message, frozen=True, kw_only=True, tag="cancellation.ask"):
        text: str = ""

    class Told(Message, frozen=True, kw_only=True, tag="cancellation.told"):
        text: str = ""

    class Counted(Frame, frozen=True, kw_only=True, tag="cancellation.counted"):
        number: int = 0

    async def read(bus):
        async for _ in bus.stream(Subject("cancellation.killed-stream", ""), Ask(), Counted, timeout_s=60):
            pass

    async def main():
        async with Bus.open(BusConfig(worker_id="doomed", nats_url=sys.argv[1]), data_plane=False) as bus:
            request = bus.request(Subject("cancellation.killed", ""), Ask(), Told, timeout_s=60)
            await asyncio.gather(request, read(bus))

    asyncio.run(main())
""")


async def test_a_killed_worker_is_told_of_within_seconds(caller: Bus, server: EmbeddedServer) -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER, server.url], stdout=subprocess.PIPE)  # noqa: ASYNC220
    try:
        assert worker.stdout is not None
        assert await asyncio.to_thread(worker.stdout.readline) == b"ready\n"
        frames = caller.stream(subject("doomed-stream"), Ask(), Counted, timeout_s=LONG_S)
        assert await anext(frames) == Counted(seq=0)
        asked = [asyncio.ensure_future(anext(frames))]
        waits = [caller.request(subject("doomed"), Ask(), Told, timeout_s=LONG_S) for _ in range(2)]
        asked += [asyncio.ensure_future(each) for each in waits]  # one works, one waits for its slot
        await asyncio.sleep(1.5)  # callers that look for it find it
        assert not any(each.done() for each in asked)
        worker.kill()
        started_s = time.monotonic()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - started_s < 5
        assert [type(outcome) for outcome in outcomes] == [PeerLost] * 3
        await until(lambda: not caller._inbox._waiters)
    finally:
        worker.kill()
        worker.wait()
        if worker.stdout:
            worker.stdout.close()


async def test_a_request_that_is_looked_for_all_along_gets_its_answer(bus: Bus, caller: Bus) -> None:
    held = Held()
    await serve(bus, "long", held, concurrency=1)
    asked = [
        asyncio.create_task(caller.request(subject("long"), Ask(text=str(n)), Told, timeout_s=LONG_S)) for n in (0, 1)
    ]
    await asyncio.sleep(2.6 * PROBE_INTERVAL_S)
    held.release.set()
    assert [reply.text for reply in await asyncio.gather(*asked)] == ["0", "1"]
    assert len(caller._inbox._waiters) == len(bus._inbox._waiters) == 0


async def test_a_forged_probe_makes_nobody_publish_where_it_likes(bus: Bus, caller: Bus, raw: Client) -> None:
    held, heard = Held(), list[Msg]()

    async def hear(message: Msg) -> None:
        heard.append(message)

    await serve(bus, "probed", held)
    await raw.subscribe("nixlbus.v1.event.calling.reaped", cb=hear)
    request = asyncio.create_task(caller.request(subject("probed"), Ask(), Told, timeout_s=LONG_S))
    await asyncio.wait_for(held.begun.wait(), SOON_S)
    for token in (*caller._inbox._waiters, "ffff"):
        reply = "nixlbus.v1.event.calling.reaped"
        await raw.publish(f"{caller._inbox._prefix}.{token}", b"", reply=reply, headers={"Nixlbus-Probe": "1"})
    await raw.flush()
    await asyncio.sleep(1.3)  # until callers look for their workers
    held.release.set()
    await request
    await raw.flush()
    assert heard == []


WORKER = textwrap.dedent("""
    import asyncio, sys
    from bus import Bus, BusConfig, EndpointConfig, Frame
    from schemas.message import Message
    from schemas.subjects import Subject

    class Ask(Message, frozen=True, kw_only=True, tag="cancellation.ask"):
        text: str = ""

    class Counted(Frame, frozen=True, kw_only=True, tag="cancellation.counted"):
        number: int = 0

    async def stream(request: Ask):
        yield Counted()
        await asyncio.sleep(60)

    async def unary(request: Ask):
        await asyncio.sleep(60)

    async def main():
        async with Bus.open(BusConfig(worker_id="doomed", nats_url=sys.argv[1]), data_plane=False) as bus:
            for name, handler in (("doomed", unary), ("doomed-stream", stream)):
                subject = Subject(f"cancellation.{name}", "")
                await bus.serve(EndpointConfig(name, subject, Ask, concurrency=1), handler)
            print("ready", flush=True)
            await asyncio.sleep(60)

    asyncio.run(main())
""")


async def test_the_work_for_a_caller_that_has_given_up_ends_though_its_process_lives(bus: Bus, raw: Client) -> None:
    held = Held()
    async with Bus.open(BusConfig(worker_id="forgetful", nats_url=bus.config.nats_url), data_plane=False) as forgetful:
        await serve(bus, "forgotten", held)
        headers = {"Nixlbus-Protocol": "2", "Nixlbus-Request-Id": "f01"}
        nobody = f"{forgetful._inbox._prefix}.ffff"  # a reply that this caller waits for no more
        await raw.publish("cancellation.forgotten", msgpack.packb({"type": "cancellation.ask"}), nobody, headers)
        await asyncio.wait_for(held.begun.wait(), SOON_S)
        await asyncio.wait_for(held.ended.wait(), 3 * PROBE_INTERVAL_S + 2)


async def test_a_plain_client_is_never_probed(bus: Bus, raw: Client) -> None:
    held = Held()
    await serve(bus, "plain", held, public=True)
    inbox = raw.new_inbox()
    replies = await raw.subscribe(inbox)
    await raw.publish("cancellation.plain", msgpack.packb({"type": "cancellation.ask"}), reply=inbox)
    await asyncio.wait_for(held.begun.wait(), SOON_S)
    await asyncio.sleep(2.2 * PROBE_INTERVAL_S)
    assert replies.pending_msgs == 0
    held.release.set()
    reply = await replies.next_msg(timeout=SOON_S)
    assert msgpack.unpackb(reply.data)["type"] == "cancellation.told"


async def test_a_deadline_ends_the_handler_and_tells_a_caller_who_still_listens(bus: Bus, raw: Client) -> None:
    held = Held()
    endpoint = await serve(bus, "late", held)
    headers = {"Nixlbus-Protocol": "2", "Nixlbus-Ttl-Ms": "300"}
    payload = msgpack.packb({"type": "cancellation.ask"})
    reply = await raw.request("cancellation.late", payload, timeout=SOON_S, headers=headers)
    fault = msgpack.unpackb(reply.data)
    assert (fault["type"], fault["code"]) == ("fault", "deadline_exceeded")
    assert held.ended.is_set()
    await until(lambda: endpoint.stats.num_active == 0)
    assert endpoint.stats.num_cancelled == 0


async def test_a_deadline_that_passes_in_the_queue_is_told_without_work(bus: Bus, caller: Bus, raw: Client) -> None:
    held = Held()
    await serve(bus, "waits", held, concurrency=1)
    first = asyncio.create_task(caller.request(subject("waits"), Ask(), Told, timeout_s=LONG_S))
    await asyncio.wait_for(held.begun.wait(), SOON_S)
    headers = {"Nixlbus-Protocol": "2", "Nixlbus-Ttl-Ms": "50"}
    payload = msgpack.packb({"type": "cancellation.ask"})
    second = asyncio.create_task(raw.request("cancellation.waits", payload, timeout=SOON_S, headers=headers))
    await asyncio.sleep(0.2)
    held.release.set()
    assert msgpack.unpackb((await second).data)["code"] == "deadline_exceeded"
    assert await first == Told()
    assert held.num_begun == 1


async def test_a_handler_that_outlives_its_deadline_answers_nobody(bus: Bus, caller: Bus) -> None:
    async def stubborn(request: Ask) -> Told:
        try:
            await asyncio.sleep(LONG_S)
        except asyncio.CancelledError:
            await asyncio.sleep(0.3)
        return Told(text="too late")

    endpoint = await serve(bus, "stubborn", stubborn)
    with pytest.raises((DeadlineExceeded, RemoteFault)):
        await caller.request(subject("stubborn"), Ask(), Told, timeout_s=0.2)
    await until(lambda: endpoint.stats.num_active == 0)
    assert caller.stats()["requests_in_flight"] == 0


async def test_a_bus_that_closes_fails_the_requests_that_it_waits_for(bus: Bus, server: EmbeddedServer) -> None:
    held = Held()
    await serve(bus, "closing", held)
    async with Bus.open(BusConfig(worker_id="closing", nats_url=server.url), data_plane=False) as closing:
        request = asyncio.create_task(closing.request(subject("closing"), Ask(), Told, timeout_s=LONG_S))
        await asyncio.wait_for(held.begun.wait(), SOON_S)
    with pytest.raises(Exception, match="closed"):
        await asyncio.wait_for(request, SOON_S)
