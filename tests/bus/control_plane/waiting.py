"""A wait for what tells of itself by no event: another process, a counter, a table that empties."""

import asyncio
from collections.abc import Callable

SOON_S = 3.0


async def until(condition: Callable[[], bool], timeout_s: float = SOON_S) -> None:
    """Return when `condition` holds. Raises `TimeoutError`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # nothing sets an event
            await asyncio.sleep(0.005)
