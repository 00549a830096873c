"""Transfers: what is posted when, on which thread, and who is told.

In: copy pairs to a peer. Out: a `TransferReport` with NIXL's own figures, or a typed error.
Small transfers are posted inline on the event loop while the owner thread is idle and the peer is connected: that
costs less than two hand-overs between threads. Everything else goes to the one owner thread, in chunks, because a
post can block for the whole copy. Invariants: a handle is released only when it is terminal, so a cancelled or
overdue transfer is *drained*: nothing further is posted, and its waiter is told only when NIXL is done with the memory.
Nothing is posted at or past the deadline. The thread sleeps without polling while nothing is under way.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from bus.data_plane.addressing import CopyPair, chunks
from bus.data_plane.agent import NixlAgent, TransferDirection, TransferState, TransferTelemetry
from bus.deadline import Deadline
from bus.errors import BusError, DeadlineExceeded, TransferError

T = TypeVar("T")

INLINE_POLL_S = 50e-6
"""How long the event loop looks for a small transfer's end before it hands the handle to the owner thread."""
_SHORTEST_SLEEP_S = 30e-6
_LONGEST_SLEEP_S = 1e-3
_DRAIN_SLEEP_S = 0.1
"""Between two looks at transfers that nobody waits for any more."""

_LOG = logging.getLogger(__name__)


class TransferReport(NamedTuple):
    """A transfer that is done, in NIXL's figures."""

    num_bytes: int
    num_descriptors: int
    num_chunks: int
    post_us: int
    transfer_us: int


class TransferCancelled(TransferError):
    """The transfer was cancelled; NIXL has let go of the memory, which may be half written."""


@dataclass(eq=False, slots=True)
class Transfer:
    """One transfer on its way, stepped by one thread at a time."""

    direction: TransferDirection
    pairs: Sequence[CopyPair]
    peer: str
    memory_types: tuple[str, str]
    deadline: Deadline
    chunk_bytes: int
    ended: "asyncio.Future[None]"
    """Resolves, on the event loop, when NIXL will not touch the memory any more, however it went."""
    cancelled: bool = False
    error: BusError | None = None
    handle: int | None = None
    posted: bool = False
    _measured: list[TransferTelemetry] = field(default_factory=list)
    _chunks: list[list[CopyPair]] = field(default_factory=list)
    _next: int = 0

    def __post_init__(self) -> None:
        self._chunks = list(chunks(self.pairs, self.chunk_bytes))

    def step(self, agent: NixlAgent) -> bool:
        """Post the next chunk or look at the one under way; returns whether the transfer is terminal."""
        try:
            if self.handle is None:
                if self._next == len(self._chunks):
                    return True
                self._check_may_post()
                state = self._post(agent)
            else:
                state = agent.check(self.handle)
        except BusError as error:
            self.error = error
            self._release(agent)
            return True
        if state is TransferState.DONE:
            self._measured.append(agent.telemetry(self.handle))  # type: ignore[arg-type]  # _post set it
            self._release(agent)
            return self._next == len(self._chunks)
        return False

    def cancel(self) -> None:
        """Post nothing further; `ended` resolves when what is under way is terminal. NIXL can't abort it."""
        self.cancelled = True

    @property
    def is_draining(self) -> bool:
        """Whether only its end is waited for: cancelled or overdue, with a handle that NIXL still works on."""
        return self.cancelled or self.deadline.expired

    def report(self) -> TransferReport:
        """What the chunks add up to. Raises `TransferError`, `PeerLost`, `DeadlineExceeded`, `TransferCancelled`."""
        if self.error is not None:
            raise self.error
        return TransferReport(
            sum(measured.num_bytes for measured in self._measured),
            sum(measured.num_descriptors for measured in self._measured),
            len(self._measured),
            sum(measured.post_us for measured in self._measured),
            sum(measured.transfer_us for measured in self._measured),
        )

    def _check_may_post(self) -> None:
        if self.cancelled:
            raise TransferCancelled("the transfer was cancelled", peer=self.peer)
        if self.deadline.expired:
            raise DeadlineExceeded("the lease ran out before everything was posted", peer=self.peer)

    def _post(self, agent: NixlAgent) -> TransferState:
        self.handle = agent.create_transfer(self.direction, self._chunks[self._next], self.peer, *self.memory_types)
        self._next += 1
        self.posted = True
        return agent.post(self.handle)

    def _release(self, agent: NixlAgent) -> None:
        if self.handle is not None:
            handle, self.handle = self.handle, None
            try:
                agent.release(handle)
            except BusError as error:
                _LOG.warning("a transfer handle was not released: %s", error)


class TransferEngine:
    """Runs transfers on one agent. Made on the event loop that its waiters live on."""

    def __init__(self, agent: NixlAgent, *, chunk_bytes: int, inline_bytes: int) -> None:
        self.agent = agent
        self.num_posted_inline = 0
        self.num_posted_by_thread = 0
        self._chunk_bytes = chunk_bytes
        self._inline_bytes = inline_bytes
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Transfer | Callable[[], None] | None] = queue.SimpleQueue()
        self._under_way: set[Transfer] = set()
        self._connected: set[str] = set()
        self._thread = threading.Thread(target=self._own, name="nixl-owner", daemon=True)
        self._thread.start()

    @property
    def num_under_way(self) -> int:
        """Transfers that the owner thread has, drained ones included."""
        return len(self._under_way)

    def start(
        self,
        direction: TransferDirection,
        pairs: Sequence[CopyPair],
        peer: str,
        deadline: Deadline,
        memory_types: tuple[str, str] = ("DRAM", "DRAM"),
    ) -> Transfer:
        """Begin to copy `pairs` to or from `peer`; wait for `ended`, then ask for the `report`.

        A small transfer to a connected peer is usually over when this returns.
        """
        ended: asyncio.Future[None] = self._loop.create_future()
        transfer = Transfer(direction, pairs, peer, memory_types, deadline, self._chunk_bytes, ended)
        if self._runs_inline(transfer):
            self._note_end(transfer)
        else:
            self._under_way.add(transfer)
            self._jobs.put(transfer)
        return transfer

    async def call(self, function: Callable[[], T]) -> T:
        """Run a blocking NIXL call on the owner thread and return its result."""
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

    async def close(self, timeout_s: float) -> None:
        """Let the transfers under way end, for up to `timeout_s`, and stop the thread."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            _LOG.warning("%d transfers were still under way when the agent closed", self.num_under_way)

    def _runs_inline(self, transfer: Transfer) -> bool:
        """Try to finish a small transfer here and now; what doesn't end at once is the owner thread's."""
        small = sum(pair.length_bytes for pair in transfer.pairs) <= self._inline_bytes
        if not small or self._under_way or transfer.peer not in self._connected:
            self.num_posted_by_thread += 1
            return False
        self.num_posted_inline += 1
        give_up = time.perf_counter() + INLINE_POLL_S
        while not transfer.step(self.agent):
            if time.perf_counter() > give_up:
                return False
        return True

    def _note_end(self, transfer: Transfer) -> None:
        self._under_way.discard(transfer)
        if transfer.error is None:
            self._connected.add(transfer.peer)
        _succeed(transfer.ended, None)

    def _own(self) -> None:
        active: list[Transfer] = []
        sleep_s = 0.0
        stopping = False
        while active or not stopping:
            stopping = self._take_jobs(active, None if not active and not stopping else sleep_s) or stopping
            still_active = [transfer for transfer in active if not self._stepped_to_end(transfer)]
            sleep_s = _next_sleep_s(sleep_s, moved=len(still_active) < len(active), waiting=still_active)
            active = still_active

    def _take_jobs(self, active: list[Transfer], timeout_s: float | None) -> bool:
        """Sleep until there is a job, or for `timeout_s`; take all there are. Returns whether to stop."""
        with contextlib.suppress(queue.Empty):
            job = self._jobs.get(timeout=timeout_s)
            while True:
                if job is None:
                    return True
                if isinstance(job, Transfer):
                    active.append(job)
                else:
                    job()
                job = self._jobs.get_nowait()
        return False

    def _stepped_to_end(self, transfer: Transfer) -> bool:
        try:
            ended = transfer.step(self.agent)
        except Exception as error:  # a defect here must not end the thread that all transfers wait for
            _LOG.exception("the owner thread failed in a transfer")
            transfer.error = TransferError(f"the transfer failed unexpectedly: {type(error).__name__}")
            ended = True
        if ended:
            with contextlib.suppress(RuntimeError):  # the loop closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._note_end, transfer)
        return ended


def _next_sleep_s(last_s: float, *, moved: bool, waiting: Sequence[Transfer]) -> float:
    if moved or last_s == 0.0:
        return _SHORTEST_SLEEP_S
    longest_s = _DRAIN_SLEEP_S if all(transfer.is_draining for transfer in waiting) else _LONGEST_SLEEP_S
    return min(last_s * 1.5, longest_s)


def _succeed(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[T]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
