"""A worker of either version: what runs it is whatever nixlbus stands on its PYTHONPATH.

    python peer.py VERSION WORKER_ID NATS_URL KEY_FILE      KEY_FILE is "" for a worker without a data plane

It serves in the queue groups of its graph, beside workers of the other version, and does as it is told on its own
subjects: ask, put load on the graph, take part in a paired operation. It prints one line when it serves: the folder
that its nixlbus came from. It drains on SIGTERM, and when its standard input ends. Only names that both versions
have are used here.
"""

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Literal

import msgspec

import bus
from bus import Bus, BusConfig, BusError, EndpointConfig, RemoteFault, RequestRefused
from schemas.fault import Fault, FaultCode
from schemas.message import Message
from schemas.operations import Initiator, RdmaMetadata
from schemas.subjects import Subject

GRAPH = "upgrade"
VALUE = 7
PATIENCE_S = 30.0
NUM_FRAMES = 24
MAX_FAILURES = 20
WORK_S = 0.05
"""What an answer takes: a worker that drains has some under way."""


class Ask(Message, frozen=True, kw_only=True, tag="upgrade.ask"):
    """Answered by `Told`, or by the fault that `fault` names."""

    text: str = ""
    fault: Literal["", "not_found", "a code of later", "by accident"] = ""
    seconds: float = 0.0


class Told(Message, frozen=True, kw_only=True, tag="upgrade.told"):
    """The text again, and who answers."""

    text: str
    worker_id: str


class Count(Message, frozen=True, kw_only=True, tag="upgrade.count"):
    """Answered by so many frames and the last one."""

    num_frames: int


class Counted(Message, frozen=True, kw_only=True, tag="upgrade.counted"):
    """A frame."""

    seq: int


class CountEnd(Message, frozen=True, kw_only=True, tag="upgrade.count_end"):
    """The last frame."""

    seq: int
    worker_id: str


class Transfer(Message, frozen=True, kw_only=True, tag="upgrade.transfer"):
    """Read what a grant names, or write it full of `VALUE`. Answered by `Transferred`."""

    grant: RdmaMetadata


class Transferred(Message, frozen=True, kw_only=True, tag="upgrade.transferred"):
    """What NIXL counted, and the sum of the bytes."""

    num_bytes: int
    total: int


class Command(Message, frozen=True, kw_only=True, tag="upgrade.command"):
    """What a test wants done towards `peer`."""

    what: Literal["ask", "ask amiss", "count", "start load", "end load", "services", "offer", "offer by name"]
    peer: str = ""
    epoch: str = ""
    ask: Ask = Ask()
    timeout_s: float = PATIENCE_S
    num_frames: int = 0
    kind: Literal["readable", "writable"] = "writable"
    num_bytes: int = 0
    checksum: bool = False


class Report(Message, frozen=True, kw_only=True, tag="upgrade.report"):
    """What came of it."""

    told: str = ""
    fault: Fault | None = None
    num_frames: int = 0
    answered_by: dict[str, int] = msgspec.field(default_factory=dict)
    failures: list[str] = msgspec.field(default_factory=list)
    services: dict[str, dict[str, str]] = msgspec.field(default_factory=dict)
    num_bytes: int = 0
    total: int = 0


class Load:
    """Requests and streams to the graph's queue groups, from several tasks at once, until it is ended or has failed
    often enough. A context: leaving it without its end cancels what is under way."""

    def __init__(self, bus: Bus, num_tasks: int = 4) -> None:
        self._bus = bus
        self._ended = False
        self.answered_by: Counter[str] = Counter()
        self.failures: list[str] = []
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(num_tasks)]

    async def __aenter__(self) -> "Load":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def end(self) -> Report:
        """Finish what is under way, and say what came of all."""
        self._ended = True
        await asyncio.gather(*self._tasks)
        return Report(answered_by=dict(self.answered_by), failures=self.failures)

    async def _run(self, number: int) -> None:
        num_sent = 0
        while not self._ended and len(self.failures) < MAX_FAILURES:
            num_sent += 1
            try:
                await self._once(f"{number}.{num_sent}")
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    async def _once(self, text: str) -> None:
        reply = await self._bus.request(
            self._bus.subjects.graph(GRAPH, "ask"), Ask(text=text, seconds=WORK_S), Told, timeout_s=PATIENCE_S
        )
        if reply.text != text:
            raise ValueError(f"{reply.text} for {text}")
        self.answered_by[reply.worker_id] += 1
        _, worker_id = await counted(self._bus, self._bus.subjects.graph(GRAPH, "count"), NUM_FRAMES)
        self.answered_by[worker_id] += 1


async def counted(bus: Bus, subject: Subject, num_frames: int) -> tuple[int, str]:
    """Take a stream to its end; the number of its frames, and whose it was."""
    num_taken, last = 0, None
    async for frame in bus.stream(subject, Count(num_frames=num_frames), Counted, CountEnd, timeout_s=PATIENCE_S):
        num_taken += isinstance(frame, Counted)
        last = frame
    if num_taken != num_frames or not isinstance(last, CountEnd):
        raise ValueError(f"{num_taken} frames of {num_frames}, then {last}")
    return num_taken, last.worker_id


class Peer:
    """What is served, and what is done on command."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._load: Load | None = None

    async def serve(self, version: str) -> None:
        """In the queue groups, as a role of a graph is; on the worker's own subjects; in discovery."""
        subjects, own = self._bus.subjects, self._bus.worker_id
        for name, request_type, handler in (("ask", Ask, self.ask), ("count", Count, self.count)):
            for subject, group in ((subjects.graph(GRAPH, name), name), (subjects.worker(own, name), "")):
                label = name if group else f"own_{name}"
                await self._bus.serve(EndpointConfig(label, subject, request_type, queue_group=group), handler)
        await self._bus.serve(EndpointConfig("transfer", subjects.worker(own, "transfer"), Transfer), self.transfer)
        await self._bus.serve(EndpointConfig("command", subjects.worker(own, "command"), Command), self.command)
        await self._bus.announce(f"nixlbus-{GRAPH}-peer", version, {"role": "peer"})

    async def ask(self, request: Ask) -> Told:
        await asyncio.sleep(request.seconds)
        if request.fault == "not_found":
            raise RequestRefused(FaultCode.NOT_FOUND, "there is no such thing", remedy="ask for another")
        if request.fault == "a code of later":
            raise RemoteFault(Fault(code="invented_later", message="something new", retryable=True, worker_id="far"))
        if request.fault:
            raise ZeroDivisionError("a secret")
        return Told(text=request.text, worker_id=self._bus.worker_id)

    async def count(self, request: Count) -> AsyncGenerator[Message, None]:
        for seq in range(request.num_frames):
            yield Counted(seq=seq)
        yield CountEnd(seq=request.num_frames, worker_id=self._bus.worker_id)

    async def transfer(self, request: Transfer) -> Transferred:
        """As an operation's initiator."""
        import torch  # a worker without a data plane does without

        grant = request.grant
        with self._bus.arena.allocate([grant.num_bytes], torch.uint8) as local:
            if grant.kind == "readable":
                report = await (await self._bus.begin_read(grant, local.descriptor))
            else:
                local.tensor.fill_(VALUE)
                report = await (await self._bus.begin_write(grant, local.descriptor))
            total = int(local.tensor.sum(dtype=torch.int64))
            return Transferred(num_bytes=report.transfer.num_bytes, total=total)

    async def command(self, command: Command) -> Report:
        if command.what == "start load":
            self._load = Load(self._bus)
            return Report()
        if command.what == "end load":
            assert self._load is not None
            return await self._load.end()
        if command.what == "services":
            found = await self._bus.services()
            return Report(services={each["id"]: described(each) for each in found if GRAPH in each["name"]})
        if command.what.startswith("offer"):
            return await self._offer(command)
        return await self._call(command)

    async def _call(self, command: Command) -> Report:
        subjects = self._bus.subjects
        try:
            if command.what == "count":
                subject = subjects.worker(command.peer, "count")
                return Report(num_frames=(await counted(self._bus, subject, command.num_frames))[0])
            message = command.ask if command.what == "ask" else Count(num_frames=1)
            reply = await self._bus.request(
                subjects.worker(command.peer, "ask"), message, Told, timeout_s=command.timeout_s
            )
        except RemoteFault as error:
            return Report(fault=error.fault)
        except BusError as error:
            return Report(failures=[f"{type(error).__name__}: {error}"])
        return Report(told=reply.text)

    async def _offer(self, command: Command) -> Report:
        """As an operation's target."""
        import torch

        named = Initiator(worker_id=command.peer, epoch=command.epoch) if command.what == "offer by name" else None
        with self._bus.arena.allocate([command.num_bytes], torch.uint8) as memory:
            memory.tensor.fill_(VALUE if command.kind == "readable" else 0)
            create = self._bus.create_readable if command.kind == "readable" else self._bus.create_writable
            async with await create(memory.descriptor, initiator=named, checksum=command.checksum) as operation:
                reply = await self._bus.request(
                    self._bus.subjects.worker(command.peer, "transfer"),
                    Transfer(grant=operation.metadata),
                    Transferred,
                    timeout_s=PATIENCE_S,
                )
                await operation
            total = reply.total if command.kind == "readable" else int(memory.tensor.sum(dtype=torch.int64))
            return Report(num_bytes=reply.num_bytes, total=total)


def described(service: dict[str, object]) -> dict[str, str]:
    """What a test compares of a discovered service."""
    endpoints = service["endpoints"]
    assert isinstance(endpoints, list)
    groups = {each["subject"]: each["queue_group"] for each in endpoints if each["queue_group"]}
    return {"version": str(service["version"]), "epoch": service["metadata"]["epoch"], **groups}  # type: ignore[index]


async def main(version: str, worker_id: str, nats_url: str, key_file: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_reader(sys.stdin, stop.set)
    config = BusConfig(worker_id=worker_id, nats_url=nats_url, key_file=key_file, arena_bytes=16 << 20)
    async with Bus.open(config, data_plane=bool(key_file)) as opened:
        await Peer(opened).serve(version)
        print(Path(bus.__file__).parent.parent, flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
