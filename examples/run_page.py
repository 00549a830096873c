"""Run the Python examples of a Markdown page, for real: a nats-server, and NIXL transfers between two processes.

    python examples/run_page.py docs/api.md                   # all of them
    python examples/run_page.py docs/api.md "Named grants"    # those under one heading

In: a page. Out: each block runs as a module of its own, in this process and in a second one, by the functions that it
defines:

- `target(bus, send)` here and `initiator(bus, *grants)` there, once for each `send(*grants)`. `send` stands for the
  message that carries a grant. `send(*grants, to="initiator-2")` reaches another worker of the second process.
- `target(bus)` here, which serves something, and then `initiator(bus)` there.
- `alone(bus)` here.

A block that defines none of these is an error, and so is a `target` that leaves memory granted.
"""

import asyncio
import importlib.util
import inspect
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bus import Bus, BusConfig, EndpointConfig, Message, RdmaMetadata, embedded_server, write_key_file

INITIATORS = ("initiator", "initiator-2")
TIMEOUT_S = 20.0
LAST_ACK_S = 5.0
"""For acks of operations that an example doesn't await."""


class Block(NamedTuple):
    """One example, and the heading that it stands under."""

    heading: str
    source: str


class Run(Message, frozen=True, kw_only=True, tag="example.run"):
    """Run the initiator of the block at `path`."""

    path: str
    grants: list[RdmaMetadata]


class Ran(Message, frozen=True, kw_only=True, tag="example.ran"):
    """It ended; `failure` is a traceback."""

    failure: str = ""


def extract(page: str) -> list[Block]:
    """The Python blocks of a page."""
    blocks, heading = [], ""
    for title, source in re.findall(r"^#+ ([^\n]+)$|^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        heading = title or heading
        if source:
            blocks.append(Block(heading, source))
    return blocks


class TwoProcesses:
    """This process's bus, and a second process with workers of its own; made by `two_processes`."""

    def __init__(self, bus: Bus, folder: Path) -> None:
        self._bus = bus
        self._folder = folder

    async def run(self, block: Block) -> None:
        """Run one block. Raises what went wrong in either process."""
        path = self._folder / f"example_{len(list(self._folder.glob('*.py')))}.py"
        path.write_text(block.source)
        example = _load(str(path))
        if alone := getattr(example, "alone", None):
            await asyncio.wait_for(alone(self._bus), TIMEOUT_S)
        elif hasattr(example, "target") and hasattr(example, "initiator"):
            await asyncio.wait_for(self._run_pair(example, str(path)), TIMEOUT_S)
        else:
            raise LookupError(f"the example under {block.heading!r} defines neither target and initiator nor alone")
        async with asyncio.timeout(LAST_ACK_S):
            while self._bus.stats()["grants_open"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def _run_pair(self, example: Any, path: str) -> None:
        if len(inspect.signature(example.target).parameters) == 1:
            await example.target(self._bus)
            await self._ask(INITIATORS[0], Run(path=path, grants=[]))
            return
        asked: list[asyncio.Task[None]] = []

        async def send(*grants: RdmaMetadata, to: str = INITIATORS[0]) -> None:
            asked.append(asyncio.create_task(self._ask(to, Run(path=path, grants=list(grants)))))

        await _all_of(example.target(self._bus, send), asked)

    async def _ask(self, worker_id: str, request: Run) -> None:
        subject = self._bus.subjects.worker(worker_id, "run")
        reply = await self._bus.request(subject, request, Ran, timeout_s=TIMEOUT_S)
        if reply.failure:
            raise AssertionError(f"{worker_id} failed:\n{reply.failure}")


@asynccontextmanager
async def two_processes() -> AsyncIterator[TwoProcesses]:
    """Start a nats-server, the second process, and this process's bus."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key_file = str(folder / "key")
        write_key_file(folder / "key")
        async with (
            embedded_server() as server,
            _second_process(server.url, key_file),
            Bus.open(_config("target", server.url, key_file)) as bus,
        ):
            yield TwoProcesses(bus, folder)


@asynccontextmanager
async def _second_process(nats_url: str, key_file: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, nats_url, key_file, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"ready\n"
        yield
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _all_of(target: Awaitable[None], asked: list[asyncio.Task[None]]) -> None:
    (failure,) = await asyncio.gather(target, return_exceptions=True)
    failures = [failure, *await asyncio.gather(*asked, return_exceptions=True)]
    if not asked:
        failures.append(AssertionError("the target sent nothing"))
    if met := [failure for failure in failures if isinstance(failure, Exception)]:
        raise ExceptionGroup("the example failed", met)


async def _be_initiators(nats_url: str, key_file: str) -> None:
    async with AsyncExitStack() as stack:
        for worker_id in INITIATORS:
            bus = await stack.enter_async_context(Bus.open(_config(worker_id, nats_url, key_file)))
            await _serve(bus)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def _serve(bus: Bus) -> None:
    async def handle(request: Run) -> Ran:
        try:
            await _load(request.path).initiator(bus, *request.grants)
        except Exception:
            return Ran(failure=traceback.format_exc())
        return Ran()

    await bus.serve(EndpointConfig("run", bus.subjects.worker(bus.worker_id, "run"), Run), handle)


def _config(worker_id: str, nats_url: str, key_file: str) -> BusConfig:
    return BusConfig(worker_id=worker_id, nats_url=nats_url, key_file=key_file)


def _load(path: str) -> Any:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # msgspec looks annotations up there
    spec.loader.exec_module(module)
    return module


async def _run_all(blocks: list[Block]) -> None:
    async with two_processes() as processes:
        for block in blocks:
            await processes.run(block)
            print(f"ran: {block.heading}")


def _main(page: str, heading: str = "") -> None:
    blocks = [block for block in extract(Path(page).read_text()) if heading in ("", block.heading)]
    if not blocks:
        sys.exit(f"{page} has no example under {heading!r}")
    asyncio.run(_run_all(blocks))


if __name__ == "__main__":
    if sys.argv[1].startswith("nats://"):
        asyncio.run(_be_initiators(*sys.argv[1:]))
    else:
        _main(*sys.argv[1:])
