"""Paired operations between two processes over a real nats-server, beside their floors in the same run.

    python -m benchmarks.operations [--quick] [--peers] [--json FILE]

Systems: `nixlbus` (named grant), `nixlbus_open` (open grant: one claim more), `raw_nats` (an empty request-reply with
nats-py: what telling a peer costs), `raw_nixl` (one agent writing the same bytes to the other process in a loop: what
moving them costs), `raw_nixl_huge` (the same with both sides on huge pages, as our arenas are), `memcpy`, and with
--peers `nixl_connect` (NVIDIA Dynamo's, in an environment of its own).
An operation is timed from its creation until the target knows that the bytes are complete; its grant goes out in a
one-way message. Ours and the floors take turns, in rounds. Tracing and checksums are off.
"""

import argparse
import asyncio
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import nats
import torch
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg
from rich.console import Console
from rich.table import Table

from benchmarks.floors import Floor, FloorTarget, memcpy
from benchmarks.peers import nixl_connect_rows
from benchmarks.report import Report
from bus import Bus, BusConfig, embedded_server, write_key_file
from schemas.operations import Initiator, OperationKind, RdmaMetadata
from workers.process import settle_heap

KIB, MIB = 1 << 10, 1 << 20
SIZES = (4 * KIB, 64 * KIB, MIB, 64 * MIB)
CONCURRENCIES = (1, 8, 32)
ARENA_BYTES = 640 * MIB
START_TIMEOUT_S = 60
ROUNDS = 5
IDLE_S = 3.0


def repetitions(size_bytes: int, quick: bool) -> int:
    """Operations of a case in one round: enough for a median, few enough for a minute."""
    few = 4 if size_bytes > 16 * MIB else 150
    return few if quick else few * 6


@dataclass
class Samples:
    """Durations of single operations, and of all of them together, over the rounds."""

    seconds: list[float]
    wall_s: float = 0.0


async def timed(operate: Callable[[], Awaitable[None]], count: int, concurrency: int, into: Samples) -> None:
    """Run `count` operations, `concurrency` at a time."""

    async def runner(number: int) -> None:
        for _ in range(number):
            started_s = time.perf_counter()
            await operate()
            into.seconds.append(time.perf_counter() - started_s)

    started_s = time.perf_counter()
    await asyncio.gather(*(runner(max(1, count // concurrency)) for _ in range(concurrency)))
    into.wall_s += time.perf_counter() - started_s


async def initiate(nats_url: str, key_file: str, parent: Connection) -> None:
    """The other process: acts on every grant it is sent."""
    torch.set_num_threads(1)
    floors = [FloorTarget(max(SIZES), on_huge_pages) for on_huge_pages in (False, True)]
    config = BusConfig(worker_id="initiator", nats_url=nats_url, key_file=key_file, arena_bytes=ARENA_BYTES)
    async with Bus.open(config) as bus:
        local = {size: bus.arena.allocate([size], torch.uint8) for size in SIZES}

        async def act(grant: RdmaMetadata) -> None:
            begin = bus.begin_write if grant.kind is OperationKind.WRITABLE else bus.begin_read
            await begin(grant, local[grant.num_bytes])  # which tells the target when it is done

        def act_beside(grant: RdmaMetadata) -> None:
            under_way.add(task := asyncio.create_task(act(grant)))
            task.add_done_callback(under_way.discard)

        under_way: set[asyncio.Task[None]] = set()
        await bus.subscribe(bus.subjects.event("initiator", "move"), RdmaMetadata, act)
        await bus.subscribe(bus.subjects.event("initiator", "claim-and-move"), RdmaMetadata, act_beside)
        raw = await nats.connect(nats_url)

        async def echo(message: Msg) -> None:
            await raw.publish(message.reply, b"")

        await raw.subscribe("raw.echo", cb=echo)
        await raw.flush()
        await raw.flush()
        settle_heap()
        parent.send((bus.epoch, [floor.invitation for floor in floors]))
        for _ in range(2):  # before and after what is measured
            await asyncio.to_thread(parent.recv)
            parent.send((bus.stats(), time.process_time()))
        await asyncio.to_thread(parent.recv)
        await raw.close()


def child(nats_url: str, key_file: str, parent: Connection) -> None:
    """Entry of the other process."""
    uvloop.run(initiate(nats_url, key_file, parent))


class Measurement:
    """One run against the other process."""

    def __init__(
        self, report: Report, bus: Bus, raw: Client, peer: Initiator, floors: list[Floor], quick: bool
    ) -> None:
        self.report = report
        self.bus = bus
        self.raw = raw
        self.peer = peer
        self.floors = floors
        self.quick = quick

    async def request(self) -> None:
        """The floor of telling."""
        await self.raw.request("raw.echo", b"x" * 200, timeout=10)

    async def operate(self, kind: str, size_bytes: int, initiator: Initiator | None) -> None:
        """One paired operation, as the target sees it."""
        bus = self.bus
        with bus.arena.allocate([size_bytes], torch.uint8) as target:
            create = bus.create_writable if kind == "write" else bus.create_readable
            operation = await create(target, initiator=initiator)
            event = "move" if initiator else "claim-and-move"  # while one claim is asked for others can be begun
            await bus.publish(bus.subjects.event("initiator", event), operation.metadata)
            await operation

    async def move(self, size_bytes: int, floor: Floor) -> None:
        """The floor of moving."""
        floor.write(size_bytes)

    async def cases(self) -> None:
        """Every size, and every concurrency that the arena has room for."""
        for size_bytes in SIZES:
            for concurrency in CONCURRENCIES:
                if concurrency * size_bytes <= ARENA_BYTES - 64 * MIB:
                    await self.case(size_bytes, concurrency)

    async def case(self, size_bytes: int, concurrency: int) -> None:
        """Ours and the floors in turns."""
        systems: dict[tuple[str, str], Callable[[], Awaitable[None]]] = {("request", "raw_nats"): self.request}
        for kind in ("write", "read"):
            systems[kind, "nixlbus"] = lambda kind=kind: self.operate(kind, size_bytes, self.peer)  # type: ignore[misc]
            systems[kind, "nixlbus_open"] = lambda kind=kind: self.operate(kind, size_bytes, None)  # type: ignore[misc]
        if concurrency == 1:
            for name, floor in zip(("raw_nixl", "raw_nixl_huge"), self.floors, strict=True):
                systems["write", name] = lambda floor=floor: self.move(size_bytes, floor)  # type: ignore[misc]
        samples: dict[tuple[str, str], Samples] = defaultdict(lambda: Samples([]))
        count = repetitions(size_bytes, self.quick)
        for operate in systems.values():
            await timed(operate, max(concurrency, 8), concurrency, Samples([]))
        for _ in range(ROUNDS):
            for key, operate in systems.items():
                await timed(operate, max(count, concurrency * 4), concurrency, samples[key])
        for (case, system), taken in samples.items():
            self.report.row(case, system, size_bytes, concurrency, taken.seconds, taken.wall_s)

    async def small_beside_large(self) -> None:
        """4 KiB writes, alone and while 64 MiB writes follow each other without a pause."""
        alone, beside = Samples([]), Samples([])
        count = 400 if self.quick else 2000

        async def stream() -> None:
            while True:
                await self.operate("write", 64 * MIB, self.peer)

        for _ in range(3):
            await timed(lambda: self.operate("write", 4 * KIB, self.peer), count, 1, alone)
            streaming = asyncio.create_task(stream())
            await asyncio.sleep(0.1)
            await timed(lambda: self.operate("write", 4 * KIB, self.peer), count, 1, beside)
            streaming.cancel()
            await asyncio.wait([streaming])
            await asyncio.sleep(0.2)
        self.report.row("write alone", "nixlbus", 4 * KIB, 1, alone.seconds, alone.wall_s)
        self.report.row("write beside 64 MiB", "nixlbus", 4 * KIB, 1, beside.seconds, beside.wall_s)


async def measure(report: Report, quick: bool) -> None:
    """Start the other process and measure everything against it."""
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder, "key")
        write_key_file(key)
        async with embedded_server() as server:
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=child, args=(server.url, str(key), theirs))
            process.daemon = True
            process.start()
            if not await asyncio.to_thread(ours.poll, START_TIMEOUT_S):
                raise TimeoutError("the other process did not start")
            epoch, invitations = ours.recv()
            config = BusConfig(worker_id="target", nats_url=server.url, key_file=str(key), arena_bytes=ARENA_BYTES)
            raw = await nats.connect(server.url)
            async with Bus.open(config) as bus:
                peer = Initiator(worker_id="initiator", epoch=epoch)
                floors = [Floor(invitation, max(SIZES), bool(index)) for index, invitation in enumerate(invitations)]
                measurement = Measurement(report, bus, raw, peer, floors, quick)
                await measurement.operate("write", 4 * KIB, peer)
                settle_heap()
                before = await counters(bus, ours)
                await measurement.cases()
                await measurement.small_beside_large()
                hold_against_counts(report, before, await counters(bus, ours), len(report.rows))
                await idle(report)
            await raw.close()
            ours.send("done")
            await asyncio.to_thread(process.join, 30)


async def counters(bus: Bus, other: Connection) -> dict[str, int]:
    """Registrations and handshakes of both processes together."""
    other.send("counters")
    theirs: tuple[dict[str, int], float] = await asyncio.to_thread(other.recv)
    ours = bus.stats()
    return {name: ours[name] + theirs[0][name] for name in ("registrations", "handshakes")}


async def idle(report: Report) -> None:
    """What an open agent costs when nothing happens."""
    before_s = time.process_time()
    await asyncio.sleep(IDLE_S)
    report.check("idle_cpu_share_of_a_core", (time.process_time() - before_s) / IDLE_S, 0.02, "lower")


def hold_against_counts(report: Report, before: dict[str, int], after: dict[str, int], num_cases: int) -> None:
    """Nothing is registered and nobody introduced once both sides know each other."""
    assert num_cases
    for name, label in (("registrations", "registrations"), ("handshakes", "remote_agent_additions")):
        report.check(f"arena_path_{label}_after_warm_up", after[name] - before[name], 0, "lower")


def hold_against_limits(report: Report) -> None:
    """The ratios that the project promises."""

    def p50(case: str, system: str, size_bytes: int) -> float:
        return report.value(case, system, size_bytes, 1, "p50_us")

    for size_bytes, label in ((4 * KIB, "4KiB"), (64 * KIB, "64KiB")):
        floor = p50("request", "raw_nats", size_bytes)
        for kind in ("write", "read"):
            for system, limit in (("nixlbus", 1.45), ("nixlbus_open", 2.5)):
                report.check(f"{kind}_{label}_{system}_p50_vs_raw_nats", p50(kind, system, size_bytes) / floor, limit)
            if report.has(kind, "nixl_connect", size_bytes, 1):
                faster = p50(kind, "nixl_connect", size_bytes) / p50(kind, "nixlbus", size_bytes)
                report.check(f"{kind}_{label}_times_faster_than_nixl_connect", faster, 25, "higher")
    both = p50("write", "raw_nixl", MIB) + p50("request", "raw_nats", MIB)
    report.check("write_1MiB_p50_vs_raw_nixl_and_nats", p50("write", "nixlbus", MIB) / both, 1.3)
    bandwidth = p50("write", "raw_nixl", 64 * MIB) / p50("write", "nixlbus", 64 * MIB)
    report.check("write_64MiB_bandwidth_vs_raw_nixl", bandwidth, 0.9, "higher")
    bandwidth = p50("write", "raw_nixl_huge", 64 * MIB) / p50("write", "nixlbus", 64 * MIB)
    report.check("write_64MiB_bandwidth_vs_raw_nixl_on_huge_pages_too", bandwidth, 0.9, "higher")
    rate = report.value("write", "nixlbus", 4 * KIB, 32, "per_s")
    requests = report.value("request", "raw_nats", 4 * KIB, 32, "per_s")
    report.check("write_4KiB_32_at_once_vs_raw_nats", rate / requests, 0.5, "higher")
    beside = report.value("write beside 64 MiB", "nixlbus", 4 * KIB, 1, "p99_us")
    alone = report.value("write alone", "nixlbus", 4 * KIB, 1, "p99_us")
    report.check("write_4KiB_p99_beside_64MiB_stream_vs_alone", beside / alone, 5)


def tables(report: Report) -> tuple[Table, Table]:
    """Rows and checks for people."""
    rows = Table(box=None, pad_edge=False)
    for heading in ("case", "bytes", "at once", "system", "p50 µs", "p99 µs", "per s", "GB/s"):
        rows.add_column(heading, justify="left" if heading in ("case", "system") else "right")
    for row in report.rows:
        figures = (f"{row[column]:,.0f}" for column in ("p50_us", "p99_us", "per_s"))
        gigabytes = "" if row["case"] == "request" else f"{row['bytes_per_s'] / 1e9:.2f}"
        rows.add_row(row["case"], f"{row['size_bytes']:,}", str(row["concurrency"]), row["system"], *figures, gigabytes)
    checks = Table(box=None, pad_edge=False)
    for heading in ("check", "value", "limit", ""):
        checks.add_column(heading)
    for check in report.checks:
        sign = "≤" if check["better"] == "lower" else "≥"
        checks.add_row(
            check["name"], f"{check['value']:.3g}", f"{sign} {check['limit']}", "ok" if check["ok"] else "MISSED"
        )
    return rows, checks


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute")
    parser.add_argument("--peers", action="store_true", help="and dynamo.nixl_connect, from .venv-dynamo (make test)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run it and print the tables."""
    given = arguments()
    os.environ.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
    torch.set_num_threads(1)
    report = Report("operations")
    uvloop.run(measure(report, given.quick))
    memcpy(report, SIZES, lambda size_bytes: repetitions(size_bytes, given.quick))
    if given.peers:
        nixl_connect_rows(report, given.quick)
    hold_against_limits(report)
    console = Console(width=120, highlight=False)
    for table in tables(report):
        console.print(table, "")
    if given.json:
        report.write(given.json)


if __name__ == "__main__":
    main()
