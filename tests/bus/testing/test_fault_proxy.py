"""Every fault, between real connections and a real nats-server; and the network itself, when it has no fault."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import torch
from nats.aio.client import Client

from bus import (
    Bus,
    ConnectionLost,
    DeadlineExceeded,
    EmbeddedServer,
    EndpointConfig,
    RemoteProtocolError,
    embedded_server,
    server_binary,
)
from bus.testing import FaultProxy, ProxyError, fault_proxy, in_own_thread
from bus.testing.plugin import OpenBus
from schemas.message import Message
from schemas.subjects import Subject

PROMPTLY_S = 2.0
LONG_S = 20.0


class Ask(Message, frozen=True, kw_only=True, tag="testing.ask"):
    number: int = 0
    payload: bytes = b""


class Told(Message, frozen=True, kw_only=True, tag="testing.told"):
    number: int = 0
    seq: int = 0
    payload: bytes = b""


class Last(Message, frozen=True, kw_only=True, tag="testing.last"):
    seq: int


def subject(name: str) -> Subject:
    return Subject(f"testing.{name}", f"testing.{name}")


@pytest.fixture
async def behind(nixlbus_open: OpenBus, nixlbus_faults: FaultProxy) -> AsyncIterator[Bus]:
    """A bus with the network of `nixlbus_faults` before it."""
    async with nixlbus_open("behind", nats_url=nixlbus_faults.url) as opened:
        yield opened


async def serve_echo(bus: Bus, name: str) -> list[int]:
    """Serve `name` and return the list of the numbers asked with."""
    asked: list[int] = []

    async def answer(request: Ask) -> Told:
        asked.append(request.number)
        return Told(number=request.number, payload=request.payload)

    await bus.serve(EndpointConfig(name, subject(name), Ask), answer)
    return asked


async def serve_three_frames(bus: Bus, name: str) -> None:
    async def frames(request: Ask) -> AsyncGenerator[Message, None]:
        for seq in range(3):
            yield Told(seq=seq)
        yield Last(seq=3)

    await bus.serve(EndpointConfig(name, subject(name), Ask), frames)


async def read_stream(bus: Bus, name: str) -> list[Message]:
    frames = bus.stream(subject(name), Ask(), Told, Last, timeout_s=LONG_S)
    async with contextlib.aclosing(frames):
        return [frame async for frame in frames]


async def ask(bus: Bus, name: str, number: int = 0, timeout_s: float = LONG_S) -> int:
    return (await bus.request(subject(name), Ask(number=number), Told, timeout_s=timeout_s)).number


async def test_without_a_fault_nothing_is_changed(behind: Bus, bus: Bus) -> None:
    await serve_echo(bus, "large")
    payload = os.urandom(7 << 20)
    calls = [
        behind.request(subject("large"), Ask(number=number, payload=payload[number:]), Told, timeout_s=LONG_S)
        for number in range(4)
    ]
    for number, reply in enumerate(await asyncio.gather(*calls)):
        assert (reply.number, reply.payload == payload[number:]) == (number, True)


async def test_many_connections_are_carried_at_once(
    bus: Bus, nixlbus_open: OpenBus, nixlbus_faults: FaultProxy
) -> None:
    asked = await serve_echo(bus, "many")
    async with contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(nixlbus_open(nats_url=nixlbus_faults.url)) for _ in range(20)]
        assert nixlbus_faults.num_connections == 20
        numbers = range(200)
        answered = await asyncio.gather(*(ask(callers[number % 20], "many", number) for number in numbers))
        assert answered == sorted(asked) == list(numbers)
    async with asyncio.timeout(LONG_S):
        while nixlbus_faults.num_connections:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_dropped_request_is_noticed_at_its_deadline_and_the_next_one_works(
    behind: Bus, bus: Bus, nixlbus_faults: FaultProxy
) -> None:
    asked = await serve_echo(bus, "dropped")
    rule = nixlbus_faults.drop("testing.dropped")
    started_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await ask(behind, "dropped", 1, timeout_s=0.3)
    assert 0.25 < time.monotonic() - started_s < PROMPTLY_S
    assert await ask(behind, "dropped", 2) == 2
    assert (asked, rule.hits) == ([2], 1)


async def test_a_dropped_reply_is_the_caller_s_deadline_though_the_work_was_done(
    behind: Bus, caller: Bus, nixlbus_faults: FaultProxy
) -> None:
    asked = await serve_echo(behind, "unanswered")
    rule = nixlbus_faults.drop("_INBOX.>", count=None)
    with pytest.raises(DeadlineExceeded):
        await ask(caller, "unanswered", 1, timeout_s=0.3)
    rule.remove()
    assert await ask(caller, "unanswered", 2) == 2
    assert (asked, rule.hits) == ([1, 2], 1)


async def test_a_delayed_reply_comes_late_and_holds_up_no_other(
    behind: Bus, caller: Bus, nixlbus_faults: FaultProxy
) -> None:
    await serve_echo(behind, "late")
    rule = nixlbus_faults.delay("_INBOX.>", 0.4)
    started_s = time.monotonic()
    late = asyncio.create_task(ask(caller, "late", 1))
    await rule.wait_for_hits()
    assert await ask(caller, "late", 2) == 2
    assert not late.done()
    assert await late == 1
    assert 0.4 <= time.monotonic() - started_s < PROMPTLY_S


async def test_messages_that_are_all_delayed_stay_in_order(behind: Bus, bus: Bus, nixlbus_faults: FaultProxy) -> None:
    numbers = await listen(bus, "slow")
    nixlbus_faults.delay("testing.slow", 0.1, count=None)
    await publish(behind, "slow", range(50))
    await until(lambda: len(numbers) == 50)
    assert numbers == list(range(50))


async def test_a_duplicated_request_is_served_twice_and_answered_once(
    behind: Bus, bus: Bus, nixlbus_faults: FaultProxy
) -> None:
    asked = await serve_echo(bus, "twice")
    nixlbus_faults.duplicate("testing.twice")
    assert await ask(behind, "twice", 1) == 1
    assert await ask(behind, "twice", 2) == 2
    await until(lambda: asked == [1, 1, 2])


async def test_a_duplicated_event_comes_twice(behind: Bus, bus: Bus, nixlbus_faults: FaultProxy) -> None:
    numbers = await listen(bus, "event")
    rule = nixlbus_faults.duplicate("testing.*")
    await publish(behind, "event", range(3))
    await until(lambda: len(numbers) == 4)
    assert (numbers, rule.hits) == ([0, 0, 1, 2], 1)


async def test_a_publication_with_a_message_id_is_stored_once_however_often_it_comes(
    nixlbus_faults: FaultProxy,
) -> None:
    client = Client()
    await client.connect(nixlbus_faults.url)
    jetstream = client.jetstream()
    await jetstream.add_stream(name="once", subjects=["once.>"])
    nixlbus_faults.duplicate("once.*")
    await jetstream.publish("once.a", b"1", headers={"Nats-Msg-Id": "1"})
    assert (await jetstream.publish("once.a", b"2", headers={"Nats-Msg-Id": "2"})).seq == 2
    await jetstream.delete_stream("once")
    await client.close()


async def test_reordered_frames_are_read_in_their_order(behind: Bus, caller: Bus, nixlbus_faults: FaultProxy) -> None:
    await serve_three_frames(behind, "disordered")
    rule = nixlbus_faults.reorder("_INBOX.>")
    frames = await read_stream(caller, "disordered")
    assert rule.hits == 2
    assert [getattr(frame, "seq", None) for frame in frames] == [0, 1, 2, 3]


async def test_a_lost_frame_is_a_typed_gap(behind: Bus, caller: Bus, nixlbus_faults: FaultProxy) -> None:
    await serve_three_frames(behind, "gap")
    nixlbus_faults.drop("_INBOX.>")
    with pytest.raises(RemoteProtocolError):
        await read_stream(caller, "gap")


async def test_a_duplicated_frame_is_never_read_twice(behind: Bus, caller: Bus, nixlbus_faults: FaultProxy) -> None:
    await serve_three_frames(behind, "doubled")
    nixlbus_faults.duplicate("_INBOX.>")
    with contextlib.suppress(RemoteProtocolError):
        frames = await read_stream(caller, "doubled")
        assert [getattr(frame, "seq", None) for frame in frames] == [0, 1, 2, 3]
    assert len(await read_stream(caller, "doubled")) == 4


async def test_reordered_messages_come_in_the_opposite_order(behind: Bus, bus: Bus, nixlbus_faults: FaultProxy) -> None:
    numbers = await listen(bus, "reversed")
    nixlbus_faults.reorder("testing.reversed", count=3, within_s=LONG_S)
    await publish(behind, "reversed", range(5))
    await until(lambda: len(numbers) == 5)
    assert numbers == [2, 1, 0, 3, 4]
    await until(lambda: nixlbus_faults._held_bytes == 0)


async def test_a_message_that_waits_for_another_goes_on_without_it_in_time(
    behind: Bus, bus: Bus, nixlbus_faults: FaultProxy
) -> None:
    numbers = await listen(bus, "alone")
    nixlbus_faults.reorder("testing.alone", within_s=0.2)
    await publish(behind, "alone", [1])
    await until(lambda: numbers == [1])
    await publish(behind, "alone", [2, 3])
    await until(lambda: numbers == [1, 2, 3])
    await until(lambda: nixlbus_faults._held_bytes == 0)


async def test_a_rule_that_is_removed_lets_go_what_it_holds(behind: Bus, bus: Bus, nixlbus_faults: FaultProxy) -> None:
    numbers = await listen(bus, "removed")
    rule = nixlbus_faults.reorder("testing.removed", within_s=LONG_S)
    await publish(behind, "removed", [1])
    await rule.wait_for_hits()
    assert numbers == []
    rule.remove()
    await until(lambda: numbers == [1])
    nixlbus_faults.drop("testing.removed", count=None)
    nixlbus_faults.pause()
    nixlbus_faults.clear()
    await publish(behind, "removed", [2])
    await until(lambda: numbers == [1, 2])


async def test_a_rule_that_took_nothing_says_so(nixlbus_faults: FaultProxy) -> None:
    with pytest.raises(TimeoutError, match=r"drop 'a\.b' took 0 of 1"):
        await nixlbus_faults.drop("a.b").wait_for_hits(timeout_s=0.02)
    with pytest.raises(ValueError, match="no pattern"):
        nixlbus_faults.drop("a..b")


async def test_a_cut_is_known_at_once_and_the_connection_comes_back(
    behind: Bus, bus: Bus, nixlbus_faults: FaultProxy
) -> None:
    await serve_echo(bus, "cut")
    nixlbus_faults.drop("testing.cut")
    request = asyncio.create_task(ask(behind, "cut"))
    await asyncio.sleep(0.05)
    started_s = time.monotonic()
    nixlbus_faults.cut()
    with pytest.raises(ConnectionLost):
        await request
    assert time.monotonic() - started_s < PROMPTLY_S
    await until(lambda: behind.is_ready)
    assert await ask(behind, "cut", 7) == 7
    assert await ask(bus, "cut", 8) == 8  # who isn't behind the proxy noticed nothing


async def test_a_cut_reaches_connections_in_a_black_hole(behind: Bus, nixlbus_faults: FaultProxy) -> None:
    nixlbus_faults.pause()
    assert nixlbus_faults.num_connections == 1
    nixlbus_faults.cut()
    await until(lambda: not behind.is_ready)
    await until(lambda: nixlbus_faults.num_connections == 0)
    nixlbus_faults.resume()
    await until(lambda: behind.is_ready)


async def test_a_black_holed_link_is_the_deadline_of_a_request_and_loses_nothing(
    behind: Bus, bus: Bus, nixlbus_faults: FaultProxy
) -> None:
    asked = await serve_echo(bus, "hole")
    numbers = await listen(behind, "toward")
    nixlbus_faults.pause()
    started_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await ask(behind, "hole", 1, timeout_s=0.3)
    assert time.monotonic() - started_s < PROMPTLY_S
    await publish(bus, "toward", [5])
    await asyncio.sleep(0.1)
    assert (asked, numbers) == ([], [])
    nixlbus_faults.resume()
    await until(lambda: numbers == [5])
    assert await ask(behind, "hole", 2) == 2
    assert behind.is_ready


async def test_who_connects_into_a_black_hole_hears_nothing(nixlbus_open: OpenBus, nixlbus_faults: FaultProxy) -> None:
    nixlbus_faults.pause()
    with pytest.raises(ConnectionLost):
        await nixlbus_open(nats_url=nixlbus_faults.url, connect_timeout_s=0.3).__aenter__()


def test_a_black_hole_takes_in_a_bounded_number_of_bytes(nixlbus_faults: FaultProxy) -> None:
    with plain_connection(nixlbus_faults) as client:
        nixlbus_faults.pause()
        assert flooded_bytes(client) < 64 << 20


def test_a_server_that_does_not_read_stops_who_sends_to_it() -> None:
    with (
        in_own_thread(embedded_server(), name="server") as (server, _),
        in_own_thread(FaultProxy(server.url), name="faults") as (faults, _),
        plain_connection(faults) as client,
    ):
        os.kill(server.pid, signal.SIGSTOP)
        try:
            assert flooded_bytes(client) < 64 << 20
        finally:
            os.kill(server.pid, signal.SIGCONT)


async def test_a_client_that_does_not_read_fills_no_buffer_of_the_proxy(
    raw: Client, nixlbus_faults: FaultProxy
) -> None:
    with plain_connection(nixlbus_faults) as client:
        client.sendall(b"SUB testing.unread 1\r\nPING\r\n")
        assert client.recv(1 << 16) == b"PONG\r\n"
        for _ in range(40):
            await raw.publish("testing.unread", b"x" * (1 << 20))
        await raw.flush()
        await asyncio.sleep(0.3)
        (way,) = nixlbus_faults._ways
        assert way._to_client.transport.get_write_buffer_size() < 1 << 20


@contextlib.contextmanager
def plain_connection(faults: FaultProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(faults.url.rpartition(":")[2]))) as client:
        client.settimeout(5)
        client.recv(1 << 16)
        client.sendall(b'CONNECT {"verbose":false}\r\nPING\r\n')
        assert client.recv(1 << 16) == b"PONG\r\n"
        yield client


def flooded_bytes(client: socket.socket) -> int:
    """How much of a quarter of a gigabyte of messages can be sent until nothing moves for half a second."""
    client.settimeout(0.5)
    num_sent = 0
    message = b"PUB testing.flood 65536\r\n" + b"x" * 65536 + b"\r\n"
    with contextlib.suppress(TimeoutError):
        while num_sent < 256 << 20:
            num_sent += client.send(message)
    return num_sent


async def test_what_is_held_back_is_bounded(
    behind: Bus, bus: Bus, nixlbus_faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_proxy, "MAX_HELD_BYTES", 10_000)
    numbers = await listen(bus, "held")
    rule = nixlbus_faults.delay("testing.held", 0.2, count=None)
    await publish(behind, "held", range(40), payload=b"x" * 1000)
    held_bytes = [0]

    def all_came() -> bool:
        held_bytes.append(nixlbus_faults._held_bytes)
        return len(numbers) == 40

    await until(all_came)
    assert 9_000 < max(held_bytes) < 12_000
    assert (numbers, rule.hits) == (list(range(40)), 40)
    await until(lambda: nixlbus_faults._held_bytes == 0)


# nats-py leaves the transport of a failed reconnection open; it is collected here, and so is no other test's failure.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_server_that_goes_ends_the_connections_to_it_and_may_come_back(nixlbus_open: OpenBus) -> None:
    async with embedded_server() as first:
        port = int(first.url.rpartition(":")[2])
        async with FaultProxy(first.url) as faults:  # on the test's own loop
            async with nixlbus_open(nats_url=faults.url) as bus:
                os.kill(first.pid, signal.SIGKILL)
                await until(lambda: not bus.is_ready)
                async with embedded_server(port=port):
                    await until(lambda: bus.is_ready)
                    await serve_echo(bus, "again")
                    assert await ask(bus, "again", 3) == 3
            assert faults.num_connections == 0
    await asyncio.sleep(0)
    gc.collect()


async def test_a_lost_ack_is_asked_for_and_a_second_one_is_harmless(
    nixlbus_open: OpenBus, nixlbus_faults: FaultProxy
) -> None:
    async with (
        nixlbus_open("target", data_plane=True) as target,
        nixlbus_open("initiator", data_plane=True, nats_url=nixlbus_faults.url) as initiator,
    ):
        doubled = nixlbus_faults.duplicate("nixlbus.v1.ack.target.>")
        await write_ones(target, initiator, lease_s=10)
        assert doubled.hits == 1
        lost = nixlbus_faults.drop("nixlbus.v1.ack.target.>")
        started_s = time.monotonic()
        await write_ones(target, initiator, lease_s=2)
        assert lost.hits == 1
        assert time.monotonic() - started_s > 0.9  # half the lease
        await write_ones(target, initiator, lease_s=10)
        assert target.stats()["grants_open"] == 0


async def write_ones(target: Bus, initiator: Bus, lease_s: float) -> None:
    memory = torch.zeros(1024)
    async with await target.create_writable(memory, lease_s=lease_s) as writable:
        writing = asyncio.create_task(write(initiator, writable.metadata))
        await writable
        await writing
    assert memory.sum() == 1024


async def write(initiator: Bus, metadata: object) -> None:
    await (await initiator.begin_write(metadata, torch.ones(1024)))  # type: ignore[arg-type]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[str]]:
    """The URLs of two nats-servers that tell clients of each other."""
    processes, urls, routes = [], [], ""
    try:
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            conf = folder / "conf"
            conf.write_text(
                f'listen: "127.0.0.1:-1"\nports_file_dir: "{folder}"\nserver_name: {name}\n'
                f'cluster {{ name: c, listen: "127.0.0.1:-1", {routes} }}\n'
            )
            process = subprocess.Popen([server_binary(), "-c", str(conf)], stderr=subprocess.DEVNULL)
            processes.append(process)
            ports = ports_of(folder / f"nats-server_{process.pid}.ports")
            urls.append(ports["nats"][0])
            routes = f'routes: ["{ports["cluster"][0]}"]'
        yield urls
    finally:
        for process in processes:
            process.terminate()
            process.wait(5)


def ports_of(path: Path) -> dict[str, list[str]]:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError, ValueError):
            ports: dict[str, list[str]] = json.loads(path.read_text())
            return ports
        time.sleep(0.02)
    raise AssertionError("the nats-server did not start")


async def test_info_never_leads_a_client_around_the_proxy(cluster: list[str]) -> None:
    direct, through = Client(), Client()
    async with FaultProxy(cluster[0]) as faults:
        await direct.connect(cluster[0])
        await through.connect(faults.url)
        async with asyncio.timeout(LONG_S):
            while not direct.discovered_servers:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await through.flush()
        assert through.discovered_servers == []
        assert through.connected_server_version.major == 2
        await through.close()
        late = Client()
        await late.connect(faults.url)
        assert late.discovered_servers == []
        await late.close()
        await direct.close()


@pytest.mark.parametrize(
    "url", ["tls://127.0.0.1:4222", "ws://127.0.0.1:80", "127.0.0.1:4222", "nats://a:1,nats://b:2", "nats://"]
)
def test_what_the_proxy_can_t_speak_is_refused(url: str) -> None:
    with pytest.raises(ProxyError, match="neither TLS nor WebSocket"):
        FaultProxy(url)


def test_credentials_of_the_server_s_url_are_in_the_proxy_s(nixlbus_server: EmbeddedServer) -> None:
    with in_own_thread(FaultProxy(nixlbus_server.url.replace("//", "//u:p@")), name="t") as (faults, _):
        assert faults.url.startswith("nats://u:p@127.0.0.1:")
        assert faults.url != nixlbus_server.url


async def test_a_server_that_requires_tls_is_refused_and_says_why(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text(CERTIFICATE)
    key.write_text(PRIVATE_KEY)
    conf = tmp_path / "conf"
    conf.write_text(
        f'listen: "127.0.0.1:-1"\nports_file_dir: "{tmp_path}"\n'
        f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}\n'
    )
    process = subprocess.Popen([server_binary(), "-c", str(conf)], stderr=subprocess.DEVNULL)  # noqa: ASYNC220
    try:
        ports = await asyncio.to_thread(ports_of, tmp_path / f"nats-server_{process.pid}.ports")
        url = ports["nats"][0].replace("tls://", "nats://")
        with pytest.raises(ProxyError, match="requires TLS"):
            await FaultProxy(url).__aenter__()
    finally:
        process.terminate()
        process.wait(5)


def test_a_server_that_isn_t_there_is_an_error_of_the_thread_that_asks() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"nats://127.0.0.1:{unused.getsockname()[1]}"
        with (
            pytest.raises(ProxyError, match="no nats-server greets"),
            in_own_thread(FaultProxy(url), name="t"),
        ):
            raise AssertionError("entered")


async def listen(bus: Bus, name: str) -> list[int]:
    numbers: list[int] = []
    await bus.subscribe(subject(name), Ask, lambda message: numbers.append(message.number))
    return numbers


async def publish(bus: Bus, name: str, numbers: "range | list[int]", payload: bytes = b"") -> None:
    for number in numbers:
        await bus.publish(subject(name), Ask(number=number, payload=payload))


async def until(condition: Callable[[], bool], timeout_s: float = LONG_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# Of a throw-away certificate, for a server that is only asked whether it wants TLS.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBfzCCASWgAwIBAgIUR5UqT8br/LEPWaqrxH8i2ZKScyswCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTE1MTk1MFoYDzIxMjYxMDI4
MTUxOTUwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARaFENyNAQKYDmiCr1eu8oXgfIsON6Ny9JDrFhEuz8+LU/tTD1gEMM2
3AlZdIg1oAJfdjAakelnAxHKcNBGvs8bo1MwUTAdBgNVHQ4EFgQUI5pGx5G92RUk
ph+pIE86OXq2ktgwHwYDVR0jBBgwFoAUI5pGx5G92RUkph+pIE86OXq2ktgwDwYD
VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiEAxumLnZq5IvGuRCZkeNra
ZNOdKsK7/FlSaUluCuSriNMCICtnrxPASfoWL4QadozjUedTNAkML9BsK3icGRip
4fn2
-----END CERTIFICATE-----
"""
PRIVATE_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgBR5D30f4yLrakcz/
vzc42Ra2k9VmjapV2htXhqUJdZOhRANCAARaFENyNAQKYDmiCr1eu8oXgfIsON6N
y9JDrFhEuz8+LU/tTD1gEMM23AlZdIg1oAJfdjAakelnAxHKcNBGvs8b
-----END PRIVATE KEY-----
"""
