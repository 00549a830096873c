import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import msgpack
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import (
    Bus,
    BusConfig,
    ConnectionLost,
    Deadline,
    DeadlineExceeded,
    EmbeddedServer,
    EndpointConfig,
    NoResponders,
    PayloadTooLarge,
    PermissionDenied,
    RemoteFault,
    RemoteProtocolError,
    embedded_server,
    server_binary,
)
from bus.deadline import working_under
from schemas.message import Message
from schemas.subjects import Subject

PROMPTLY_S = 1.0
LONG_S = 20.0


class Ask(Message, frozen=True, kw_only=True, tag="test.ask"):
    text: str = ""
    number: int = 0


class Told(Message, frozen=True, kw_only=True, tag="test.told"):
    text: str = ""
    seq: int = 0


class Last(Message, frozen=True, kw_only=True, tag="test.last"):
    seq: int


def subject(name: str) -> Subject:
    return Subject(f"test.{name}", f"test.{name}")


def config(name: str, **fields: object) -> EndpointConfig:
    return EndpointConfig(name, subject(name), Ask, **fields)  # type: ignore[arg-type]


async def test_a_request_gets_its_typed_reply_and_the_reply_echoes_no_header(
    bus: Bus, caller: Bus, raw: Client
) -> None:
    async def answer(request: Ask) -> Told:
        return Told(text=request.text.upper())

    await bus.serve(config("upper"), answer)
    assert await caller.request(subject("upper"), Ask(text="hi"), Told, timeout_s=5) == Told(text="HI")
    headers = {"Nixlbus-Protocol": "2", "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01", "Secret": "x"}
    reply = await raw.request("test.upper", msgpack.packb({"text": "a"}), timeout=5, headers=headers)
    assert not reply.headers


async def test_a_subject_is_known_to_everybody_when_serve_returns(bus: Bus, caller: Bus) -> None:
    async def answer(request: Ask) -> Told:
        return Told()

    for number in range(100):  # after one flush only, some 3 in 100 met "no responders"
        await bus.serve(config(f"fresh{number}", concurrency=1), answer)
        assert await caller.request(subject(f"fresh{number}"), Ask(), Told, timeout_s=5) == Told()


async def test_a_stream_is_yielded_frame_by_frame_to_its_end(bus: Bus, caller: Bus) -> None:
    async def count(request: Ask) -> AsyncGenerator[Told | Last, None]:
        for number in range(request.number):
            yield Told(seq=number)
        yield Last(seq=request.number)

    await bus.serve(config("count"), count)
    frames = [f async for f in caller.stream(subject("count"), Ask(number=500), Told, Last, timeout_s=5)]
    assert [frame.seq for frame in frames] == list(range(501))
    assert isinstance(frames[-1], Last)


async def test_a_gap_in_a_stream_is_an_error_and_never_a_silently_lost_frame(bus: Bus, caller: Bus) -> None:
    async def gap(request: Ask) -> AsyncGenerator[Told | Last, None]:
        yield Told(seq=0)
        yield Told(seq=2)
        yield Last(seq=3)

    await bus.serve(config("gap"), gap)
    with pytest.raises(RemoteProtocolError, match="frame 2 came where 1 was due"):
        _ = [f async for f in caller.stream(subject("gap"), Ask(), Told, Last, timeout_s=5)]


async def test_a_stream_that_fails_midway_raises_the_fault_after_its_frames(bus: Bus, caller: Bus) -> None:
    async def half(request: Ask) -> AsyncGenerator[Told | Last, None]:
        yield Told(seq=0)
        raise ValueError("secret")

    await bus.serve(config("half"), half)
    frames = caller.stream(subject("half"), Ask(), Told, Last, timeout_s=5)
    assert await anext(frames) == Told(seq=0)
    with pytest.raises(RemoteFault) as caught:
        await anext(frames)
    assert (caught.value.fault.code, caught.value.fault.seq) == ("internal", 1)
    assert "secret" not in str(caught.value)


async def test_nobody_listening_is_known_at_once(caller: Bus) -> None:
    started_s = time.monotonic()
    with pytest.raises(NoResponders):
        await caller.request(subject("nobody"), Ask(), Told, timeout_s=LONG_S)
    assert time.monotonic() - started_s < PROMPTLY_S
    assert caller.stats()["requests_in_flight"] == 0


async def test_a_reply_of_another_type_is_a_protocol_error(bus: Bus, caller: Bus) -> None:
    async def wrong(request: Ask) -> Ask:
        return request

    await bus.serve(config("wrong"), wrong)
    with pytest.raises(RemoteProtocolError, match="unknown message type"):
        await caller.request(subject("wrong"), Ask(), Told, timeout_s=5)


async def test_a_slow_request_holds_up_no_other(bus: Bus, caller: Bus) -> None:
    async def slow(request: Ask) -> Told:
        await asyncio.sleep(0.2)
        return Told()

    await bus.serve(config("slow", concurrency=16), slow)
    started_s = time.monotonic()
    await asyncio.gather(*(caller.request(subject("slow"), Ask(), Told, timeout_s=5) for _ in range(16)))
    assert time.monotonic() - started_s < 1.6  # one after the other they would take 3.2 s


async def test_one_request_too_many_is_refused_at_once_and_the_others_are_served(bus: Bus, caller: Bus) -> None:
    release = asyncio.Event()

    async def held(request: Ask) -> Told:
        await release.wait()
        return Told()

    await bus.serve(config("held", concurrency=1, max_queued=1), held)
    first = asyncio.create_task(caller.request(subject("held"), Ask(), Told, timeout_s=LONG_S))
    await asyncio.sleep(0.1)
    second = asyncio.create_task(caller.request(subject("held"), Ask(), Told, timeout_s=LONG_S))
    await asyncio.sleep(0.1)
    with pytest.raises(RemoteFault) as caught:
        await caller.request(subject("held"), Ask(), Told, timeout_s=LONG_S)
    assert (caught.value.fault.code, caught.value.fault.retryable) == ("overloaded", True)
    release.set()
    assert [await first, await second] == [Told(), Told()]


async def test_a_handler_that_is_cancelled_by_what_it_awaits_leaves_the_endpoint_alive(bus: Bus, caller: Bus) -> None:
    async def answer(request: Ask) -> Told:
        if request.number:
            raise asyncio.CancelledError
        return Told()

    await bus.serve(config("cancelled", concurrency=1), answer)
    with pytest.raises(RemoteFault):
        await caller.request(subject("cancelled"), Ask(number=1), Told, timeout_s=5)
    assert await caller.request(subject("cancelled"), Ask(), Told, timeout_s=5) == Told()


async def test_a_deadline_ends_the_handler_and_the_caller(bus: Bus, caller: Bus) -> None:
    ended = asyncio.Event()

    async def forever(request: Ask) -> Told:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return Told()

    await bus.serve(config("forever"), forever)
    with pytest.raises((DeadlineExceeded, RemoteFault)):
        await caller.request(subject("forever"), Ask(), Told, timeout_s=0.3)
    await asyncio.wait_for(ended.wait(), 1)


async def test_a_call_made_for_a_request_has_no_longer_deadline_than_it(bus: Bus, caller: Bus) -> None:
    async def forever(request: Ask) -> Told:
        await asyncio.sleep(60)
        return Told()

    async def hop(request: Ask) -> Told:
        return await bus.request(subject("end"), Ask(), Told, timeout_s=60)

    await bus.serve(config("end"), forever)
    await bus.serve(config("hop"), hop)
    started_s = time.monotonic()
    with pytest.raises((DeadlineExceeded, RemoteFault)):
        await caller.request(subject("hop"), Ask(), Told, timeout_s=0.4)
    assert time.monotonic() - started_s < 2
    with working_under(Deadline.after(0.2)), pytest.raises((DeadlineExceeded, RemoteFault)):
        await caller.request(subject("end"), Ask(), Told, timeout_s=60)


async def test_a_message_over_max_payload_is_refused_here_and_the_connection_lives(bus: Bus, caller: Bus) -> None:
    async def answer(request: Ask) -> Told:
        return Told()

    await bus.serve(config("large"), answer)
    for num_bytes in (8 << 20, (8 << 20) - 40):  # the second fits without its headers
        with pytest.raises(PayloadTooLarge, match="8,388,608"):
            await caller.request(subject("large"), Ask(text="x" * num_bytes), Told, timeout_s=5)
    assert await caller.request(subject("large"), Ask(), Told, timeout_s=5) == Told()


async def test_a_request_without_a_reply_subject_breaks_nothing(bus: Bus, caller: Bus, raw: Client) -> None:
    async def answer(request: Ask) -> Told:
        return Told()

    await bus.serve(config("mute"), answer)
    await raw.publish("test.mute", msgpack.packb({"text": "a"}))
    await raw.flush()
    assert await caller.request(subject("mute"), Ask(), Told, timeout_s=5) == Told()


async def test_draining_finishes_what_was_taken(server: EmbeddedServer, caller: Bus) -> None:
    async def slow(request: Ask) -> Told:
        await asyncio.sleep(0.3)
        return Told()

    async with Bus.open(BusConfig(worker_id="leaving", nats_url=server.url), data_plane=False) as leaving:
        await leaving.serve(config("leaving", concurrency=2), slow)
        requests = [
            asyncio.create_task(caller.request(subject("leaving"), Ask(), Told, timeout_s=LONG_S)) for _ in range(6)
        ]
        await asyncio.sleep(0.1)
    assert await asyncio.gather(*requests) == [Told()] * 6
    with pytest.raises(NoResponders):
        await caller.request(subject("leaving"), Ask(), Told, timeout_s=5)


async def test_a_worker_that_leaves_under_load_loses_no_request(server: EmbeddedServer, caller: Bus) -> None:
    async def answer(request: Ask) -> Told:
        await asyncio.sleep(0.001)
        return Told()

    async def ask_for_a_while(until_s: float) -> int:
        count = 0
        while time.monotonic() < until_s:
            await caller.request(subject("shared"), Ask(), Told, timeout_s=5)
            count += 1
        return count

    shared = config("shared", queue_group="shared")
    async with Bus.open(BusConfig(worker_id="staying", nats_url=server.url), data_plane=False) as staying:
        await staying.serve(shared, answer)
        until_s = time.monotonic() + 1.5
        clients = [asyncio.create_task(ask_for_a_while(until_s)) for _ in range(16)]
        for number in range(6):
            leaving_config = BusConfig(worker_id=f"leaving{number}", nats_url=server.url)
            async with Bus.open(leaving_config, data_plane=False) as leaving:
                await leaving.serve(shared, answer)
                await asyncio.sleep(0.1)
        assert sum(await asyncio.gather(*clients)) > 100


async def test_a_request_in_flight_hears_at_once_that_the_server_is_gone() -> None:
    async with embedded_server() as own:
        config_of_a = BusConfig(worker_id="a", nats_url=own.url)
        async with Bus.open(config_of_a, data_plane=False) as bus:

            async def forever(request: Ask) -> Told:
                await asyncio.sleep(60)
                return Told()

            await bus.serve(config("gone"), forever)
            request = asyncio.create_task(bus.request(subject("gone"), Ask(), Told, timeout_s=LONG_S))
            await asyncio.sleep(0.1)
            os.kill(own.pid, signal.SIGKILL)
            started_s = time.monotonic()
            with pytest.raises(ConnectionLost):
                await request
            with pytest.raises(ConnectionLost):
                await bus.request(subject("gone"), Ask(), Told, timeout_s=LONG_S)
            assert time.monotonic() - started_s < PROMPTLY_S
            await bus.drain(0.1)


async def test_a_denied_subject_is_known_at_once(tmp_path: Path) -> None:
    conf = tmp_path / "nats.conf"
    conf.write_text(
        f'listen: "127.0.0.1:-1"\nports_file_dir: "{tmp_path}"\n'
        'authorization { users: [ {user: u, password: p, permissions: {publish: ["allowed.>", "_INBOX.>"]}} ] }\n'
    )
    process = subprocess.Popen([server_binary(), "-c", str(conf)], stderr=subprocess.DEVNULL)  # noqa: ASYNC220
    try:
        ports = tmp_path / f"nats-server_{process.pid}.ports"
        async with asyncio.timeout(10):
            while not ports.exists() or not ports.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        port = ports.read_text().split("127.0.0.1:")[1].split('"')[0]
        url = f"nats://u:p@127.0.0.1:{port}"
        async with Bus.open(BusConfig(worker_id="a", nats_url=url), data_plane=False) as bus:
            started_s = time.monotonic()
            with pytest.raises(PermissionDenied, match=r"Denied\.Subject"):
                await bus.request(Subject("Denied.Subject", "denied"), Ask(), Told, timeout_s=LONG_S)
            assert time.monotonic() - started_s < PROMPTLY_S
        with pytest.raises(ConnectionLost) as caught:
            async with Bus.open(
                BusConfig(worker_id="a", nats_url=f"nats://u:wrong@127.0.0.1:{port}", connect_timeout_s=1),
                data_plane=False,
            ):
                raise AssertionError("the wrong password was taken")
        assert "wrong" not in str(caught.value)
    finally:
        process.terminate()
        process.wait(5)


async def test_discovery_answers_as_nats_defines_it(bus: Bus, raw: Client) -> None:
    async def answer(request: Ask) -> Told:
        return Told()

    await bus.serve(config("found", queue_group="q"), answer)
    await bus.announce("finder", "1.2.3", {"role": "test"})
    assert (await raw.request("$SRV.PING.finder", b"", timeout=5)).data.startswith(b'{"type":"io.nats.micro.v1.ping')
    (service,) = [s for s in await bus.services() if s["name"] == "finder"]
    assert (service["id"], service["version"], service["metadata"]["role"]) == ("serving", "1.2.3", "test")
    (endpoint,) = service["endpoints"]
    assert (endpoint["subject"], endpoint["queue_group"], endpoint["num_requests"]) == ("test.found", "q", 0)
    await raw.request("test.found", b"\xc1", timeout=5)
    (service,) = [s for s in await bus.services() if s["name"] == "finder"]
    assert (service["endpoints"][0]["num_requests"], service["endpoints"][0]["num_errors"]) == (1, 1)


async def test_what_is_published_without_a_suspension_arrives_whole_and_in_order(caller: Bus, raw: Client) -> None:
    count = 5000  # several times what nats-py's flusher can be woken for before publishing suspends
    arrived: list[bytes] = []
    all_here = asyncio.Event()

    async def take(message: Msg) -> None:
        arrived.append(message.data)
        if len(arrived) == count:
            all_here.set()

    await raw.subscribe("test.in.order", cb=take)
    await raw.flush()
    await raw.flush()
    for number in range(count):
        caller._connection.publish_now("test.in.order", b"%d" % number)
    await asyncio.wait_for(all_here.wait(), 20)
    assert arrived == [b"%d" % number for number in range(count)]
