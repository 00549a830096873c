"""What must come to its end though nobody waits for it: acks still owed, questions asked, checksums."""

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any


class Conclusions:
    """Tasks that run to their end whoever still waits."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        """Those that have not ended."""
        return len(self._tasks)

    def add(self, conclusion: Coroutine[Any, Any, None]) -> None:
        """Run `conclusion` to its end, under no deadline but its own: not that of the request that caused it."""
        task = asyncio.create_task(conclusion, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, timeout_s: float) -> None:
        """Wait for all, for up to `timeout_s`, and cancel the rest."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
