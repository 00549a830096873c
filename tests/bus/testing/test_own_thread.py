import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bus.testing import in_own_thread


@asynccontextmanager
async def place(events: list[str], fails: str = "") -> AsyncIterator[str]:
    if fails == "entering":
        raise LookupError("entering")
    events.append("entered")
    try:
        yield threading.current_thread().name
    finally:
        await asyncio.sleep(0)
        events.append("left")
        if fails == "leaving":
            raise LookupError("leaving")


def test_the_context_lives_in_its_thread_as_long_as_the_block() -> None:
    events: list[str] = []
    with in_own_thread(place(events), name="apart") as (name, loop):
        assert (name, events, loop.is_running()) == ("apart", ["entered"], True)
    assert (events, loop.is_closed()) == (["entered", "left"], True)


@pytest.mark.parametrize(("fails", "events_after"), [("entering", []), ("leaving", ["entered", "left"])])
def test_what_fails_there_is_raised_here(fails: str, events_after: list[str]) -> None:
    events: list[str] = []
    with pytest.raises(LookupError, match=fails), in_own_thread(place(events, fails), name="apart"):
        assert events == ["entered"]
    assert events == events_after


def test_a_context_that_is_entered_too_late_is_left_again() -> None:
    events: list[str] = []
    left = threading.Event()

    @asynccontextmanager
    async def late() -> AsyncIterator[None]:
        await asyncio.sleep(0.1)
        try:
            async with place(events):
                yield
        finally:
            left.set()

    with pytest.raises(TimeoutError), in_own_thread(late(), name="apart", start_timeout_s=0.01):
        raise AssertionError("entered")
    assert left.wait(5)
    assert events == ["entered", "left"]


def test_a_failure_of_the_block_ends_the_context() -> None:
    events: list[str] = []
    with pytest.raises(KeyError), in_own_thread(place(events), name="apart"):
        raise KeyError
    assert events == ["entered", "left"]
