"""Paired operations between two processes over a real nats-server, beside their floors in the same run.

    python -m benchmarks.operations [--quick] [--json FILE]

Systems: `nixlbus` (named grant), `nixlbus_open` (open grant: one claim more), `raw_nats` (an empty request-reply with
nats-py: what telling a peer costs), `raw_nixl` (one agent writing the same bytes in a loop: what moving them costs),
`memcpy`. An operation is timed from its creation until the target knows that the bytes are complete. Tracing is off.
"""

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

import nats
import torch
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg
from rich.console import Console
from rich.table import Table

from benchmarks.report import Report
from bus import Bus, BusConfig, EndpointConfig, embedded_server, write_key_file
from bus.data_plane.addressing import CopyPair
from bus.data_plane.agent import NixlAgent, TransferDirection, TransferState
from schemas.message import Message
from schemas.operations import Initiator, OperationKind, RdmaMetadata

SIZES = (4 << 10, 64 << 10, 1 << 20, 64 << 20)
CONCURRENCIES = (1, 8, 32)
ARENA_BYTES = 512 << 20
START_TIMEOUT_S = 60


class Move(Message, frozen=True, kw_only=True, tag="benchmark.move"):
    """Act on this grant."""

    grant: RdmaMetadata


class Moved(Message, frozen=True, kw_only=True, tag="benchmark.moved"):
    """Begun."""


def repetitions(size_bytes: int, quick: bool) -> int:
    """Operations per case: enough for a median, few enough for a minute."""
    few = 12 if size_bytes > 16 << 20 else 300
    return few if quick else few * 8


async def timed(operate: Callable[[], Awaitable[None]], count: int, concurrency: int) -> tuple[list[float], float]:
    """Run `count` operations, `concurrency` at a time; returns their durations and that of the whole, in seconds."""
    durations: list[float] = []

    async def runner(number: int) -> None:
        for _ in range(number):
            started_s = time.perf_counter()
            await operate()
            durations.append(time.perf_counter() - started_s)

    started_s = time.perf_counter()
    await asyncio.gather(*(runner(max(1, count // concurrency)) for _ in range(concurrency)))
    return durations, time.perf_counter() - started_s


async def initiate(nats_url: str, key_file: str, parent: Connection) -> None:
    """The other process: acts on every grant it is sent."""
    config = BusConfig(worker_id="initiator", nats_url=nats_url, key_file=key_file, arena_bytes=ARENA_BYTES)
    async with Bus.open(config) as bus:
        local = bus.arena.allocate([max(SIZES)], torch.uint8)
        local.tensor.fill_(7)
        under_way: set[asyncio.Task[None]] = set()

        async def act(grant: RdmaMetadata) -> None:
            piece = bus.memory.describe(local.tensor[: grant.num_bytes])
            if grant.kind is OperationKind.WRITABLE:
                await (await bus.begin_write(grant, piece))
            else:
                await (await bus.begin_read(grant, piece))

        async def move(request: Move) -> Moved:
            task = asyncio.create_task(act(request.grant))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            return Moved()

        subject = bus.subjects.worker("initiator", "move")
        await bus.serve(EndpointConfig("move", subject, Move, max_queued=4096, traced=False), move)
        raw = await nats.connect(nats_url)

        async def echo(message: Msg) -> None:
            await raw.publish(message.reply, b"")

        await raw.subscribe("raw.echo", cb=echo)
        await raw.flush()
        parent.send(bus.epoch)
        await asyncio.to_thread(parent.recv)
        await raw.close()


def child(nats_url: str, key_file: str, parent: Connection) -> None:
    """Entry of the other process."""
    uvloop.run(initiate(nats_url, key_file, parent))


async def measure_bus(report: Report, quick: bool) -> None:
    """Ours and raw NATS, interleaved per case."""
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
            epoch = ours.recv()
            config = BusConfig(worker_id="target", nats_url=server.url, key_file=str(key), arena_bytes=ARENA_BYTES)
            raw = await nats.connect(server.url)
            async with Bus.open(config) as bus:
                await _measure_cases(report, bus, raw, Initiator(worker_id="initiator", epoch=epoch), quick)
            await raw.close()
            ours.send("done")
            await asyncio.to_thread(process.join, 30)


async def _measure_cases(report: Report, bus: Bus, raw: Client, peer: Initiator, quick: bool) -> None:
    subject = bus.subjects.worker("initiator", "move")

    async def request() -> None:
        await raw.request("raw.echo", b"x" * 200, timeout=10)

    async def operate(kind: str, size_bytes: int, initiator: Initiator | None) -> None:
        with bus.arena.allocate([size_bytes], torch.uint8) as target:
            create = bus.create_writable if kind == "write" else bus.create_readable
            operation = await create(target.descriptor, initiator=initiator)
            reply = asyncio.create_task(
                bus.request(subject, Move(grant=operation.metadata), Moved, timeout_s=30)  # beside the operation
            )
            await operation
            await reply

    for size_bytes in SIZES:
        for concurrency in CONCURRENCIES:
            if concurrency * size_bytes > ARENA_BYTES // 2:
                continue
            count = repetitions(size_bytes, quick)
            await timed(request, 20, concurrency)
            report.row("request", "raw_nats", size_bytes, concurrency, *await timed(request, count, concurrency))
            for kind in ("write", "read"):
                for system, initiator in (("nixlbus", peer), ("nixlbus_open", None)):
                    run = lambda k=kind, i=initiator: operate(k, size_bytes, i)  # noqa: B023, E731
                    await timed(run, max(concurrency, 8), concurrency)
                    report.row(kind, system, size_bytes, concurrency, *await timed(run, count, concurrency))


def measure_floors(report: Report, quick: bool) -> None:
    """One agent writing to another in this process, and a plain copy: no messages, no waiting for anybody."""
    source, target = torch.ones(max(SIZES), dtype=torch.uint8), torch.zeros(max(SIZES), dtype=torch.uint8)
    writer, reader = NixlAgent("floor-writer"), NixlAgent("floor-reader")
    writer.register(source.data_ptr(), source.nbytes, "DRAM", 0)
    reader.register(target.data_ptr(), target.nbytes, "DRAM", 0)
    peer = writer.load_peer(reader.metadata())

    def write(size_bytes: int) -> None:
        pair = CopyPair(source.data_ptr(), target.data_ptr(), size_bytes, 0, 0)
        handle = writer.create_transfer(TransferDirection.WRITE, [pair], peer)
        state = writer.post(handle)
        while state is not TransferState.DONE:
            time.sleep(30e-6)
            state = writer.check(handle)
        writer.release(handle)

    for size_bytes in SIZES:
        for system, operate in (
            ("raw_nixl", lambda: write(size_bytes)),  # noqa: B023
            ("memcpy", lambda: target[:size_bytes].copy_(source[:size_bytes])),  # noqa: B023
        ):
            operate()
            durations = []
            started_s = time.perf_counter()
            for _ in range(repetitions(size_bytes, quick)):
                before_s = time.perf_counter()
                operate()
                durations.append(time.perf_counter() - before_s)
            report.row("write", system, size_bytes, 1, durations, time.perf_counter() - started_s)


def hold_against_limits(report: Report) -> None:
    """The ratios that the project promises."""
    for size_bytes, label in ((4 << 10, "4KiB"), (64 << 10, "64KiB")):
        floor = report.value("request", "raw_nats", size_bytes, 1, "p50_us")
        for kind in ("write", "read"):
            for system, limit in (("nixlbus", 1.45), ("nixlbus_open", 2.5)):
                ratio = report.value(kind, system, size_bytes, 1, "p50_us") / floor
                report.check(f"{kind}_{label}_{system}_p50_vs_raw_nats", ratio, limit, "lower")
    rate = report.value("write", "nixlbus", 4 << 10, 32, "per_s") / report.value(
        "request", "raw_nats", 4 << 10, 32, "per_s"
    )
    report.check("write_4KiB_32_at_once_vs_raw_nats", rate, 0.5, "higher")
    both = report.value("write", "raw_nixl", 1 << 20, 1, "p50_us") + report.value(
        "request", "raw_nats", 1 << 20, 1, "p50_us"
    )
    report.check(
        "write_1MiB_p50_vs_raw_nixl_and_nats",
        report.value("write", "nixlbus", 1 << 20, 1, "p50_us") / both,
        1.3,
        "lower",
    )
    floor = report.value("write", "raw_nixl", 64 << 20, 1, "p50_us")
    report.check(
        "write_64MiB_bandwidth_vs_raw_nixl",
        floor / report.value("write", "nixlbus", 64 << 20, 1, "p50_us"),
        0.9,
        "higher",
    )


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
            check["name"], f"{check['value']:.2f}", f"{sign} {check['limit']}", "ok" if check["ok"] else "MISSED"
        )
    return rows, checks


def main() -> None:
    """Run it and print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    report = Report("operations")
    uvloop.run(measure_bus(report, given.quick))
    measure_floors(report, given.quick)
    hold_against_limits(report)
    console = Console(width=120, highlight=False)
    for table in tables(report):
        console.print(table, "")
    if given.json:
        report.write(given.json)


if __name__ == "__main__":
    main()
