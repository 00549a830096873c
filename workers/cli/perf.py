"""`nixlbus perf A B`: latency and bandwidth by size between two live workers, and the transport that UCX chose.

A, the initiator, writes B's memory (or reads it) with the bus and the NIXL agent that its own requests use.
"""

import re
from typing import Any

import msgspec
import typer
from rich.table import Table

from bus import NoResponders
from schemas.performance import (
    MAX_SIZES,
    PERFORMANCE_ENDPOINT,
    Direction,
    PerformanceReport,
    PerformanceRequest,
)
from schemas.subjects import checked_worker_id
from workers.cli.client import OPERATOR, open_client
from workers.cli.output import Output

DIRECTIONS: dict[str, Direction] = {"write": "write", "read": "read"}
GRACE_S = 60.0
"""Beyond the time limit: for the operation that is under way at its end, and for seeing the lanes."""
_SIZE = re.compile(r"(\d+)\s*(?:([KMG])(?:i?B)?|B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


async def run(
    workers: tuple[str, str],
    direction: str,
    sizes: str,
    repetitions: int,
    time_limit_s: float,
    nats: str | None,
    as_json: bool,
) -> int:
    """Measure and print; returns the exit status."""
    output = Output(as_json)
    initiator, target = workers
    checked_worker_id(target)
    if direction not in DIRECTIONS:
        raise typer.BadParameter(f"{direction!r} is neither write nor read")
    request = PerformanceRequest(
        target=target,
        direction=DIRECTIONS[direction],
        sizes_bytes=parsed_sizes(sizes),
        repetitions=repetitions,
        time_limit_ms=round(time_limit_s * 1000),
    )
    async with open_client(OPERATOR, nats) as bus:
        subject = bus.subjects.worker(initiator, PERFORMANCE_ENDPOINT)
        try:
            report = await bus.request(subject, request, PerformanceReport, timeout_s=time_limit_s + GRACE_S)
        except NoResponders:
            raise NoResponders(
                f"no worker {initiator!r} with a data plane answers", remedy="'nixlbus ps' lists the live workers"
            ) from None
    output.result(_as_json(initiator, request, report))
    _tell(initiator, request, report, output)
    return 0


def parsed_sizes(text: str) -> list[int]:
    """Sizes in bytes, in the order given: `1K,16 KiB,4M`; K, M and G are powers of 1024. Raises `BadParameter`."""
    sizes = []
    for part in text.split(","):
        matched = _SIZE.fullmatch(part.strip())
        size_bytes = int(matched[1]) * _UNITS[(matched[2] or "").upper()] if matched else 0
        if not 0 < size_bytes < 2**63:
            raise typer.BadParameter(f"{part.strip()!r} is no size; sizes look like 512,64K,4M,1G")
        sizes.append(size_bytes)
    if len(sizes) > MAX_SIZES:
        raise typer.BadParameter(f"{len(sizes)} sizes are given, {MAX_SIZES} are the most")
    return sizes


def size_text(num_bytes: int) -> str:
    """A size for people: exact, in the largest unit that leaves a whole number."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes % factor == 0:
            return f"{num_bytes // factor} {unit}"
    return f"{num_bytes} B"


def _as_json(initiator: str, request: PerformanceRequest, report: PerformanceReport) -> dict[str, Any]:
    return {
        "initiator": initiator,
        "target": request.target,
        "kind": request.direction,
        "backend": report.backend,
        "lanes": report.lanes,
        "lanes_reason": report.lanes_reason,
        "rows": msgspec.to_builtins(report.rows),
        "skipped": msgspec.to_builtins(report.skipped),
    }


def _tell(initiator: str, request: PerformanceRequest, report: PerformanceReport, output: Output) -> None:
    verb = "writes to" if request.direction == "write" else "reads from"
    lanes = f"{report.lanes} ({report.lanes_reason})" if report.lanes_reason else report.lanes
    output.text(f"{initiator} {verb} {request.target}")
    output.text(f"{report.backend}: {lanes}")
    output.table(_table(report))
    for size in report.skipped:
        output.text(f"{size_text(size.size_bytes)} skipped: {size.reason}")


def _table(report: PerformanceReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("size", "operations", "p50 µs", "p99 µs", "wire p50 µs", "GB/s"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        table.add_row(
            size_text(row.size_bytes),
            str(row.num_operations),
            f"{row.p50_us:,.0f}",
            f"{row.p99_us:,.0f}",
            f"{row.wire_p50_us:,.0f}",
            f"{row.bytes_per_s / 1e9:.2f}",
        )
    return table
