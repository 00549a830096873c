"""Workers of the version before and of this one, each in a process of its own, serve and call each other."""

import asyncio
from contextlib import AsyncExitStack, aclosing
from typing import Literal

import pytest

from bus import Bus, EmbeddedServer
from tests.upgrade.conftest import Pair
from tests.upgrade.peer import GRAPH, VALUE, Ask, Command, Count, Counted, CountEnd, Load, Told
from tests.upgrade.versions import THIS, PeerProcess, Version, worker

LOAD_S = 1.5
MANY_FRAMES = 3000
"""More than any window that a caller of this version may ask for."""

pytestmark = pytest.mark.asyncio(loop_scope="module")

both_ways = pytest.mark.parametrize("way", ["before asks this", "this asks before"])


def ordered(pair: Pair, way: str) -> tuple[PeerProcess, PeerProcess]:
    """Who asks, and who is asked."""
    return (pair.before, pair.this) if way == "before asks this" else (pair.this, pair.before)


async def test_under_load_both_versions_answer_both_and_nothing_fails(pair: Pair, driver: Bus) -> None:
    async with Load(driver) as ours:
        for peer in pair:
            await peer.told(driver, Command(what="start load"))
        await asyncio.sleep(LOAD_S)
        reports = [await ours.end(), *[await peer.told(driver, Command(what="end load")) for peer in pair]]
    for report in reports:
        assert report.failures == []
        assert set(report.answered_by) == {"before", "this"}


@both_ways
async def test_a_long_stream_crosses_versions_whole(pair: Pair, driver: Bus, way: str) -> None:
    asking, asked = ordered(pair, way)
    report = await asking.told(driver, Command(what="count", peer=asked.worker_id, num_frames=MANY_FRAMES))
    assert (report.num_frames, report.failures) == (MANY_FRAMES, [])


@both_ways
async def test_a_fault_of_the_other_version_arrives_as_it_was_sent(pair: Pair, driver: Bus, way: str) -> None:
    asking, asked = ordered(pair, way)

    async def fault(**fields: object) -> tuple[str, str, bool, str, list[str]]:
        report = await asking.told(driver, Command(peer=asked.worker_id, **fields))  # type: ignore[arg-type]
        assert report.fault is not None, report
        return (
            report.fault.code,
            report.fault.message,
            report.fault.retryable,
            report.fault.worker_id,
            report.fault.hops,
        )

    me = asked.worker_id
    assert await fault(what="ask", ask=Ask(fault="not_found")) == (
        "not_found",
        "there is no such thing",
        False,
        me,
        [],
    )
    assert await fault(what="ask", ask=Ask(fault="a code of later")) == (
        "invented_later",
        "something new",
        True,
        "far",
        [me],
    )
    code, message, *_ = await fault(what="ask", ask=Ask(fault="by accident"))
    assert (code, "secret" in message) == ("internal", False)
    code, message, *_ = await fault(what="ask amiss")
    assert code == "unknown_message_type"
    assert "upgrade.ask" in message


@both_ways
async def test_a_deadline_holds_across_versions_and_the_next_request_is_answered(
    pair: Pair, driver: Bus, way: str
) -> None:
    asking, asked = ordered(pair, way)
    slow = Command(what="ask", peer=asked.worker_id, ask=Ask(seconds=60.0), timeout_s=0.3)
    report = await asking.told(driver, slow)
    assert report.fault.code == "deadline_exceeded" if report.fault else "DeadlineExceeded" in report.failures[0]
    prompt = Command(what="ask", peer=asked.worker_id, ask=Ask(text="next"))
    assert (await asking.told(driver, prompt)).told == "next"


@pytest.mark.parametrize("version", ["before", "this"])
async def test_a_caller_that_goes_away_leaves_a_worker_that_answers_the_next(
    pair: Pair, driver: Bus, version: str
) -> None:
    worker_id = getattr(pair, version).worker_id
    subject = driver.subjects.worker(worker_id, "ask")
    away = asyncio.create_task(driver.request(subject, Ask(seconds=0.3), Told, timeout_s=30))
    frames = driver.stream(
        driver.subjects.worker(worker_id, "count"), Count(num_frames=2000), Counted, CountEnd, timeout_s=30
    )
    async with aclosing(frames):
        assert await anext(frames) == Counted(seq=0)
        away.cancel()
    with pytest.raises(asyncio.CancelledError):
        await away
    assert await driver.request(subject, Ask(text="next"), Told, timeout_s=30) == Told(text="next", worker_id=worker_id)


@both_ways
async def test_discovery_lists_workers_of_both_versions_in_the_same_queue_groups(
    pair: Pair, driver: Bus, way: str
) -> None:
    asking, _ = ordered(pair, way)
    services = (await asking.told(driver, Command(what="services"))).services
    assert {name: each["version"] for name, each in services.items()} == {
        peer.worker_id: peer.version.number for peer in pair
    }
    groups = [{subject: group for subject, group in each.items() if GRAPH in subject} for each in services.values()]
    assert groups[0] == groups[1] != {}


@both_ways
@pytest.mark.parametrize("num_bytes", [4096, 5 << 20])
@pytest.mark.parametrize("kind", ["writable", "readable"])
@pytest.mark.parametrize("grant", ["offer", "offer by name"])
async def test_memory_moves_between_versions(
    pair: Pair,
    driver: Bus,
    way: str,
    num_bytes: int,
    kind: Literal["writable", "readable"],
    grant: Literal["offer", "offer by name"],
) -> None:
    target, initiator = ordered(pair, way)
    services = (await target.told(driver, Command(what="services"))).services
    command = Command(
        what=grant,
        peer=initiator.worker_id,
        epoch=services[initiator.worker_id]["epoch"],
        kind=kind,
        num_bytes=num_bytes,
        checksum=True,
    )
    report = await target.told(driver, command)
    assert (report.num_bytes, report.total) == (num_bytes, num_bytes * VALUE)


@pytest.mark.parametrize("change", ["upgrade", "downgrade"])
async def test_a_rolling_change_of_version_under_load_loses_nothing(
    server: EmbeddedServer, pair: Pair, driver: Bus, version_before: Version, change: str
) -> None:
    first, second = (version_before, THIS) if change == "upgrade" else (THIS, version_before)
    async with AsyncExitStack() as stack:

        async def start(version: Version, worker_id: str) -> PeerProcess:
            return await stack.enter_async_context(worker(version, worker_id, server.url))

        leaving = [await start(first, f"{change}-first-{number}") for number in range(2)]
        ours = await stack.enter_async_context(Load(driver))
        for peer in pair:
            await peer.told(driver, Command(what="start load"))
        coming = []
        for number, old in enumerate(leaving):
            coming.append(await start(second, f"{change}-second-{number}"))
            await old.drain()
        await asyncio.sleep(0.2)
        reports = [await ours.end(), *[await peer.told(driver, Command(what="end load")) for peer in pair]]
    for report in reports:
        assert report.failures == []
        assert {peer.worker_id for peer in (*leaving, *coming)} <= set(report.answered_by)
