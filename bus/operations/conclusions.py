"""What must come to its end though nobody waits for it: the acks that operations and claims still owe their targets."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Conclusions:
    """The operations whose end is still to come; each ends with its ack, also when nobody waits for it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        """Operations whose target has not been told the end."""
        return len(self._tasks)

    def add(self, conclusion: Coroutine[Any, Any, None]) -> None:
        """Run `conclusion` to its end."""
        task = asyncio.create_task(conclusion)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, timeout_s: float) -> None:
        """Wait for all, for up to `timeout_s`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
