"""nats-servers that a test may kill, stop, restart on the same port, or put into lame duck; and a link to cut."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from bus import server_binary

START_TIMEOUT_S = 10.0


class NatsProcess:
    """A nats-server on a port of its own, started and ended at will."""

    def __init__(self, folder: Path, configuration: str = "", name: str = "nats") -> None:
        """`configuration` is added to the file."""
        self.port = free_port()
        self._conf = folder / f"{name}-{self.port}.conf"
        self._conf.write_text(f'listen: "127.0.0.1:{self.port}"\n{configuration}\n')
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return when it accepts connections."""
        self._process = subprocess.Popen([server_binary(), "-c", str(self._conf)], stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self._process.poll() is None, "nats-server ended"
            assert time.monotonic() < deadline_s, "nats-server did not start"
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def lame_duck(self) -> None:
        """Make it announce that it will stop."""
        self.signal(signal.SIGUSR2)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None


@contextmanager
def nats_process(folder: Path, configuration: str = "") -> Iterator[NatsProcess]:
    """A running one."""
    server = NatsProcess(folder, configuration)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def nats_cluster(folder: Path, grace_s: int = 3) -> Iterator[list[NatsProcess]]:
    """Two servers that know each other. In lame duck they drop nobody for `grace_s`; nats-server wants the 30 s."""
    routes = [free_port(), free_port()]
    servers = [
        NatsProcess(
            folder,
            f'server_name: "n{number}"\nlame_duck_duration: "30s"\nlame_duck_grace_period: "{grace_s}s"\n'
            f'cluster {{ name: "test", listen: "127.0.0.1:{routes[number]}", '
            f'routes: ["nats-route://127.0.0.1:{routes[1 - number]}"] }}',
            name=f"n{number}",
        )
        for number in (0, 1)
    ]
    try:
        for server in servers:
            server.start()
        yield servers
    finally:
        for server in servers:
            server.kill()


class Relay:
    """A TCP link to a server, which can go dead without being closed."""

    def __init__(self, server_port: int) -> None:
        self.num_links = 0
        self.is_dead = False
        """Whether what comes is swallowed; links that are made meanwhile stay dead."""
        self.url = ""
        self._server_port = server_port
        self._tasks: set[asyncio.Task[None]] = set()

    async def link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_links += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        was_dead = self.is_dead
        with contextlib.suppress(OSError, asyncio.CancelledError):
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
            pumps = [self._pump(reader, up_writer, was_dead), self._pump(up_reader, writer, was_dead)]
            await asyncio.gather(*pumps)
        self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, was_dead: bool) -> None:
        swallows = was_dead
        try:
            while received := await reader.read(65536):
                swallows = swallows or self.is_dead
                if not swallows:
                    writer.write(received)
                    await writer.drain()
        finally:
            writer.close()

    def end(self) -> None:
        for task in self._tasks:
            task.cancel()


@asynccontextmanager
async def relay_to(server_port: int) -> AsyncIterator[Relay]:
    """A relay for as long as the context lasts."""
    relay = Relay(server_port)
    listening = await asyncio.start_server(relay.link, "127.0.0.1", 0)
    relay.url = f"nats://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield relay
    finally:
        listening.close()
        relay.end()
        await asyncio.sleep(0.01)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
