"""What nats-py does that surprises, each beside what the bus does instead, on one real nats-server."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import nats.errors
import nats.micro
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.micro.request import Request

from bus import Bus, BusConfig, BusError, ConnectionLost, EmbeddedServer, EndpointConfig, PayloadTooLarge, RemoteFault
from bus.control_plane.connection import Connection
from schemas.message import Message
from schemas.subjects import Subject
from tests.bus.control_plane.nats_process import nats_process
from tests.bus.control_plane.waiting import SOON_S, until

LONG_S = 20.0
HEADERS = {"Nixlbus-Protocol": "2"}


class Ask(Message, frozen=True, kw_only=True, tag="traps.ask"):
    number: int = 0


class Told(Message, frozen=True, kw_only=True, tag="traps.told"):
    number: int = 0


ASK = msgpack.packb({"type": "traps.ask"})


def subject(name: str) -> Subject:
    return Subject(f"traps.{name}", f"traps.{name}")


async def serve(bus: Bus, name: str, handler: object, **fields: object) -> None:
    await bus.serve(EndpointConfig(name, subject(name), Ask, **fields), handler)  # type: ignore[arg-type]


@asynccontextmanager
async def bare(url: str, **options: object) -> AsyncIterator[Client]:
    """nats-py as it is."""
    client = Client()
    await client.connect(url, **options)  # type: ignore[arg-type]
    try:
        yield client
    finally:
        await client.close()


async def echo(request: Ask) -> Told:
    return Told(number=request.number)


async def test_one_slow_message_does_not_hold_up_the_next(bus: Bus, caller: Bus, raw: Client) -> None:
    begun: list[str] = []
    release = asyncio.Event()

    async def hold(message: Msg) -> None:
        begun.append("bare")
        await release.wait()

    await raw.subscribe("traps.bare.slow", cb=hold)
    for _ in range(2):
        await raw.publish("traps.bare.slow", b"")
    await raw.flush()
    await asyncio.sleep(0.05)
    assert begun == ["bare"]  # nats-py awaits the callback before it looks at the second

    async def first_holds(request: Ask) -> Told:
        if request.number == 0:
            await release.wait()
        return Told(number=request.number)

    await serve(bus, "slow", first_holds)
    held = asyncio.create_task(caller.request(subject("slow"), Ask(number=0), Told, timeout_s=LONG_S))
    assert await caller.request(subject("slow"), Ask(number=1), Told, timeout_s=SOON_S) == Told(number=1)
    assert not held.done()
    release.set()
    await held


async def test_a_slow_consumer_drops_nothing_silently(bus: Bus, raw: Client, server: EmbeddedServer) -> None:
    handled, dropped = list[Msg](), list[Exception]()
    release = asyncio.Event()

    async def on_error(error: Exception) -> None:
        dropped.append(error)

    async with bare(server.url, error_cb=on_error) as client:

        async def hold(message: Msg) -> None:
            handled.append(message)
            await release.wait()

        await client.subscribe("traps.bare.dropped", cb=hold, pending_msgs_limit=10)
        await client.flush()
        for _ in range(100):
            await raw.publish("traps.bare.dropped", b"", reply="nobody.hears")
        await raw.flush()
        await until(lambda: len(dropped) >= 80)
        assert isinstance(dropped[0], nats.errors.SlowConsumerError)
        release.set()
        await asyncio.sleep(0.05)
        assert len(handled) < 20
    release.clear()

    async def held(request: Ask) -> Told:
        await release.wait()
        return Told()

    await serve(bus, "dropped", held, concurrency=1, max_queued=9)
    answers: list[dict[str, object]] = []

    async def take(message: Msg) -> None:
        answers.append(msgpack.unpackb(message.data))

    own = raw.new_inbox()
    await raw.subscribe(own, cb=take)
    for _ in range(100):
        await raw.publish("traps.dropped", ASK, reply=own, headers=HEADERS)
    await until(lambda: len(answers) == 90)
    release.set()
    await until(lambda: len(answers) == 100)
    assert [answer.get("code", "served") for answer in answers] == ["overloaded"] * 90 + ["served"] * 10


async def test_a_handler_that_blocks_the_loop_costs_a_connection_and_not_the_worker(tmp_path: Path) -> None:
    with nats_process(tmp_path, 'ping_interval: "200ms"\nping_max: 1') as server:
        config = BusConfig(worker_id="blocked", nats_url=server.url)
        async with Bus.open(config, data_plane=False) as bus:

            async def block(request: Ask) -> Told:
                time.sleep(1.2)  # noqa: ASYNC251  # that is the mistake
                return Told()

            await serve(bus, "block", block)
            await serve(bus, "echo", echo)
            with contextlib.suppress(BusError):
                await bus.request(subject("block"), Ask(), Told, timeout_s=LONG_S)
            await until(lambda: bus.stats()["nats_reconnects"] + bus.stats()["nats_rebuilt"] > 0, 8)
            await until(lambda: bus.is_ready, 8)
            assert await bus.request(subject("echo"), Ask(number=1), Told, timeout_s=SOON_S) == Told(number=1)


async def test_a_request_in_flight_hears_of_a_lost_connection(tmp_path: Path) -> None:
    with nats_process(tmp_path) as server:
        config = BusConfig(worker_id="lost", nats_url=server.url)
        async with bare(server.url) as client, Bus.open(config, data_plane=False, drain_timeout_s=0.1) as bus:

            async def silent(message: Msg) -> None:
                pass

            await client.subscribe("traps.silent", cb=silent)
            await client.flush()
            theirs = asyncio.create_task(client.request("traps.silent", b"", timeout=1.0))
            ours = asyncio.create_task(bus.request(subject("silent"), Ask(), Told, timeout_s=LONG_S))
            await asyncio.sleep(0.1)
            server.kill()
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(ours, 0.7)
            assert not theirs.done()
            with pytest.raises(nats.errors.TimeoutError):
                await theirs
            server.start()  # or nats-py's own end would take longer


async def test_no_header_of_a_request_comes_back_with_its_reply(bus: Bus, raw: Client) -> None:
    async def respond(message: Msg) -> None:
        await message.respond(b"")

    await raw.subscribe("traps.bare.headers", cb=respond)
    reply = await raw.request("traps.bare.headers", b"", timeout=SOON_S, headers={"Secret": "x"})
    assert reply.headers == {"Secret": "x"}
    await serve(bus, "headers", echo)
    reply = await raw.request("traps.headers", ASK, timeout=SOON_S, headers={**HEADERS, "Secret": "x"})
    assert not reply.headers
    reply = await raw.request("traps.headers", b"\xc1", timeout=SOON_S, headers={**HEADERS, "Secret": "x"})
    assert set(reply.headers or {}) == {"Nats-Service-Error", "Nats-Service-Error-Code"}


async def test_a_handler_that_raises_answers_and_keeps_its_secret(bus: Bus, raw: Client) -> None:
    async def fail(message: Msg) -> None:
        raise ValueError("secret")

    async def fail_in_micro(request: Request) -> None:
        raise ValueError("secret")

    await raw.subscribe("traps.bare.raises", cb=fail)
    with pytest.raises(nats.errors.TimeoutError):
        await raw.request("traps.bare.raises", b"", timeout=0.3)
    service = await nats.micro.add_service(raw, name="micro", version="0.0.1")
    await service.add_endpoint(name="raises", subject="traps.micro.raises", handler=fail_in_micro)
    reply = await raw.request("traps.micro.raises", b"", timeout=SOON_S)
    assert "ValueError('secret')" in str(reply.headers)
    await service.stop()

    async def handler(request: Ask) -> Told:
        raise ValueError("secret")

    await serve(bus, "raises", handler)
    reply = await raw.request("traps.raises", ASK, timeout=SOON_S, headers=HEADERS)
    assert msgpack.unpackb(reply.data)["code"] == "internal"
    assert "secret" not in f"{reply.data!r} {reply.headers}"
    assert "ValueError" not in f"{reply.data!r} {reply.headers}"


async def test_a_cancellation_that_escapes_a_handler_does_not_end_its_subscription(
    bus: Bus, caller: Bus, raw: Client
) -> None:
    async def cancel(message: Msg) -> None:
        raise asyncio.CancelledError

    await raw.subscribe("traps.bare.cancelled", cb=cancel)
    for _ in range(2):
        with pytest.raises(nats.errors.TimeoutError):
            await raw.request("traps.bare.cancelled", b"", timeout=0.1)

    events: list[int] = []

    async def on_event(event: Ask) -> None:
        events.append(event.number)
        if event.number % 2:
            raise asyncio.CancelledError
        raise RuntimeError("and what else escapes")

    await bus.subscribe(subject("cancelled"), Ask, on_event)
    for number in range(6):
        await caller.publish(subject("cancelled"), Ask(number=number))
    await until(lambda: events == list(range(6)))

    def callback(message: object) -> None:
        events.append(-1)
        raise RuntimeError("in the read loop itself")

    await bus._connection.subscribe("traps.read.loop", callback)
    await bus._connection.confirm_subscriptions(SOON_S)
    for _ in range(2):
        await raw.publish("traps.read.loop", b"")
    await until(lambda: events[-2:] == [-1, -1])
    assert bus.is_ready


async def test_a_service_that_stops_serves_what_it_has_taken(raw: Client, server: EmbeddedServer) -> None:
    async def slow(request: Request) -> None:
        await asyncio.sleep(0.1)
        await request.respond(b"done")

    service = await nats.micro.add_service(raw, name="stops", version="0.0.1")
    await service.add_endpoint(name="slow", subject="traps.micro.stops", handler=slow)
    await raw.flush()
    asked = [asyncio.create_task(raw.request("traps.micro.stops", b"", timeout=1.5)) for _ in range(5)]
    await asyncio.sleep(0.05)
    await service.stop()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert any(isinstance(outcome, Exception) for outcome in outcomes)

    async def handler(request: Ask) -> Told:
        await asyncio.sleep(0.1)
        return Told()

    async with Bus.open(BusConfig(worker_id="stops", nats_url=server.url), data_plane=False) as stopping:
        await serve(stopping, "stops", handler, concurrency=1)
        asked = [
            asyncio.create_task(raw.request("traps.stops", ASK, timeout=SOON_S, headers=HEADERS)) for _ in range(5)
        ]
        await asyncio.sleep(0.05)
    replies = await asyncio.gather(*asked)
    assert [msgpack.unpackb(reply.data)["type"] for reply in replies] == ["traps.told"] * 5


async def test_draining_waits_for_work_that_runs_in_tasks(raw: Client, server: EmbeddedServer) -> None:
    finished: list[str] = []

    async def work(name: str) -> None:
        await asyncio.sleep(0.2)
        finished.append(name)

    tasks: list[asyncio.Task[None]] = []
    client = Client()
    await client.connect(server.url)

    async def in_a_task(message: Msg) -> None:
        tasks.append(asyncio.create_task(work("bare")))

    await client.subscribe("traps.bare.task", cb=in_a_task)
    await client.flush()
    await raw.publish("traps.bare.task", b"")
    await raw.flush()
    await until(lambda: bool(tasks))
    await client.drain()
    assert finished == []  # nats-py doesn't know of it
    await asyncio.gather(*tasks)
    finished.clear()

    async def handler(request: Ask) -> Told:
        await work("ours")
        return Told()

    async with Bus.open(BusConfig(worker_id="drains", nats_url=server.url), data_plane=False) as draining:
        await serve(draining, "drains", handler)
        asked = asyncio.create_task(raw.request("traps.drains", ASK, timeout=SOON_S, headers=HEADERS))
        await asyncio.sleep(0.05)
        await draining.drain(SOON_S)
        assert finished == ["ours"]
        assert msgpack.unpackb((await asked).data)["type"] == "traps.told"


class ScriptedServer:
    """Speaks just enough of the NATS protocol to greet clients, and says what a test wants said."""

    def __init__(self) -> None:
        self.url = ""
        self.num_connections = 0
        self.answers_pings = True
        self._writers: list[asyncio.StreamWriter] = []
        self.num_owed_pongs = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.append(writer)
        info = {"server_id": "S", "version": "2.10.0", "max_payload": 1 << 20, "headers": True, "proto": 1}
        writer.write(f"INFO {json.dumps(info)}\r\n".encode())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                if line.startswith(b"PING"):
                    self.num_owed_pongs += 1
                    if self.answers_pings:
                        self.say("PONG")
                        self.num_owed_pongs -= 1
        writer.close()

    def say(self, line: str) -> None:
        """To the client that came last."""
        self._writers[-1].write(f"{line}\r\n".encode())

    def hang_up(self) -> None:
        self._writers[-1].close()


@asynccontextmanager
async def scripted_server() -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer()
    listening = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    scripted.url = f"nats://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        listening.close()
        for writer in scripted._writers:
            writer.close()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "error",
    ["User Authentication Expired", "User Authentication Revoked", "Account Authentication Expired", "Nonsense"],
)
async def test_an_error_of_the_server_leads_to_a_new_connection_and_not_to_the_end(error: str) -> None:
    async with scripted_server() as scripted:
        client = Client()
        await client.connect(scripted.url, reconnect_time_wait=0)
        scripted.say(f"-ERR '{error}'")
        scripted.hang_up()
        await until(lambda: client.is_closed)
        assert scripted.num_connections == 1  # closed for good
        connection = await Connection.open(scripted.url, "expired", SOON_S)
        lost: list[BusError] = []
        connection.on_loss(lambda error, subject: lost.append(error))
        for times in (1, 2):
            scripted.say(f"-ERR '{error}'")
            scripted.hang_up()
            await until(lambda times=times: len(lost) >= times)  # type: ignore[misc]
            await until(lambda times=times: scripted.num_connections == 2 + times and connection.is_connected)  # type: ignore[misc]
        assert error.lower() in str(lost[0]).lower()
        await connection.close()


async def test_an_invalid_subject_costs_nothing_but_itself() -> None:
    async with scripted_server() as scripted:
        connection = await Connection.open(scripted.url, "invalid", SOON_S)
        scripted.say("-ERR 'Invalid Subject'")
        await connection.flush(SOON_S)
        assert (connection.is_connected, scripted.num_connections) == (True, 1)
        await connection.close()


async def test_the_answer_to_a_flush_that_was_given_up_ends_nothing() -> None:
    async with scripted_server() as scripted:
        client = Client()
        await client.connect(scripted.url, allow_reconnect=False)
        connection = await Connection.open(scripted.url, "late", SOON_S)
        scripted.answers_pings = False
        with pytest.raises(ConnectionLost):
            await connection.flush(0.1)
        scripted.answers_pings = True
        scripted.say("PONG")
        await connection.flush(SOON_S)
        assert connection.is_connected
        await connection.close()
        scripted._writers.pop()
        scripted.answers_pings = False
        with pytest.raises(nats.errors.FlushTimeoutError):
            await client.flush(timeout=0.1)  # type: ignore[arg-type]
        scripted.say("PONG")
        await until(
            lambda: bool(client._reading_task and client._reading_task.done())
        )  # deaf, and calls itself connected
        assert client.is_connected
        await client.close()


async def test_a_jetstream_consumer_pulls_through_the_same_connection(tmp_path: Path) -> None:
    with nats_process(tmp_path, f'jetstream {{ store_dir: "{tmp_path}/js" }}') as server:
        connection = await Connection.open(server.url, "pulls", SOON_S)
        await connection.jetstream().add_stream(name="traps", subjects=["traps.js"])
        for number in range(3):
            await connection.jetstream().publish("traps.js", b"%d" % number)
        pulled = await connection.jetstream().pull_subscribe("traps.js", durable="d")
        assert [message.data for message in await pulled.fetch(3, timeout=SOON_S)] == [b"0", b"1", b"2"]
        with pytest.raises(nats.errors.TimeoutError):
            await pulled.fetch(1, timeout=0.1)
        server.kill()
        await until(lambda: not connection.is_connected)
        server.start()
        await until(lambda: connection.is_connected, 8)
        async with asyncio.timeout(8):
            while True:
                with contextlib.suppress(Exception):
                    await connection.jetstream(1.0).publish("traps.js", b"after")
                    break
        pulled = await connection.jetstream().pull_subscribe("traps.js", durable="d")
        assert (await pulled.fetch(1, timeout=SOON_S))[0].data in (b"after", b"0")
        await connection.close()


async def test_headers_count_against_the_server_s_limit(raw: Client, server: EmbeddedServer, caller: Bus) -> None:
    client = Client()
    await client.connect(server.url, reconnect_time_wait=0)
    await client.publish("traps.large", b"x" * client.max_payload, headers={"A": "b"})
    with contextlib.suppress(Exception):
        await client.flush(timeout=1)
    await until(lambda: client.is_closed)  # for good
    with pytest.raises(PayloadTooLarge):
        await caller._connection.publish("traps.large", b"x" * caller._connection.max_payload_bytes, headers={"A": "b"})
    await caller._connection.flush(SOON_S)
    assert caller.stats()["nats_reconnects"] == 0


async def test_a_payload_that_the_server_refuses_all_the_same_leads_to_a_new_connection(tmp_path: Path) -> None:
    with nats_process(tmp_path) as server:
        connection = await Connection.open(server.url, "refused", SOON_S)
        limit = connection.max_payload_bytes
        connection._client._max_payload = 2 * limit  # as if the server's limit had been lowered since
        connection.publish_now("traps.refused", b"x" * (limit + 1))
        await until(lambda: connection.statistics()["reconnects"] + connection.statistics()["rebuilt"] > 0, 8)
        await until(lambda: connection.is_connected, 8)
        await connection.flush(SOON_S)
        await connection.close()


async def publish_for_ever(connection: Connection) -> None:
    while True:
        await connection.publish("traps.burst", b"x" * 500_000)


async def test_publishing_to_a_server_that_reads_nothing_ends(tmp_path: Path) -> None:
    with nats_process(tmp_path) as server:
        connection = await Connection.open(server.url, "burst", SOON_S, options={"ping_interval": 0.5})
        server.signal(signal.SIGSTOP)
        try:
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(publish_for_ever(connection), 10)
        finally:
            server.signal(signal.SIGCONT)
        await until(lambda: connection.is_connected, 10)
        await connection.flush(SOON_S)
        await connection.close()


async def test_a_subscription_costs_no_task_of_its_own(bus: Bus, raw: Client) -> None:
    before = len(asyncio.all_tasks())
    for number in range(20):
        await bus._connection.subscribe(f"traps.many.{number}", lambda message: None)
    assert len(asyncio.all_tasks()) == before

    async def nothing(message: Msg) -> None:
        pass

    for number in range(20):
        await raw.subscribe(f"traps.bare.many.{number}", cb=nothing)
    assert len(asyncio.all_tasks()) == before + 20


async def test_an_overloaded_endpoint_still_hears_its_cancellations(bus: Bus, caller: Bus) -> None:
    release = asyncio.Event()

    async def held(request: Ask) -> Told:
        await release.wait()
        return Told()

    await serve(bus, "choked", held, concurrency=1, max_queued=1)
    asked = [asyncio.create_task(caller.request(subject("choked"), Ask(), Told, timeout_s=LONG_S)) for _ in range(2)]
    await asyncio.sleep(0.05)
    with pytest.raises(RemoteFault):
        await caller.request(subject("choked"), Ask(), Told, timeout_s=LONG_S)
    for each in asked:
        each.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    release.set()
    assert await caller.request(subject("choked"), Ask(), Told, timeout_s=LONG_S) == Told()
