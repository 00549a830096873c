"""The pytest fixtures, found by pytest itself wherever nixlbus is installed; docs/testing.md shows them at work.

In: a test's arguments. Out: a nats-server, buses, recorded spans, a network with faults; all gone when the test, or for
the server and the key the session, ends.
Invariants: every name begins with `nixlbus_`; loading this imports nothing of the bus, of NATS or of torch, until a
test asks for a fixture; no fixture but `nixlbus_bus` needs an event loop: the others suit plain tests, too.
"""

import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from bus.bus import Bus
    from bus.control_plane.embedded_server import EmbeddedServer
    from bus.testing.fault_proxy import FaultProxy
    from observability.span_recorder import SpanRecorder


class OpenBus(Protocol):
    """What `nixlbus_open` gives."""

    def __call__(
        self, worker_id: str = "", *, data_plane: bool = False, **settings: Any
    ) -> "AbstractAsyncContextManager[Bus]":
        """`async with nixlbus_open("worker-1") as bus:`; `settings` are fields of `BusConfig`.

        Without them: the session's server and key, a name that nobody else has, and no data plane.
        """
        ...


@pytest.fixture(scope="session")
def nixlbus_server() -> "Iterator[EmbeddedServer]":
    """A real nats-server with JetStream on a free port of 127.0.0.1: `.url`, `.monitoring_url`, `.pid`.

    One for the whole session. What a test leaves in JetStream is there for the next one.
    """
    from bus.control_plane.embedded_server import embedded_server
    from bus.testing.own_thread import in_own_thread

    with in_own_thread(embedded_server(), name="nixlbus-server") as (server, _):
        yield server


@pytest.fixture(scope="session")
def nixlbus_key_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a key that proves membership to each other: `NIXLBUS_KEY_FILE` of workers that move tensors."""
    from bus.handshake.authentication import write_key_file

    path = tmp_path_factory.mktemp("nixlbus") / "key"
    write_key_file(path)
    return str(path)


@pytest.fixture
def nixlbus_open(nixlbus_server: "EmbeddedServer", nixlbus_key_file: str) -> OpenBus:
    """Opens as many buses as a test wants, on whatever event loop it runs; see `OpenBus`."""
    from bus.bus import Bus
    from bus.config import BusConfig

    def open_bus(
        worker_id: str = "", *, data_plane: bool = False, **settings: Any
    ) -> "AbstractAsyncContextManager[Bus]":
        values = {
            "worker_id": worker_id or f"test-{secrets.token_hex(4)}",
            "nats_url": nixlbus_server.url,
            "key_file": nixlbus_key_file,
            **settings,
        }
        return Bus.open(BusConfig(**values), data_plane=data_plane)

    return open_bus


@pytest.fixture
def nixlbus_spans() -> "Iterator[SpanRecorder]":
    """The spans of this process that end during the test, whether or not tracing is configured."""
    from observability.span_recorder import SpanRecorder

    with SpanRecorder() as spans:
        yield spans


@pytest.fixture
def nixlbus_faults(nixlbus_server: "EmbeddedServer") -> "Iterator[FaultProxy]":
    """A network before the session's server, with faults to order: give `nixlbus_faults.url` to who is to have them."""
    from bus.testing.fault_proxy import FaultProxy
    from bus.testing.own_thread import in_own_thread

    with in_own_thread(FaultProxy(nixlbus_server.url), name="nixlbus-faults") as (faults, _):
        yield faults


async def _open_bus(nixlbus_open: OpenBus) -> "AsyncIterator[Bus]":
    """An open bus without a data plane; `nixlbus_open` gives any other."""
    async with nixlbus_open() as bus:
        yield bus


def _no_loop() -> None:
    """An open bus without a data plane; it needs pytest-asyncio."""
    pytest.fail("the fixture nixlbus_bus needs pytest-asyncio: pip install pytest-asyncio", pytrace=False)


def _bus_fixture() -> Callable[..., Any]:
    if find_spec("pytest_asyncio") is None:
        return pytest.fixture(name="nixlbus_bus")(_no_loop)
    import pytest_asyncio

    return pytest_asyncio.fixture(name="nixlbus_bus")(_open_bus)


nixlbus_bus = _bus_fixture()
