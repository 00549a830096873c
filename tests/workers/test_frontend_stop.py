"""A frontend that is told to stop, in a process of its own: an answer under way has the drain's time, and an end."""

import asyncio
import json
import signal
import sys
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bus import Bus, BusConfig, EmbeddedServer, EndpointConfig
from schemas.generate import GenerateChunk, GenerateDone, GenerateRequest, Usage
from tests.graph_fixture import NIXLBUS, environment
from workers.process import SAME_SIGNAL_S

ENDS_WITHIN_S = 30
DONE = GenerateDone(
    model="m",
    finish_reason="stop",
    usage=Usage(prompt_tokens=1, completion_tokens=1),
    ledger=[],
    elapsed_ms=1.0,
    request_id="r",
)


class Graph:
    """What the frontend asks: a chunk, and when it is let go the end."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.is_gone = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateDone, None]:
        try:
            yield GenerateChunk(text="x", token_ids=[1])
            await self.let_go.wait()
            yield DONE
        finally:
            self.is_gone.set()


@asynccontextmanager
async def graph(nats_url: str) -> AsyncIterator[Graph]:
    serving = Graph()
    async with Bus.open(BusConfig(worker_id="generating", nats_url=nats_url), data_plane=False) as bus:
        subject = bus.subjects.graph("vlm", "generate")
        await bus.serve(EndpointConfig("generate", subject, GenerateRequest), serving.generate)
        yield serving
        serving.let_go.set()


class Frontend:
    """Its process and its URL."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url

    async def ask(self) -> "asyncio.Task[list[str]]":
        """The events of a streamed answer, of which the first has come."""
        loop = asyncio.get_running_loop()
        begun = asyncio.Event()

        def read() -> list[str]:
            body = json.dumps({"stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()
            request = urllib.request.Request(f"{self.url}/v1/chat/completions", body)
            events = []
            with urllib.request.urlopen(request, timeout=ENDS_WITHIN_S) as response:
                for line in response:
                    if line.strip():
                        events.append(line.decode().strip())
                        loop.call_soon_threadsafe(begun.set)
            return events

        asking = asyncio.create_task(asyncio.to_thread(read))
        async with asyncio.timeout(ENDS_WITHIN_S):
            await begun.wait()
        return asking

    async def refuses(self) -> None:
        """Wait until it accepts no connection any more."""
        address = self.url.removeprefix("http://").split(":")
        async with asyncio.timeout(ENDS_WITHIN_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection(address[0], int(address[1]))
                except OSError:
                    return
                writer.close()
                await asyncio.sleep(0.05)

    async def status(self) -> int:
        async with asyncio.timeout(ENDS_WITHIN_S):
            return await self.process.wait()


@asynccontextmanager
async def frontend(nats_url: str, drain_timeout_s: int) -> AsyncIterator[Frontend]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        NIXLBUS,
        "worker",
        "frontend",
        "--json",
        env=environment(NIXLBUS_NATS_URL=nats_url, NIXLBUS_HTTP_PORT="0", NIXLBUS_DRAIN_TIMEOUT_S=str(drain_timeout_s)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout
    try:
        told = {"step": ""}
        async with asyncio.timeout(ENDS_WITHIN_S):
            while told["step"] != "ready":
                told = json.loads(await process.stdout.readline())
        yield Frontend(process, told["detail"])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_an_answer_under_way_is_finished_within_the_drain_s_time(nats: EmbeddedServer) -> None:
    async with graph(nats.url) as serving, frontend(nats.url, 60) as stopping:
        asking = await stopping.ask()
        stopping.process.terminate()
        await stopping.refuses()
        await asyncio.sleep(6)  # more than any grace that isn't the drain's
        serving.let_go.set()
        assert (await asking)[-1] == "data: [DONE]"
        assert await stopping.status() == 0


async def test_an_answer_that_outlasts_the_drain_ends_with_an_error_and_its_work_is_cancelled(
    nats: EmbeddedServer,
) -> None:
    async with graph(nats.url) as serving, frontend(nats.url, 1) as stopping:
        asking = await stopping.ask()
        stopping.process.terminate()
        async with asyncio.timeout(4.5):  # the drain's second, and the end of a process
            assert "error" in json.loads((await asking)[-1].removeprefix("data: "))
        assert await stopping.status() == 0
        async with asyncio.timeout(ENDS_WITHIN_S):
            await serving.is_gone.wait()
        assert not serving.let_go.is_set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_an_answer_with_an_error(nats: EmbeddedServer, number: signal.Signals) -> None:
    async with graph(nats.url), frontend(nats.url, 600) as stopping:
        asking = await stopping.ask()
        stopping.process.terminate()
        await stopping.refuses()
        await asyncio.sleep(2 * SAME_SIGNAL_S)
        stopping.process.send_signal(number)
        assert "error" in json.loads((await asking)[-1].removeprefix("data: "))
        assert await stopping.status() == 1
