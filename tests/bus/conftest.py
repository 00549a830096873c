"""A real nats-server for the bus's tests, one per session, and clients of it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from nats.aio.client import Client

from bus import Bus, BusConfig, EmbeddedServer, embedded_server, write_key_file


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    started: list[EmbeddedServer] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with embedded_server() as running:
            started.append(running)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(20)
    yield started[0]
    stop.set()
    thread.join(20)


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("key") / "key"
    write_key_file(path)
    return str(path)


@pytest.fixture
async def bus(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with Bus.open(BusConfig(worker_id="serving", nats_url=server.url), data_plane=False) as opened:
        yield opened


@pytest.fixture
async def caller(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with Bus.open(BusConfig(worker_id="calling", nats_url=server.url), data_plane=False) as opened:
        yield opened


@pytest.fixture
async def raw(server: EmbeddedServer) -> AsyncIterator[Client]:
    client = Client()
    await client.connect(server.url)
    yield client
    await client.close()
