"""A real nats-server for the bus's tests, one per session, and clients of it: the fixtures of `bus.testing.plugin`."""

from collections.abc import AsyncIterator

import pytest
from nats.aio.client import Client

from bus import Bus, EmbeddedServer
from bus.testing.plugin import OpenBus


@pytest.fixture(scope="session")
def server(nixlbus_server: EmbeddedServer) -> EmbeddedServer:
    return nixlbus_server


@pytest.fixture(scope="session")
def key_file(nixlbus_key_file: str) -> str:
    return nixlbus_key_file


@pytest.fixture
async def bus(nixlbus_open: OpenBus) -> AsyncIterator[Bus]:
    async with nixlbus_open("serving") as opened:
        yield opened


@pytest.fixture
async def caller(nixlbus_open: OpenBus) -> AsyncIterator[Bus]:
    async with nixlbus_open("calling") as opened:
        yield opened


@pytest.fixture
async def raw(server: EmbeddedServer) -> AsyncIterator[Client]:
    client = Client()
    await client.connect(server.url)
    yield client
    await client.close()
