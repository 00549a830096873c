"""Several workers on one machine: processes forked from a server that has imported the heavy libraries once.

In: `WorkerSpec`s. Out: running processes that are all ready, or the first one's reason for failing. Five interpreters
that import torch and transformers on their own take 20 s on two cores; forked from a server that did so, 7 s.
The fork server only imports: it runs no tensor operation (a parallel one there would hang every child for ever), and
OMP_NUM_THREADS is 1 before it starts. A child ends by SIGTERM, and by itself when its launcher is gone.
"""

import asyncio
import multiprocessing
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

from bus import keep_stdout_clean
from workers.process import Progress, WorkerSpec, run_worker

PRELOADED = ("torch", "nixl._api", "transformers", "workers.preload")
"""Imported once, in the fork server. A wrong name would be ignored silently; a test looks."""
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
"""How long a worker may take to end, at least."""
CLOSE_TIMEOUT_S = 5.0
"""What it may take beyond its drain."""


class WorkerFailed(Exception):
    """A worker process that would not start, or ended. Attributes: `role`, `reason`."""

    def __init__(self, role: str, reason: str) -> None:
        self.role = role
        self.reason = reason
        super().__init__(f"the {role} worker failed: {reason}")


class WorkerProcess:
    """One child."""

    def __init__(self, spec: WorkerSpec, context: ForkServerContext) -> None:
        self.spec = spec
        self.detail = ""
        """What the worker said when it became ready: its URL or id."""
        self._ours, theirs = context.Pipe()
        self._process: ForkServerProcess = context.Process(target=_child, args=(spec, theirs), name=spec.role)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid or 0

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    async def ready(self, on_progress: Callable[[str, Progress], None]) -> None:
        """Wait until it serves. Raises `WorkerFailed`."""
        while True:
            try:
                progress = await asyncio.to_thread(self._receive)
            except EOFError:
                raise WorkerFailed(self.spec.role, f"it ended with status {await self._exit_status()}") from None
            on_progress(self.spec.role, progress)
            if progress.step == "failed":
                raise WorkerFailed(self.spec.role, progress.detail)
            if progress.step == "ready":
                self.detail = progress.detail
                return

    async def ended(self) -> int:
        """Wait for its end; returns the exit status."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        return await self._exit_status()

    def terminate(self) -> None:
        """Ask it to drain and stop."""
        if self._process.is_alive():
            self._process.terminate()

    async def stopped(self) -> None:
        """Wait for its end, and kill it after a while."""
        await asyncio.to_thread(self._process.join, stop_timeout_s(self.spec))
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        self._ours.close()

    async def _exit_status(self) -> int:
        await asyncio.to_thread(self._process.join, STOP_TIMEOUT_S)
        return self._process.exitcode or 0

    def _receive(self) -> Progress:
        if not self._ours.poll(START_TIMEOUT_S):
            return Progress("failed", f"not ready within {START_TIMEOUT_S:g} s")
        progress: Progress = self._ours.recv()
        return progress


def stop_timeout_s(spec: WorkerSpec) -> float:
    """How long to wait for a worker's end before it is killed: longer than it may drain."""
    return max(STOP_TIMEOUT_S, spec.settings.drain_timeout_s + CLOSE_TIMEOUT_S)


@asynccontextmanager
async def running(
    specs: Sequence[WorkerSpec], on_progress: Callable[[str, Progress], None] = lambda role, progress: None
) -> AsyncIterator[list[WorkerProcess]]:
    """Start workers and yield them when all are ready; stop them at the end. Raises `WorkerFailed`."""
    context = fork_server()
    workers = [WorkerProcess(spec, context) for spec in specs]
    try:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker.ready(on_progress))
        yield workers
    except* WorkerFailed as failures:
        raise failures.exceptions[0] from None
    finally:
        for worker in workers:
            worker.terminate()
        await asyncio.gather(*(worker.stopped() for worker in workers))


def fork_server() -> ForkServerContext:
    """The context that workers are forked in, with its preloads set."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    keep_stdout_clean()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _child(spec: WorkerSpec, launcher: Connection) -> None:
    import uvloop

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher decides
    sys.exit(uvloop.run(_run(spec, launcher)))


async def _run(spec: WorkerSpec, launcher: Connection) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_reader(launcher.fileno(), stop.set)  # it sends nothing: readable means gone
    return await run_worker(spec, lambda progress: _tell(launcher, progress), stop)


def _tell(launcher: Connection, progress: Progress) -> None:
    try:
        launcher.send(progress)
    except OSError:
        return  # the launcher is gone, which stops this worker
