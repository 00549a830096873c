"""A nats-server for workers that are not the packaged graph's."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from bus import EmbeddedServer, embedded_server


@pytest.fixture(scope="session")
def nats() -> Iterator[EmbeddedServer]:
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
