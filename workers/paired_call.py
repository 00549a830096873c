"""A call to a worker that acts on a grant of ours: what ends one of the two ends the wait for both.

In: the call, the granted operation. Out: the reply, once the operation is complete too; or the first error. A worker
that is killed never replies, but its process's end fails the operation at once where a pidfd sees it.
"""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

R = TypeVar("R")

SAY_WHY_S = 0.5
"""How long a worker that failed the operation has to say why: its fault tells more than the operation's error."""


async def reply_and_completion(call: Coroutine[Any, Any, R], operation: Awaitable[Any]) -> R:
    """The reply to `call`, when `operation` is complete. Raises what either raises."""
    asking = asyncio.ensure_future(call)
    working = asyncio.ensure_future(operation)
    try:
        await asyncio.wait({asking, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done() and not working.cancelled() and working.exception():
            await asyncio.wait({asking}, timeout=SAY_WHY_S)
            if not asking.done():
                await working
        reply = await asking
        await working
        return reply
    finally:
        asking.cancel()
        working.cancel()
        await asyncio.gather(asking, working, return_exceptions=True)
