"""An async context manager, held open by an event loop in a thread of its own.

In: the context manager. Out: its value, and the loop that it lives on. So a server or a proxy goes on while a test
blocks its own event loop, and serves tests that have none.
Invariants: what entering raises is raised here, and so is what leaving raises; leaving ends within a time.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")
END_TIMEOUT_S = 20.0


@contextmanager
def in_own_thread(
    context: AbstractAsyncContextManager[T], *, name: str, start_timeout_s: float = 20.0
) -> Iterator[tuple[T, asyncio.AbstractEventLoop]]:
    """Enter `context` in a new thread called `name`, and leave it there at the end.

    Raises `TimeoutError` when it isn't entered within `start_timeout_s`, and leaves it as soon as it is; or when it
    isn't left within 20 s.
    """
    started: Future[tuple[T, asyncio.AbstractEventLoop]] = Future()
    ended: Future[None] = Future()
    stop = asyncio.Event()

    async def hold() -> None:
        async with context as value:
            if not started.set_running_or_notify_cancel():
                return  # nobody waits any more
            started.set_result((value, asyncio.get_running_loop()))
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(hold())
            ended.set_result(None)
        except BaseException as error:
            (ended if started.done() else started).set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        value, loop = started.result(start_timeout_s)
    except BaseException:
        started.cancel()
        raise
    try:
        yield value, loop
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it ended by itself, and `ended` says why
            loop.call_soon_threadsafe(stop.set)
        ended.result(END_TIMEOUT_S)
