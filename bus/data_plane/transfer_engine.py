"""The engine: which thread steps which transfer, when, and who goes first.

In: transfers. Out: their ends, on the event loop.
Small transfers to a connected peer are posted inline on the event loop: that costs less than two hand-overs between
threads. Everything else goes to the one owner thread, in chunks, because a post can block for the whole copy and holds
the agent's lock meanwhile; the chunks are short while small transfers come, and the thread lets those go first.
At most `MAX_DRAINING` drains go on at once. The thread sleeps without polling while nothing is under way.
"""

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from bus.data_plane.agent import NixlAgent
from bus.data_plane.transfer import Transfer
from bus.errors import BusError, Draining, LocalProtocolError, PoolExhausted, TransferError

T = TypeVar("T")

INLINE_POLL_S = 50e-6
"""How long the event loop looks for a small transfer's end before it hands the handle to the owner thread."""
MAX_DRAINING = 256
"""Cancelled or overdue transfers that NIXL still works on; with more, nothing new is begun."""
CONTENDED_CHUNK_BYTES = 1 << 20
"""Chunks of large transfers while small ones come: one holds the agent's lock for some 0.1 ms."""
NICE = 10
"""Of the owner thread alone: where cores are few, bulk copies let event loops and the NATS server go first. The p99 of
4 KiB writes beside 64 MiB ones, against their p99 alone: 4.4 to 5.4 times without it, 1.6 to 4.6 times with it."""
CONTENTION_S = 0.05
"""How long after a small transfer the chunks stay short."""
_SHORTEST_SLEEP_S = 30e-6
_LONGEST_SLEEP_S = 1e-3
_DRAIN_SLEEP_S = 0.1
"""Between two looks at transfers that nobody waits for any more."""
_NOTIFICATION_SLEEP_S = 2e-3
"""Between two looks for notifications, while somebody expects one."""

_LOG = logging.getLogger(__name__)


class TransferEngine:
    """Runs transfers on one agent. Made on the event loop that its waiters live on."""

    def __init__(self, agent: NixlAgent, *, chunk_bytes: int, inline_bytes: int) -> None:
        self.agent = agent
        self.num_posted_inline = 0
        self.num_posted_by_thread = 0
        self.on_notification: Callable[[bytes], None] = lambda payload: None
        """Called on the event loop, while `expect_notifications` says that somebody waits for one."""
        self._chunk_bytes = chunk_bytes
        self._inline_bytes = inline_bytes
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Transfer | Callable[[], None] | None] = queue.SimpleQueue()
        self._under_way: set[Transfer] = set()
        self._connected: set[str] = set()
        self._num_expecting = 0
        self._small_at_s = 0.0
        self._small_is_waiting = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._own, name="nixl-owner", daemon=True)
        self._thread.start()

    @property
    def num_under_way(self) -> int:
        """Transfers that the owner thread has, drained ones included."""
        return len(self._under_way)

    @property
    def num_draining(self) -> int:
        """Those among them whose end alone is waited for."""
        return sum(transfer.is_draining for transfer in self._under_way)

    def check_room(self) -> None:
        """Raise `PoolExhausted` while too many transfers drain, `Draining` when closing: nothing new should begin."""
        if self._is_stopping:
            raise Draining("the bus is closing and posts nothing more")
        if len(self._under_way) >= MAX_DRAINING and self.num_draining >= MAX_DRAINING:
            raise PoolExhausted(
                f"{self.num_draining} cancelled transfers have not drained yet", remedy="look for peers that hang"
            )

    def start(self, transfer: Transfer) -> None:
        """Begin. A small transfer to a connected peer is usually over, and its `on_end` called, when this returns."""
        if self._may_run_inline(transfer):
            self.num_posted_inline += 1
            if self._finished_inline(transfer):
                self._note_end(transfer)
                return
        else:
            self.num_posted_by_thread += 1
        self._under_way.add(transfer)
        self._jobs.put(transfer)

    def expect_notifications(self, num_more: int) -> None:
        """Count those who wait for a notification, up or down; nobody polls for them otherwise."""
        self._num_expecting += num_more
        self._jobs.put(lambda: None)  # wakes the thread, which sleeps without a timeout when it has nothing to do

    async def call(self, function: Callable[[], T]) -> T:
        """Run a blocking NIXL call on the owner thread and return its result."""
        if self._is_stopping:
            raise LocalProtocolError("the bus is closing")
        answer: asyncio.Future[T] = self._loop.create_future()

        def job() -> None:
            try:
                result = function()
            except BaseException as error:
                self._loop.call_soon_threadsafe(_fail, answer, error)
            else:
                self._loop.call_soon_threadsafe(_succeed, answer, result)

        self._jobs.put(job)
        return await answer

    async def close(self, timeout_s: float) -> bool:
        """Let the transfers under way end, for up to `timeout_s`, and stop the thread; returns whether they did."""
        self._num_expecting = 0
        self._is_stopping = True
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            _LOG.warning("%d transfers were still under way when the agent closed", self.num_under_way)
        return not self._thread.is_alive()

    def _may_run_inline(self, transfer: Transfer) -> bool:
        plan = transfer.plan
        return plan.num_bytes <= self._inline_bytes and plan.peer in self._connected and plan.memory_types[0] == "DRAM"

    def _finished_inline(self, transfer: Transfer) -> bool:
        """Try to finish a small transfer here and now; what doesn't end at once is the owner thread's."""
        self._small_is_waiting = True
        self._advance(transfer, self._chunk_bytes)
        self._small_is_waiting = False
        self._small_at_s = now_s = time.monotonic()
        while not transfer.is_terminal:
            if time.monotonic() - now_s > INLINE_POLL_S:
                return False
            self._advance(transfer, self._chunk_bytes)
        return True

    def _advance(self, transfer: Transfer, chunk_bytes: int) -> bool:
        """One step that ends no thread and no event loop, whatever goes wrong in it."""
        try:
            return transfer.step(self.agent, chunk_bytes)
        except Exception as error:
            if transfer.error is None:
                _LOG.exception("a transfer failed unexpectedly")
            transfer.stop(TransferError(f"the transfer failed unexpectedly: {type(error).__name__}"))
            return False

    def _note_end(self, transfer: Transfer) -> None:
        self._under_way.discard(transfer)
        if transfer.error is None:
            self._connected.add(transfer.plan.peer)
        transfer.on_end()

    def _own(self) -> None:
        with contextlib.suppress(OSError):  # a process that is nicer already may not become less so
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        active: list[Transfer] = []
        sleep_s: float | None = None
        stopping = False
        while active or not stopping:
            stopping = self._take_jobs(active, sleep_s) or stopping
            moved = [self._step(transfer) for transfer in active]
            active = [transfer for transfer in active if not transfer.is_terminal]
            if self._num_expecting:
                self._collect_notifications()
            sleep_s = self._next_sleep_s(sleep_s or 0.0, any(moved), active)

    def _take_jobs(self, active: list[Transfer], timeout_s: float | None) -> bool:
        """Sleep until there is a job, or for `timeout_s`; take all there are. Returns whether to stop."""
        with contextlib.suppress(queue.Empty):
            job = self._jobs.get_nowait() if timeout_s == 0.0 else self._jobs.get(timeout=timeout_s)
            while True:
                if job is None:
                    return True
                if isinstance(job, Transfer):
                    active.append(job)
                else:
                    job()
                job = self._jobs.get_nowait()
        return False

    def _step(self, transfer: Transfer) -> bool:
        while self._small_is_waiting:
            time.sleep(_SHORTEST_SLEEP_S)
        contended = time.monotonic() - self._small_at_s < CONTENTION_S
        num_done_bytes = transfer.num_done_bytes
        moved = self._advance(transfer, CONTENDED_CHUNK_BYTES if contended else self._chunk_bytes)
        if transfer.on_progress and transfer.num_done_bytes > num_done_bytes:
            self._tell(transfer.on_progress, transfer.num_done_bytes)
        if transfer.is_terminal:
            self._tell(self._note_end, transfer)
        return moved

    def _collect_notifications(self) -> None:
        try:
            notified = self.agent.notifications()
        except BusError as error:
            _LOG.warning("%s", error)
            return
        for payloads in notified.values():
            for payload in payloads:
                self._tell(self.on_notification, bytes(payload))

    def _tell(self, callback: Callable[[T], None], argument: T) -> None:
        with contextlib.suppress(RuntimeError):  # the loop closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback, argument)

    def _next_sleep_s(self, last_s: float, moved: bool, active: Sequence[Transfer]) -> float | None:
        if moved and active:
            return 0.0
        if not active:
            return _NOTIFICATION_SLEEP_S if self._num_expecting else None
        if last_s == 0.0:
            return _SHORTEST_SLEEP_S
        drains_only = all(transfer.is_draining for transfer in active) and not self._num_expecting
        return min(last_s * 1.5, _DRAIN_SLEEP_S if drains_only else _LONGEST_SLEEP_S)


def _succeed(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[T]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
