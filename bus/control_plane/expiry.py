"""The deadlines of many requests at the price of few timers.

In: things with an `expire` method, and when. Out: a call of `expire`, never before its time and later by at most a
hundredth of the wait or 5 ms. An event loop's timer costs 4 µs to set and cancel, which is a tenth of a request; things
whose deadlines lie close together share one here, and it costs a quarter of a microsecond.
"""

import asyncio
import time
from contextvars import Context
from typing import NamedTuple, Protocol

FINEST_S = 0.005
COARSENESS = 0.01
_STEPS_S = (FINEST_S, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0)


class Expiring(Protocol):
    """What has a deadline."""

    def expire(self) -> None:
        """Its time is up."""


class Expiry(NamedTuple):
    """Where a thing waits for its deadline."""

    step_s: float
    tick: int


class Expiries:
    """The deadlines of one event loop's requests."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: dict[Expiry, set[Expiring]] = {}

    def add(self, thing: Expiring, at_s: float) -> Expiry:
        """Expire `thing` at `at_s` of `time.monotonic`; give what this returns to `discard`."""
        now_s = time.monotonic()
        step_s = FINEST_S
        if at_s - now_s > FINEST_S / COARSENESS:
            step_s = next((step for step in reversed(_STEPS_S) if step <= (at_s - now_s) * COARSENESS), FINEST_S)
        expiry = Expiry(step_s, int(at_s / step_s) + 1)
        due = self._due.get(expiry)
        if due is None:
            due = self._due[expiry] = set()
            wait_s = max(0.0, expiry.tick * step_s - now_s)
            self._loop.call_later(wait_s, self._fire, expiry, context=Context())
        due.add(thing)
        return expiry

    def discard(self, thing: Expiring, expiry: Expiry) -> None:
        """Expire it no more."""
        due = self._due.get(expiry)
        if due is not None:
            due.discard(thing)

    def _fire(self, expiry: Expiry) -> None:
        for thing in self._due.pop(expiry, ()):
            thing.expire()
