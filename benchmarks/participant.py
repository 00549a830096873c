"""One process of a benchmark that does as it is told: a JSON line in, a JSON line out.

The parent makes a `Participant` and asks it; the process itself runs `obey` over its table of orders, on uvloop. The
process may live in another environment, so this imports the standard library, and uvloop when it runs.
"""

import asyncio
import gc
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 60.0
ORDER_TIMEOUT_S = 120.0
_MAX_LINE_BYTES = 64 << 20

Order = Callable[..., Awaitable[Any]]
Call = Callable[[], Awaitable[Any]]


class Participant:
    """The parent's end of one process, alive inside its `async with`."""

    def __init__(self, module: str, *arguments: str, python: str = sys.executable) -> None:
        self._command = (python, "-m", module, *arguments)
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            limit=_MAX_LINE_BYTES,
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._answer()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()  # which ends `obey`
        try:
            async with asyncio.timeout(5):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def ask(self, order: str, **arguments: Any) -> Any:
        """Have an order carried out. Raises `RuntimeError` if the process ended, `TimeoutError` after two minutes."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([order, arguments]).encode() + b"\n")
        async with asyncio.timeout(ORDER_TIMEOUT_S):
            return await self._answer()

    async def _answer(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} ended")
        return json.loads(line)


async def obey(orders: Mapping[str, Order]) -> None:
    """Carry out orders until the parent closes the pipe. One that raises ends the process, with its traceback."""
    gc.collect()
    gc.freeze()  # what was imported costs no collection
    lines = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    _say(None)
    while line := await lines.readline():
        order, arguments = json.loads(line)
        _say(await orders[order](**arguments))


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run the process on uvloop; an error is printed and is exit status 1."""
    import uvloop

    async def wrapped() -> None:
        await main()

    with suppress(KeyboardInterrupt):
        try:
            uvloop.run(wrapped())
        except Exception:
            traceback.print_exc()
            sys.exit(1)


async def timed(call: Call, count: int, concurrency: int) -> dict[str, Any]:
    """Run `count` calls, `concurrency` at a time: their durations, and wall and processor time of all together."""
    seconds: list[float] = []

    async def runner() -> None:
        for _ in range(count // concurrency):
            started_s = time.perf_counter()
            await call()
            seconds.append(time.perf_counter() - started_s)

    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    if concurrency == 1:
        await runner()
    else:
        await asyncio.gather(*(runner() for _ in range(concurrency)))
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    return {"seconds": seconds, "wall_s": wall_s, "cpu_s": cpu_s}


def _say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)
