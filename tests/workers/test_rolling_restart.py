"""The packaged graph, two of every role, under load: each is restarted in turn and nobody notices; a killed one is
noticed at once."""

import asyncio
import itertools
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bus import Bus, BusConfig, BusError, RetryPolicy, embedded_server, write_key_file
from schemas.generate import GenerateChunk, GenerateDone, GenerateRequest
from tests.bus.control_plane.waiting import until
from tests.graph_fixture import image_turn, post, sample, user
from workers.launcher import WorkerProcess, fork_server
from workers.process import WorkerSpec
from workers.roles import GRAPH_ROLES
from workers.settings import Settings

CLIENT_TIMEOUT_S = 12.0
TOLD_WITHIN_S = 15.0
"""Of a killed worker and all who wait for it, where ten workers share two cores; and of the others' work."""
DIGITS = (0, 3, 4, 7)


class Fleet:
    """Two workers of every role, each of which may be replaced."""

    def __init__(self, nats_url: str, key_file: str) -> None:
        self.nats_url = nats_url
        self.workers: dict[str, list[WorkerProcess]] = {role: [] for role in GRAPH_ROLES}
        self._key_file = key_file
        self._context = fork_server()

    async def start(self, role: str) -> WorkerProcess:
        """Return when it is ready."""
        name = f"{role}-{secrets.token_hex(3)}"
        config = BusConfig(worker_id=name, nats_url=self.nats_url, key_file=self._key_file)
        spec = WorkerSpec(role, config, Settings(http_port=0, log_level="error"), otlp_endpoint="")
        worker = WorkerProcess(spec, self._context)
        self.workers[role].append(worker)
        await worker.ready(lambda role, progress: None)
        return worker

    async def stop(self, worker: WorkerProcess) -> int:
        worker.terminate()
        status = await worker.ended()
        await worker.stopped()
        self.workers[worker.spec.role].remove(worker)
        return status

    def kill(self, worker: WorkerProcess) -> None:
        os.kill(worker.pid, signal.SIGKILL)

    async def end(self) -> None:
        left = list(itertools.chain(*self.workers.values()))
        for worker in left:
            worker.terminate()
        await asyncio.gather(*(worker.stopped() for worker in left))


@asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[Fleet]:
    write_key_file(folder / "key")
    async with embedded_server() as server:
        running = Fleet(server.url, str(folder / "key"))
        try:
            await asyncio.gather(*(running.start(role) for role in GRAPH_ROLES for _ in range(2)))
            yield running
        finally:
            await running.end()


class Load:
    """Clients of the graph that check what they are answered."""

    def __init__(self, bus: Bus, fleet: Fleet) -> None:
        self.errors: list[BaseException | str] = []
        self.num_answers = 0
        self.num_http_answers = 0
        self.resting: set[str] = set()
        """URLs of frontends that get no further requests."""
        self._bus = bus
        self._fleet = fleet
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work) for work in (self._pictures(0), self._pictures(2), self._texts())]
        tasks += [asyncio.create_task(self._over_http(number)) for number in (0, 1)]
        try:
            yield
        finally:
            self._stop.set()
            await asyncio.gather(*tasks)

    async def _pictures(self, first: int) -> None:
        for digit in itertools.cycle(DIGITS[first:] + DIGITS[:first]):
            if self._stop.is_set():
                return
            await self._expect(str(digit), "What digit is this?", [sample(digit)])

    async def _texts(self) -> None:
        expected = await answer_to(self._bus, "hello")
        while not self._stop.is_set():
            await self._expect(expected, "hello", [])

    async def _expect(self, part: str, prompt: str, images: list[bytes]) -> None:
        try:
            text = await answer_to(self._bus, prompt, *images)
        except BusError as error:
            self.errors.append(error)
            return
        if part not in text:
            self.errors.append(f"{text!r} where {part!r} was due")
        self.num_answers += 1

    async def _over_http(self, number: int) -> None:
        while not self._stop.is_set():
            urls = [worker.detail for worker in self._fleet.workers["frontend"] if worker.detail]
            urls = [url for url in urls if url not in self.resting]
            body = {"messages": [image_turn(7)]}
            status, _, answer = await asyncio.to_thread(post, urls[number % len(urls)], body)
            if status != 200 or b"7" not in answer:
                self.errors.append(f"{status}: {answer[:300]!r}")
            self.num_http_answers += 1


async def answer_to(bus: Bus, prompt: str, *images: bytes, max_tokens: int = 32, ignore_eos: bool = False) -> str:
    """The whole text, as a client gets it."""
    request = GenerateRequest(messages=[user(prompt, *images)], max_tokens=max_tokens, ignore_eos=ignore_eos)
    subject = bus.subjects.graph("vlm", "generate")
    frames = bus.stream(subject, request, GenerateChunk, GenerateDone, timeout_s=CLIENT_TIMEOUT_S, retry=RetryPolicy())
    return "".join([frame.text async for frame in frames if isinstance(frame, GenerateChunk)])


@pytest.mark.timeout(240)
async def test_every_worker_is_restarted_under_load_and_no_request_fails(tmp_path: Path) -> None:
    async with fleet(tmp_path) as running:
        config = BusConfig(worker_id="client", nats_url=running.nats_url)
        async with Bus.open(config, data_plane=False) as bus:
            load = Load(bus, running)
            async with load.running():
                for role in ("encode", "prefill", "decode", "processor", "frontend"):
                    for worker in list(running.workers[role]):
                        before = load.num_answers
                        load.resting.add(worker.detail)
                        _, status = await asyncio.gather(running.start(role), running.stop(worker))
                        assert status == 0
                        await until(lambda before=before: load.num_answers > before, 30)  # type: ignore[misc]
            assert load.errors == []
            assert load.num_answers > 20
            assert load.num_http_answers > 5
            await kill_at_work(bus, running, "decode", prompt="hello", num_requests=12, max_tokens=300)
            await running.start("decode")
            await kill_at_work(bus, running, "prefill", prompt="the " * 380, num_requests=30, max_tokens=2)


async def kill_at_work(bus: Bus, running: Fleet, role: str, *, prompt: str, num_requests: int, max_tokens: int) -> None:
    """Kill one of two while both are busy: each request is answered or told, soon; what comes after is answered."""
    expected = await answer_to(bus, prompt, max_tokens=max_tokens, ignore_eos=True)
    asked = [
        asyncio.create_task(answer_to(bus, prompt, max_tokens=max_tokens, ignore_eos=True)) for _ in range(num_requests)
    ]
    await until(lambda: any(each.done() for each in asked), 30)
    victim = running.workers[role][0]
    running.kill(victim)
    started_s = time.monotonic()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert time.monotonic() - started_s < TOLD_WITHIN_S, outcomes
    assert {outcome for outcome in outcomes if isinstance(outcome, str)} <= {expected}
    assert all(isinstance(outcome, (str, BusError)) for outcome in outcomes), outcomes
    await victim.stopped()
    running.workers[role].remove(victim)
    for digit in DIGITS:
        assert str(digit) in await answer_to(bus, "What digit is this?", sample(digit))
