import asyncio
from collections.abc import Awaitable, Callable

import pytest

from bus import BusError, PeerLost
from workers import paired_call
from workers.paired_call import reply_and_completion

LONG_S = 30.0


async def after(seconds: float, outcome: str | BaseException) -> str:
    await asyncio.sleep(seconds)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


@pytest.mark.parametrize(("call_s", "operation_s"), [(0.0, 0.05), (0.05, 0.0)])
async def test_the_reply_is_given_when_the_operation_is_complete_too(call_s: float, operation_s: float) -> None:
    operation = asyncio.ensure_future(after(operation_s, "complete"))
    assert await reply_and_completion(after(call_s, "reply"), operation) == "reply"
    assert operation.done()


async def test_an_operation_that_fails_ends_the_wait_for_a_reply_that_will_not_come() -> None:
    async with asyncio.timeout(LONG_S / 2):
        with pytest.raises(PeerLost):
            await reply_and_completion(after(LONG_S, "reply"), after(0, PeerLost("gone")))


async def test_the_fault_of_a_worker_that_failed_the_operation_is_told_rather_than_the_operation_s() -> None:
    with pytest.raises(BusError, match="the reason"):
        await reply_and_completion(after(0.05, BusError("the reason")), after(0, PeerLost("gone")))


@pytest.mark.parametrize("end", [lambda task: task.cancel(), lambda task: None], ids=["cancelled", "refused"])
async def test_nothing_goes_on_after_it(end: Callable[["asyncio.Task[str]"], object]) -> None:
    ended: list[str] = []

    async def goes_on(name: str, then: Awaitable[str]) -> str:
        try:
            return await then
        finally:
            ended.append(name)

    refusal = after(0.05, BusError("no"))
    task = asyncio.create_task(
        reply_and_completion(goes_on("call", refusal), goes_on("operation", after(LONG_S, "complete")))
    )
    await asyncio.sleep(0.02)
    end(task)
    with pytest.raises((asyncio.CancelledError, BusError)):
        await task
    assert sorted(ended) == ["call", "operation"]
    assert paired_call.SAY_WHY_S < LONG_S
