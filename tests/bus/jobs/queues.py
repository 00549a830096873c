"""What the tests of durable work have in common: a message, a queue of its own for each test, and a real nats-server
that can be stopped and started again with what it had stored."""

import asyncio
import json
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bus import Bus, BusConfig, JobQueueConfig, server_binary, server_configuration
from schemas.message import Message

LONG_S = 20.0


class Task(Message, frozen=True, kw_only=True, tag="test.task"):
    number: int = 0
    text: str = ""


class Other(Message, frozen=True, kw_only=True, tag="test.other"):
    name: str


def queue(**fields: Any) -> JobQueueConfig:
    """A queue that nobody else has, with pauses that a test can wait for."""
    fields = {
        "graph": "test",
        "queue": f"q{secrets.token_hex(6)}",
        "message_type": Task,
        "backoff_s": (0.05, 0.1),
        "ack_wait_s": 1.0,
        **fields,
    }
    return JobQueueConfig(**fields)


async def until(true: Callable[[], bool], timeout_s: float = LONG_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_dead(bus: Bus, config: JobQueueConfig, count: int = 1) -> list[Any]:
    async with asyncio.timeout(LONG_S):
        while True:
            letters = await bus.dead_letters.list(queue=config.queue)
            if len(letters) >= count:
                return letters
            await asyncio.sleep(0.02)


@asynccontextmanager
async def opened(url: str, worker_id: str, drain_timeout_s: float = 5.0) -> AsyncIterator[Bus]:
    config = BusConfig(worker_id=worker_id, nats_url=url)
    async with Bus.open(config, data_plane=False, drain_timeout_s=drain_timeout_s) as bus:
        yield bus


class StoppableServer:
    """A nats-server with a store and a port of its own."""

    def __init__(self, folder: Path, extra: str = "", jetstream: bool = True) -> None:
        self._folder = folder
        self._extra = extra
        self._jetstream = jetstream
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        config = self._folder / "nats-server.conf"
        store = f"{self._folder}/store" if self._jetstream else ""
        text = server_configuration(port=self.port or -1, monitoring_port=-1, store_dir=store)
        config.write_text(f'{text}ports_file_dir: "{self._folder}"\n{self._extra}\n')
        self._process = subprocess.Popen(  # noqa: ASYNC220
            [server_binary(), "-c", str(config)], stderr=subprocess.DEVNULL
        )
        ports = self._folder / f"nats-server_{self._process.pid}.ports"
        async with asyncio.timeout(LONG_S):
            while not ports.exists() or '"nats"' not in ports.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        self.port = int(json.loads(ports.read_text())["nats"][0].rpartition(":")[2])

    async def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self._process:
            self._process.send_signal(how)
            await asyncio.to_thread(self._process.wait, LONG_S)
            self._process = None


@asynccontextmanager
async def stoppable_server(folder: Path, extra: str = "", jetstream: bool = True) -> AsyncIterator[StoppableServer]:
    server = StoppableServer(folder, extra, jetstream)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def noting(seen: list[int]) -> Callable[[Task], Awaitable[None]]:
    async def handler(task: Task) -> None:
        seen.append(task.number)

    return handler
