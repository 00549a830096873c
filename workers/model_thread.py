"""The one thread in which a worker's model runs, so that the event loop stays free for the bus.

In: a function over tensors. Out: its result, awaited. One thread, one torch thread: with more, a worker on a small
machine delays its own replies (p99 of an echo: 1.4 ms with one, 5.1 ms with two).
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

from bus import RequestRefused
from schemas.fault import FaultCode
from workers.models.vision_language_model import (
    ImageTooLarge,
    InvalidImage,
    InvalidPrompt,
    ModelInputError,
    PromptTooLong,
)

P = ParamSpec("P")
T = TypeVar("T")

_CODES = {
    InvalidImage: FaultCode.INVALID_IMAGE,
    ImageTooLarge: FaultCode.IMAGE_TOO_LARGE,
    InvalidPrompt: FaultCode.INVALID_PROMPT,
    PromptTooLong: FaultCode.PROMPT_TOO_LONG,
}


class ModelThread:
    """Runs functions one after the other, off the event loop."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model", initializer=_one_torch_thread)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run it and return what it returns. A model's refusal of its input becomes `RequestRefused`."""
        context = copy_context()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, lambda: context.run(function, *args, **kwargs))
        except ModelInputError as error:
            raise RequestRefused(_CODES.get(type(error), FaultCode.INVALID_PROMPT), str(error)) from None

    def close(self) -> None:
        """Let the running function end, and stop."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)
