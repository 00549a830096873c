"""Whatever happens to a server, the bus comes back; whoever waits hears at once; a server that leaves costs nothing."""

import asyncio
import itertools
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import pytest

from bus import Bus, BusConfig, BusError, ConnectionLost, EndpointConfig, Frame, RetryPolicy
from bus.control_plane.connection import Connection
from schemas.message import Message
from schemas.subjects import Subject
from tests.bus.control_plane.nats_process import nats_cluster, nats_process, relay_to
from tests.bus.control_plane.waiting import until

BACK_S = 8.0
PROMPTLY_S = 2.0
LONG_S = 30.0


class Ask(Message, frozen=True, kw_only=True, tag="reconnect.ask"):
    number: int = 0


class Told(Message, frozen=True, kw_only=True, tag="reconnect.told"):
    number: int = 0


class Counted(Frame, frozen=True, kw_only=True, tag="reconnect.counted"):
    number: int = 0


def subject(name: str) -> Subject:
    return Subject(f"reconnect.{name}", f"reconnect.{name}")


def a_bus(worker_id: str, url: str) -> AbstractAsyncContextManager[Bus]:
    config = BusConfig(worker_id=worker_id, nats_url=url)
    return Bus.open(config, data_plane=False, drain_timeout_s=1.0)


async def serve(bus: Bus, name: str, handler: object, queue_group: str = "") -> None:
    config = EndpointConfig(name, subject(name), Ask, queue_group=queue_group, concurrency=64)
    await bus.serve(config, handler)  # type: ignore[arg-type]


async def answered(caller: Bus, name: str) -> None:
    """Return when a request is answered, within the time that a way back may take."""
    async with asyncio.timeout(BACK_S):
        while True:
            with suppress(BusError):
                await caller.request(subject(name), Ask(), Told, timeout_s=1)
                return
            await asyncio.sleep(0.02)


async def echo(request: Ask) -> Told:
    return Told(number=request.number)


async def test_a_server_that_is_killed_and_started_again_is_found_again(tmp_path: Path) -> None:
    held, events = asyncio.Event(), list[int]()

    async def hold(request: Ask) -> Told:
        held.set()
        await asyncio.sleep(LONG_S)
        return Told()

    async def forever(request: Ask) -> AsyncGenerator[Counted, None]:
        for number in itertools.count():
            yield Counted(number=number)
            await asyncio.sleep(0.01)

    with nats_process(tmp_path) as server:
        async with a_bus("serving", server.url) as bus, a_bus("calling", server.url) as caller:
            await serve(bus, "echo", echo)
            await serve(bus, "hold", hold)
            await serve(bus, "forever", forever)
            await bus.subscribe(subject("event"), Ask, lambda event: events.append(event.number))
            for outage in range(2):
                held.clear()
                in_flight = asyncio.create_task(caller.request(subject("hold"), Ask(), Told, timeout_s=LONG_S))
                frames = caller.stream(subject("forever"), Ask(), Counted, timeout_s=LONG_S)
                assert (await anext(frames)).number == 0
                await asyncio.wait_for(held.wait(), 5)
                started_s = time.monotonic()
                server.kill()
                with pytest.raises(ConnectionLost):
                    await in_flight
                with pytest.raises(ConnectionLost):
                    async for _ in frames:
                        pass
                with pytest.raises(ConnectionLost):
                    await caller.request(subject("echo"), Ask(), Told, timeout_s=LONG_S)
                assert time.monotonic() - started_s < PROMPTLY_S
                assert bus.not_ready == "not connected to NATS"
                server.start()
                await answered(caller, "echo")
                await until(lambda: bus.is_ready and caller.is_ready, BACK_S)
                await caller.publish(subject("event"), Ask(number=outage))
                await until(lambda outage=outage: events[-1:] == [outage])  # type: ignore[misc]
            await until(lambda: not caller.stats()["requests_in_flight"], BACK_S)


async def test_a_server_that_stands_still_is_noticed_and_left(tmp_path: Path) -> None:
    with nats_process(tmp_path) as server:
        connection = await Connection.open(server.url, "stopped", 5, options={"ping_interval": 0.3})
        lost: list[BusError] = []
        connection.on_loss(lambda error, subject: lost.append(error))
        received: list[bytes] = []
        await connection.subscribe("reconnect.still", lambda message: received.append(message.data))
        await connection.confirm_subscriptions(5)
        server.signal(signal.SIGSTOP)
        try:
            await until(lambda: bool(lost), 5)
            assert not connection.is_connected
            with pytest.raises(ConnectionLost):
                await connection.flush(0.2)
        finally:
            server.signal(signal.SIGCONT)
        await until(lambda: connection.is_connected, 10)
        await connection.publish("reconnect.still", b"again")
        await until(lambda: received == [b"again"], BACK_S)
        await connection.close()


async def test_a_link_that_swallows_everything_is_left_for_one_that_works(tmp_path: Path) -> None:
    with nats_process(tmp_path) as server:
        async with relay_to(server.port) as relay:
            connection = await Connection.open(relay.url, "swallowed", 5, options={"ping_interval": 0.3})
            lost: list[float] = []
            connection.on_loss(lambda error, subject: lost.append(time.monotonic()))
            received: list[bytes] = []
            await connection.subscribe("reconnect.link", lambda message: received.append(message.data))
            await connection.confirm_subscriptions(5)
            relay.is_dead = True
            connection.publish_now(
                "reconnect.link", b"x" * 1_000_000
            )  # stays unsent: a socket that can't be closed well
            await until(lambda: bool(lost), 5)
            relay.is_dead = False
            await until(lambda: connection.is_connected, 10)
            assert relay.num_links > 1
            await connection.publish("reconnect.link", b"again")
            await until(lambda: received[-1:] == [b"again"], BACK_S)
            await connection.close()


class Load:
    """Requests and streams through a bus, as fast as they are answered, and what became of them."""

    def __init__(self, caller: Bus, name: str) -> None:
        self.errors: list[BaseException] = []
        self.num_requests = 0
        self.num_streams = 0
        self._caller = caller
        self._name = name
        self._numbers = itertools.count()
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        self._tasks = [asyncio.create_task(work()) for work in [self._ask] * 8 + [self._read] * 4]
        try:
            yield self
        finally:
            self._stop.set()
            await asyncio.gather(*self._tasks)

    async def _ask(self) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            try:
                reply = await self._caller.request(subject(f"{self._name}-ask"), Ask(number=number), Told, timeout_s=5)
                assert reply.number == number
                self.num_requests += 1
            except (BusError, AssertionError) as error:
                self.errors.append(error)
            await asyncio.sleep(0.002)

    async def _read(self) -> None:
        while not self._stop.is_set():
            try:
                request = Ask(number=200)
                frames = self._caller.stream(subject(f"{self._name}-read"), request, Counted, timeout_s=10)
                numbers = [frame.number async for frame in frames]
                assert numbers == list(range(200))
                self.num_streams += 1
            except (BusError, AssertionError) as error:
                self.errors.append(error)


async def test_a_server_that_announces_its_end_is_left_without_a_failed_request(tmp_path: Path) -> None:
    handled: Counter[int] = Counter()

    async def ask(request: Ask) -> Told:
        handled[request.number] += 1
        await asyncio.sleep(0.005)
        return Told(number=request.number)

    async def read(request: Ask) -> AsyncGenerator[Counted, None]:
        for number in range(request.number):
            yield Counted(number=number)
            await asyncio.sleep(0.001)

    with nats_cluster(tmp_path) as (leaving, staying):
        url = f"{leaving.url},{staying.url}"
        async with (
            a_bus("one", leaving.url) as one,
            a_bus("two", url) as two,
            a_bus("calling", leaving.url) as caller,
        ):
            events: Counter[int] = Counter()
            for worker in (one, two):
                await serve(worker, "ldm-ask", ask, queue_group="q")
                await serve(worker, "ldm-read", read, queue_group="q")
            await one.subscribe(subject("ldm-event"), Ask, lambda event: events.update([event.number]), max_queued=9999)
            async with Load(caller, "ldm").running() as load:
                await asyncio.sleep(0.5)
                leaving.lame_duck()
                for number in range(300):
                    await caller.publish(subject("ldm-event"), Ask(number=number))
                    await asyncio.sleep(0.01)
                await until(lambda: caller._connection.num_rebuilt == one._connection.num_rebuilt == 1, BACK_S)
                await asyncio.sleep(1.0)
                so_far = load.num_requests
                await until(lambda: load.num_requests > so_far + 50, BACK_S)
            assert load.errors == []
            assert load.num_streams > 3
            assert {number: count for number, count in handled.items() if count != 1} == {}
            assert {number: events[number] for number in range(300) if events[number] != 1} == {}
            assert _ports(caller) == _ports(one) == {staying.port}


def _ports(bus: Bus) -> set[int]:
    url = bus._connection._client.connected_url
    return {url.port} if url and url.port else set()


async def test_servers_that_leave_one_after_another_are_left_one_after_another(tmp_path: Path) -> None:
    """The second announcement comes while the first one's connection is still being put away."""
    with nats_cluster(tmp_path) as (first, second):
        async with a_bus("serving", first.url) as bus, a_bus("calling", first.url) as caller:
            lost: list[BusError] = []
            for each in (bus, caller):
                each._connection.on_loss(lambda error, subject: lost.append(error))
            await serve(bus, "echo", echo)
            first.lame_duck()
            await until(lambda: _ports(bus) == _ports(caller) == {second.port}, BACK_S)
            first.kill()
            first.start()
            await until(lambda: not bus._connection._client._server_info.get("ldm"), BACK_S)
            second.lame_duck()
            await until(lambda: _ports(bus) == _ports(caller) == {first.port}, BACK_S)
            await answered(caller, "echo")
            assert [each._connection.num_rebuilt for each in (bus, caller)] == [2, 2]
            assert lost == []


async def test_what_is_subscribed_to_during_a_move_is_heard_after_it(tmp_path: Path) -> None:
    with nats_cluster(tmp_path) as (leaving, staying):
        async with a_bus("serving", leaving.url) as bus, a_bus("calling", staying.url) as caller:
            heard: set[str] = set()
            names: list[str] = []
            leaving.lame_duck()
            while bus._connection.num_rebuilt == 0:
                names.append(f"reconnect.during.{len(names)}")
                await bus._connection.subscribe(names[-1], lambda message: heard.add(message.subject))
                await asyncio.sleep(0)
            await until(lambda: not bus._connection._retiring, BACK_S)
            await bus._connection.confirm_subscriptions(5)
            for name in names:
                await caller._connection.publish(name, b"")
            await until(lambda: len(heard) == len(names), BACK_S)


async def test_what_drains_during_a_move_loses_no_request(tmp_path: Path) -> None:
    with nats_cluster(tmp_path) as (leaving, staying):
        async with a_bus("staying", staying.url) as other, a_bus("calling", staying.url) as caller:
            await serve(other, "drain-ask", echo, queue_group="q")
            await serve(other, "drain-read", _read_all, queue_group="q")
            async with Load(caller, "drain").running() as load:
                async with a_bus("leaving", leaving.url) as going:
                    await serve(going, "drain-ask", echo, queue_group="q")
                    leaving.lame_duck()
                    await until(lambda: going._connection.num_rebuilt == 1, BACK_S)
                await asyncio.sleep(0.3)
            assert load.errors == []


async def _read_all(request: Ask) -> AsyncGenerator[Counted, None]:
    for number in range(request.number):
        yield Counted(number=number)


async def test_the_only_server_in_lame_duck_is_used_to_its_end_and_found_again(tmp_path: Path) -> None:
    configuration = 'lame_duck_duration: "30s"\nlame_duck_grace_period: "500ms"'
    with nats_process(tmp_path, configuration) as server:
        async with a_bus("serving", server.url) as bus, a_bus("calling", server.url) as caller:
            await serve(bus, "echo", echo)
            server.lame_duck()
            await asyncio.sleep(0.2)
            assert await caller.request(subject("echo"), Ask(number=1), Told, timeout_s=2) == Told(number=1)
            await until(lambda: not server.is_alive, BACK_S)
            server.kill()
            server.start()
            await answered(caller, "echo")
            await until(lambda: bus.is_ready and caller.is_ready, BACK_S)


async def test_closing_ends_at_once_though_no_connection_can_be_made(tmp_path: Path) -> None:
    with nats_process(tmp_path) as server:
        connection = await Connection.open(server.url, "closing", 5)
        await connection.subscribe("reconnect.closing", lambda message: None)
        server.kill()
        await until(lambda: not connection.is_connected, BACK_S)
        connection._rebuild(connection._client, "a test wants it")
        await asyncio.sleep(0.1)
        started_s = time.monotonic()
        await connection.close(1.0)
        assert time.monotonic() - started_s < 4
        assert connection._rebuilding is not None
        assert connection._rebuilding.done()


async def test_closing_during_a_move_closes_both_connections(tmp_path: Path) -> None:
    with nats_cluster(tmp_path) as (leaving, staying):
        connection = await Connection.open(leaving.url, "moving", 5)
        await connection.subscribe("reconnect.moving", lambda message: None)
        old = connection._client
        leaving.lame_duck()
        await until(lambda: connection._client is not old, BACK_S)
        await connection.close(1.0)
        assert old.is_closed
        assert connection._client.is_closed
        assert staying.is_alive


async def test_a_connection_that_nats_py_closed_for_good_is_made_anew(tmp_path: Path) -> None:
    with nats_process(tmp_path) as server:
        async with a_bus("serving", server.url) as bus, a_bus("calling", server.url) as caller:
            await serve(bus, "echo", echo)
            held = asyncio.create_task(caller.request(subject("nowhere"), Ask(), Told, timeout_s=LONG_S))
            await asyncio.gather(held, return_exceptions=True)
            await bus._connection._client.close()
            await caller._connection._client.close()
            await answered(caller, "echo")
            assert caller.stats()["nats_rebuilt"] == bus.stats()["nats_rebuilt"] == 1


async def test_an_idempotent_call_waits_for_the_server_to_come_back(tmp_path: Path) -> None:
    with nats_process(tmp_path) as nats:
        async with a_bus("serving", nats.url) as serving, a_bus("calling", nats.url) as calling:
            num_begun = 0

            async def answer(request: Ask) -> Told:
                nonlocal num_begun
                num_begun += 1
                if num_begun == 1:
                    await asyncio.sleep(LONG_S)
                return Told(number=request.number)

            await serve(serving, "again", answer)
            again = RetryPolicy(idempotent=True)
            asking = asyncio.create_task(
                calling.request(subject("again"), Ask(number=7), Told, timeout_s=LONG_S, retry=again)
            )
            await until(lambda: num_begun == 1)
            nats.kill()
            await asyncio.sleep(0.6)
            nats.start()
            await until(lambda: serving.is_ready, BACK_S)
            assert (await asyncio.wait_for(asking, BACK_S)).number == 7
