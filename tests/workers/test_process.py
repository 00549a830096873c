"""The end of a worker's process: while it starts, while it drains, and when it would not end; real signals."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bus import Bus, BusConfig, EmbeddedServer, Message, RemoteFault
from schemas.subjects import Subjects
from tests.graph_fixture import environment
from workers.process import SAME_SIGNAL_S

PROGRAM = """
import asyncio, sys, time
from concurrent.futures import ThreadPoolExecutor
from bus import Message
from workers import Worker, endpoint
from workers.process import run

class Wait(Message, frozen=True, kw_only=True, tag="test.wait"): ...

class Starting(Worker):
    async def start(self) -> None:
        print("begun", file=sys.stderr)
        await asyncio.sleep(600)

class Loading(Worker):
    async def start(self) -> None:
        print("begun", file=sys.stderr)
        await asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(1), time.sleep, 600)

class LoadingAside(Worker):
    async def start(self) -> None:
        print("begun", file=sys.stderr)
        await asyncio.to_thread(time.sleep, 600)

class Slow(Worker):
    @endpoint()
    async def wait(self, request: Wait) -> Wait:
        print("begun", file=sys.stderr)
        await asyncio.sleep(600)

class Stubborn(Worker):
    @endpoint()
    async def wait(self, request: Wait) -> Wait:
        print("begun", file=sys.stderr)
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                pass

sys.exit(run(globals()[sys.argv[1]]))
"""
ENDS_WITHIN_S = 20
"""Of a process whose work lasts ten minutes."""


class Wait(Message, frozen=True, kw_only=True, tag="test.wait"): ...


class Running:
    """A process, and what it said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[str] = []

    async def says(self, text: str) -> None:
        assert self.process.stderr
        async with asyncio.timeout(ENDS_WITHIN_S):
            while not any(text in line for line in self.said):
                line = (await self.process.stderr.readline()).decode()
                assert line, f"it ended without {text!r}: {self.said}"
                self.said.append(line)

    async def status(self) -> int:
        assert self.process.stderr
        async with asyncio.timeout(ENDS_WITHIN_S):
            self.said.append((await self.process.stderr.read()).decode())
            return await self.process.wait()


@asynccontextmanager
async def running(folder: Path, name: str, nats_url: str, **variables: str) -> AsyncIterator[Running]:
    (folder / "program.py").write_text(PROGRAM)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "program.py",
        name,
        cwd=folder,
        env=environment(NIXLBUS_NATS_URL=nats_url, PYTHONPATH=os.pathsep.join(sys.path), **variables),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def client(nats: EmbeddedServer) -> AsyncIterator[Bus]:
    async with Bus.open(BusConfig(worker_id="client", nats_url=nats.url), data_plane=False) as bus:
        yield bus


@pytest.mark.parametrize("name", ["Starting", "Loading", "LoadingAside"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_that_starts_is_stopped_by_one_signal(
    nats: EmbeddedServer, tmp_path: Path, name: str, number: signal.Signals
) -> None:
    async with running(tmp_path, name, nats.url) as worker:
        await worker.says("begun")
        worker.process.send_signal(number)
        assert await worker.status() == 0
    assert "stopped before it was ready" in worker.said[-1]
    assert "Traceback" not in worker.said[-1]


async def test_a_worker_that_connects_is_stopped_by_one_signal(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def accept_and_say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(accept_and_say_nothing, "127.0.0.1", 0)
    url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with (
        server,
        running(tmp_path, "Slow", url, NIXLBUS_CONNECT_TIMEOUT_S="600") as worker,
        asyncio.timeout(ENDS_WITHIN_S),
    ):
        await asked.wait()
        worker.process.terminate()
        assert await worker.status() == 0
    assert "stopped before it was ready" in worker.said[-1]


async def test_a_second_signal_cuts_the_drain_short_and_who_waits_is_told(
    nats: EmbeddedServer, client: Bus, tmp_path: Path
) -> None:
    async with running(tmp_path, "Slow", nats.url, NIXLBUS_DRAIN_TIMEOUT_S="600") as worker:
        asking = await taken(worker, client, "slow")
        worker.process.terminate()
        await until_drains(client, "slow")
        worker.process.terminate()  # at once: the same signal, passed on by somebody
        await asyncio.sleep(2 * SAME_SIGNAL_S)
        assert not asking.done()
        worker.process.terminate()
        with pytest.raises(RemoteFault) as caught:
            await asking
        assert caught.value.fault.code == "cancelled"
        assert await worker.status() == 1
    assert "stopped before it had drained" in worker.said[-1]
    assert "Traceback" not in worker.said[-1]


async def test_a_third_signal_kills(nats: EmbeddedServer, client: Bus, tmp_path: Path) -> None:
    async with running(tmp_path, "Stubborn", nats.url, NIXLBUS_DRAIN_TIMEOUT_S="600") as worker:
        asking = await taken(worker, client, "stubborn")
        worker.process.terminate()
        await until_drains(client, "stubborn")
        await asyncio.sleep(2 * SAME_SIGNAL_S)
        for _ in range(2):
            worker.process.terminate()
            await asyncio.sleep(0.1)
        assert await worker.status() == -signal.SIGTERM
        asking.cancel()


async def taken(worker: Running, client: Bus, group: str) -> "asyncio.Task[Wait]":
    """A request that the worker is at."""
    await worker.says("ready")
    asking = asyncio.create_task(client.request(Subjects().graph(group, "wait"), Wait(), Wait, timeout_s=600))
    await worker.says("begun")
    return asking


async def until_drains(client: Bus, role: str) -> None:
    async with asyncio.timeout(ENDS_WITHIN_S):
        while role in {service["metadata"]["role"] for service in await client.services(1.0)}:
            pass
