import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bus import (
    Bus,
    BusConfig,
    NoResponders,
    PoolExhausted,
    RemoteFault,
    RequestRefused,
    embedded_server,
    write_key_file,
)
from schemas.fault import FaultCode
from schemas.performance import PERFORMANCE_ENDPOINT, Direction, PerformanceReport, PerformanceRequest
from workers import performance
from workers.performance import target
from workers.performance.initiator import PerformanceInitiator

ARENA_BYTES = 8 << 20


class Pair(NamedTuple):
    initiator: Bus
    target: Bus


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    key = tmp_path / "key"
    write_key_file(key)
    async with embedded_server() as server:
        first, second = (
            Bus.open(BusConfig(worker_id=name, nats_url=server.url, key_file=str(key), arena_bytes=ARENA_BYTES))
            for name in ("first", "second")
        )
        async with first as initiator, second as opened:
            await performance.serve(initiator)
            await performance.serve(opened)
            yield Pair(initiator, opened)


def request_of(
    *sizes_bytes: int,
    to: str = "second",
    direction: Direction = "write",
    repetitions: int = 5,
    time_limit_ms: int = 60_000,
) -> PerformanceRequest:
    return PerformanceRequest(
        target=to,
        direction=direction,
        sizes_bytes=list(sizes_bytes),
        repetitions=repetitions,
        time_limit_ms=time_limit_ms,
    )


async def measured(pair: Pair, request: PerformanceRequest) -> PerformanceReport:
    subject = pair.target.subjects.worker("first", PERFORMANCE_ENDPOINT)
    return await pair.target.request(subject, request, PerformanceReport, timeout_s=60)


@pytest.mark.parametrize("direction", ["write", "read"])
async def test_every_size_has_its_row_and_the_memory_is_given_back(
    pair: Pair, direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "RESERVED_FOR_S", 0.05)
    report = await measured(pair, request_of(1000, 3 << 20, direction=direction))
    rows = [(row.size_bytes, row.num_operations, row.num_bytes) for row in report.rows]
    assert rows == [(1000, 5, 5000), (3 << 20, 5, 15 << 20)]
    assert all(0 < row.wire_p50_us <= row.p50_us <= row.p99_us and row.bytes_per_s > 0 for row in report.rows)
    assert report.backend == "UCX"
    async with asyncio.timeout(10):
        while pair.initiator.stats()["arena_used_bytes"] + pair.target.stats()["arena_used_bytes"]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_lanes_that_can_not_be_seen_are_unknown_and_the_report_says_why(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "nothing")
    report = await measured(pair, request_of(1000))
    assert report.rows
    assert report.lanes == "unknown"
    assert "UCX_TLS=nothing" in report.lanes_reason


async def test_a_size_without_room_is_skipped_and_says_where(pair: Pair) -> None:
    report = await measured(pair, request_of(ARENA_BYTES * 2, 1000))
    assert [row.size_bytes for row in report.rows] == [1000]
    assert [skipped.size_bytes for skipped in report.skipped] == [ARENA_BYTES * 2]
    assert "first: no 16,777,216 bytes free" in report.skipped[0].reason


async def test_a_size_without_room_at_the_target_is_skipped_as_well(pair: Pair) -> None:
    with pair.target.arena.allocate([ARENA_BYTES // 2], torch.uint8):
        report = await measured(pair, request_of(1000, ARENA_BYTES // 2 + 1))
    assert len(report.rows) == 1
    assert "second: no 4,194,305 bytes free" in report.skipped[0].reason


async def test_no_room_for_any_size_is_an_error(pair: Pair) -> None:
    with pytest.raises(PoolExhausted):
        await PerformanceInitiator(pair.initiator).measure(request_of(ARENA_BYTES * 2, ARENA_BYTES * 3))


async def test_the_time_limit_leaves_fewer_operations_and_says_what_it_left_out(pair: Pair) -> None:
    report = await measured(pair, request_of(1000, 2000, repetitions=10_000, time_limit_ms=1))
    assert report.rows[0].num_operations < 10_000
    assert report.rows[0].num_bytes == 1000 * report.rows[0].num_operations
    assert report.skipped[0].reason == "no time was left for it"


async def test_a_missing_target_is_known_at_once(pair: Pair) -> None:
    with pytest.raises(NoResponders, match="no worker 'third'"):
        await PerformanceInitiator(pair.initiator).measure(request_of(1000, to="third"))
    with pytest.raises(RemoteFault) as caught:
        await measured(pair, request_of(1000, to="third"))
    assert caught.value.fault.code == FaultCode.NO_RESPONDERS


async def test_too_much_and_oneself_are_refused(pair: Pair) -> None:
    initiator = PerformanceInitiator(pair.initiator)
    with pytest.raises(RequestRefused, match="with itself"):
        await initiator.measure(request_of(1000, to="first"))
    with pytest.raises(RequestRefused, match="are the most"):
        await initiator.measure(request_of(1 << 40, repetitions=2))
