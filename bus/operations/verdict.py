"""How an operation ended: decided once, told to everybody who awaits it.

In: an error, or none. Out: the same to each waiter, from whichever moment it waits. A waiter that is cancelled cancels
the operation; the others hear of that as of any other end.
"""

import asyncio
from collections.abc import Callable

from bus.errors import BusError


class Verdict:
    """Of one operation, on one event loop."""

    __slots__ = ("_waiters", "error", "is_decided")

    def __init__(self) -> None:
        self.is_decided = False
        self.error: BusError | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def decide(self, error: BusError | None) -> None:
        """Tell everybody. The operation asks `is_decided` first."""
        self.is_decided = True
        self.error = error
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, cancel: Callable[[], None]) -> None:
        """Return when it is decided well, raise its error otherwise; `cancel` is called when the wait is cancelled."""
        if not self.is_decided:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                cancel()
                raise
        if self.error is not None:
            raise self.error
