import asyncio
import time

from bus.control_plane.expiry import Expiries


class Thing:
    def __init__(self) -> None:
        self.expired_at_s = 0.0

    def expire(self) -> None:
        self.expired_at_s = time.monotonic()


async def test_a_thing_expires_after_its_time_and_not_long_after() -> None:
    expiries = Expiries()
    for wait_s in (0.0, 0.003, 0.2):
        thing, at_s = Thing(), time.monotonic() + wait_s
        expiries.add(thing, at_s)
        async with asyncio.timeout(5):
            while not thing.expired_at_s:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert thing.expired_at_s >= at_s - 0.002  # uvloop's and asyncio's timers fire up to a clock step early


async def test_what_was_discarded_does_not_expire() -> None:
    expiries = Expiries()
    gone, kept = Thing(), Thing()
    at_s = time.monotonic() + 0.02
    expiries.discard(gone, expiries.add(gone, at_s))
    expiries.add(kept, at_s)
    async with asyncio.timeout(5):
        while not kept.expired_at_s:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert not gone.expired_at_s


async def test_many_deadlines_share_few_timers_and_leave_nothing_behind() -> None:
    expiries = Expiries()
    at_s = time.monotonic()
    for number in range(10_000):
        thing = Thing()
        expiries.discard(thing, expiries.add(thing, at_s + 60 + number * 1e-4))
    assert len(expiries._due) < 10
    assert not any(expiries._due.values())
    # A wait in the past is over at once.
    late = Thing()
    expiries.add(late, at_s - 5)
    await asyncio.sleep(0.05)
    assert late.expired_at_s
