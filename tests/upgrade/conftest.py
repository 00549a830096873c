"""A nats-server, and one worker of each version with a data plane, for all tests of a module."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import pytest_asyncio

from bus import Bus, BusConfig, EmbeddedServer, embedded_server, write_key_file
from tests.upgrade.versions import THIS, PeerProcess, Version, unpacked, worker


class Pair(NamedTuple):
    """A worker of the version before, and one of this."""

    before: PeerProcess
    this: PeerProcess


@pytest.fixture(scope="session")
def version_before() -> Iterator[Version]:
    with TemporaryDirectory() as folder:
        yield unpacked(Path(folder).resolve())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[EmbeddedServer]:
    async with embedded_server() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(
    server: EmbeddedServer, version_before: Version, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    key = tmp_path_factory.mktemp("key") / "key"
    write_key_file(key)
    async with (
        worker(version_before, "before", server.url, str(key)) as before,
        worker(THIS, "this", server.url, str(key)) as this,
    ):
        yield Pair(before, this)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def driver(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with Bus.open(BusConfig(worker_id="driver", nats_url=server.url), data_plane=False) as opened:
        yield opened
