"""A whole graph on this machine: nats-server, trace store, and one process per role, for as long as a context lasts.

In: ports (0 = any free one) and settings. Out: a `LocalGraph` whose workers are all ready. The demo, `nixlbus up`,
the evaluation, the benchmarks and the tests start the same thing; a deployment starts the parts on their own.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bus import Bus, BusConfig, EmbeddedServer, ServerUnavailable, embedded_server, write_key_file
from observability.trace_store import TraceStore
from schemas.traces import TRACE_STORE_ID
from workers.launcher import WorkerProcess, running
from workers.process import Progress, WorkerSpec
from workers.roles import GRAPH_ROLES
from workers.roles.traces import TracesWorker
from workers.settings import Settings

Observer = Callable[[str, Progress], None]


@dataclass(frozen=True)
class LocalGraph:
    """A running graph."""

    server: EmbeddedServer
    http_url: str
    otlp_endpoint: str
    key_file: str
    store: TraceStore | None
    """The traces that its processes send; None where they are sent elsewhere, or nowhere."""
    workers: list[WorkerProcess]

    @property
    def nats_url(self) -> str:
        """Where its nats-server is."""
        return self.server.url

    @property
    def monitoring_url(self) -> str:
        """Where that tells of itself over HTTP."""
        return self.server.monitoring_url

    async def server_ended(self) -> NoReturn:
        """Wait for its nats-server to end by itself; raises `ServerUnavailable` then."""
        status = await self.server.ended()
        raise ServerUnavailable(f"nats-server (process {self.server.pid}) ended by itself with status {status}")


@asynccontextmanager
async def local_graph(
    settings: Settings,
    *,
    nats_port: int = 0,
    key_file: str = "",
    roles: Sequence[str] = GRAPH_ROLES,
    otlp_endpoint: str | None = None,
    on_progress: Observer = lambda role, progress: None,
) -> AsyncIterator[LocalGraph]:
    """Start it, yield it when every worker is ready, drain and stop it.

    `otlp_endpoint`: None for a trace store of its own, "" for no tracing, else where spans go. Raises
    `ServerUnavailable` and `WorkerFailed`.
    """
    async with AsyncExitStack() as stack:
        key_file = key_file or _own_key_file(stack)
        on_progress("nats-server", Progress("connecting"))
        server = await stack.enter_async_context(embedded_server(port=nats_port))
        on_progress("nats-server", Progress("ready", server.url))
        store = None
        if otlp_endpoint is None:
            traces = await stack.enter_async_context(_trace_store(server.url, settings))
            store, otlp_endpoint = traces.store, traces.receiver.endpoint
            on_progress("traces", Progress("ready", otlp_endpoint))
        configs = {role: BusConfig.from_env(role, nats_url=server.url, key_file=key_file) for role in roles}
        specs = [WorkerSpec(role, config, settings, otlp_endpoint) for role, config in configs.items()]
        workers = await stack.enter_async_context(running(specs, on_progress))
        http_url = next((worker.detail for worker in workers if worker.spec.role == "frontend"), "")
        yield LocalGraph(server, http_url, otlp_endpoint, key_file, store, workers)


async def first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Return when the first of them does, or raise what it raises; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _trace_store(nats_url: str, settings: Settings) -> AsyncIterator[TracesWorker]:
    config = BusConfig(worker_id=TRACE_STORE_ID, nats_url=nats_url)
    async with Bus.open(config, data_plane=False) as bus:
        worker = TracesWorker(bus, settings)
        await worker.start()
        try:
            await worker.serve()
            yield worker
        finally:
            await bus.drain(1.0)
            await worker.stop()


def _own_key_file(stack: AsyncExitStack) -> str:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nixlbus-key-"))
    path = Path(folder, "nixlbus.key")
    write_key_file(path)
    return str(path)


def state_key_file() -> str:
    """The key of graphs that this user starts with `nixlbus up`, made at the first use; NIXLBUS_KEY_FILE wins."""
    named = os.environ.get("NIXLBUS_KEY_FILE")
    if named:
        return named
    state_home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    path = Path(state_home, "nixlbus", "nixlbus.key")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_key_file(path)
    return str(path)
