"""One transfer: its chunks, what is posted next, and how it ended.

In: copy pairs to a peer. Out: a call when NIXL will not touch the memory any more, and a `TransferReport` with NIXL's
own figures, or a typed error. Whoever steps it decides on which thread (`transfer_engine`).
Invariants: a handle is released only when it is terminal, so a cancelled or overdue transfer is *drained*: nothing
further is posted, and its waiter is told only when NIXL is done with the memory. Nothing is posted at or past the
deadline.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bus.data_plane import cuda
from bus.data_plane.addressing import CopyPair, Cutter
from bus.data_plane.agent import NixlAgent, TransferDirection, TransferState, TransferTelemetry
from bus.deadline import Deadline
from bus.errors import BusError, DeadlineExceeded, TransferError

CHUNKS_IN_FLIGHT = 2
"""Of one transfer: the next is posted while the one before is on the wire."""

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


class TransferPlan(NamedTuple):
    """What is to be moved where."""

    direction: TransferDirection
    pairs: Sequence[CopyPair]
    peer: str
    num_bytes: int
    memory_types: tuple[str, str] = ("DRAM", "DRAM")
    """The local side's and the remote one's."""
    notification: str = ""
    """Sent to the peer's agent with the last chunk's DONE."""


class Transfer:
    """One transfer on its way, stepped by one thread at a time.

    `on_end` is called on the event loop when NIXL will not touch the memory any more, however it went;
    `on_progress` there too, with the bytes that are done so far, whenever a chunk of several is done.
    """

    __slots__ = (
        "_cutter",
        "_in_flight",
        "_measured",
        "_stream",
        "_window",
        "cancelled",
        "deadline",
        "error",
        "on_end",
        "on_progress",
        "plan",
        "posted",
    )

    def __init__(
        self,
        plan: TransferPlan,
        deadline: Deadline,
        on_end: Callable[[], None],
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.plan = plan
        self.deadline = deadline
        self.on_end = on_end
        self.on_progress = on_progress
        self.cancelled = False
        self.posted = False
        self.error: BusError | None = None
        self._cutter = Cutter(plan.pairs)
        self._in_flight: deque[int] = deque()
        self._measured: list[TransferTelemetry] = []
        self._window = 1 if plan.notification else CHUNKS_IN_FLIGHT  # the notification must come last
        self._stream = cuda.StreamMark(plan.pairs[0].local_device_id) if plan.memory_types[0] == "VRAM" else None

    def step(self, agent: NixlAgent, chunk_bytes: int) -> bool:
        """Look at the oldest chunk in flight, or post one more; returns whether anything moved."""
        if self._in_flight and self._look(agent):
            return True
        if self._cutter.is_empty or len(self._in_flight) >= self._window:
            return False
        if self._stream is not None and not self.is_draining and not self._stream.is_reached():
            return False
        self._post(agent, chunk_bytes)
        return True

    @property
    def is_terminal(self) -> bool:
        """Whether NIXL will not touch the memory any more."""
        return not self._in_flight and self._cutter.is_empty

    @property
    def is_draining(self) -> bool:
        """Whether only its end is waited for: failed, cancelled or overdue, with a handle that NIXL still works on."""
        return self.cancelled or self.error is not None or self.deadline.expired

    @property
    def num_done_bytes(self) -> int:
        """Bytes of the chunks that are done, as NIXL counted them."""
        return sum([chunk.num_bytes for chunk in self._measured])

    def cancel(self) -> None:
        """Post nothing further; `on_end` comes when what is in flight is terminal. NIXL can't abort it."""
        self.cancelled = True

    def stop(self, error: BusError) -> None:
        """Fail: nothing more is posted, and what is in flight drains."""
        self.error = self.error or error
        self._cutter = Cutter(())

    def report(self) -> TransferReport:
        """What the chunks add up to. Raises `TransferError`, `PeerLost`, `DeadlineExceeded`, `TransferCancelled`."""
        if self.error is not None:
            raise self.error
        measured = self._measured
        return TransferReport(
            self.num_done_bytes,
            sum([chunk.num_descriptors for chunk in measured]),
            len(measured),
            sum([chunk.post_us for chunk in measured]),
            sum([chunk.transfer_us for chunk in measured]),
        )

    def _look(self, agent: NixlAgent) -> bool:
        handle = self._in_flight[0]
        try:
            if agent.check(handle) is not TransferState.DONE:
                return False
            self._measured.append(agent.telemetry(handle))
        except BusError as error:
            self.stop(error)
        self._in_flight.popleft()
        _release(agent, handle)
        return True

    def _post(self, agent: NixlAgent, chunk_bytes: int) -> None:
        plan = self.plan
        try:
            self._check_may_post()
            chunk = self._cutter.take(chunk_bytes)
            notification = plan.notification if self._cutter.is_empty else ""
            handle = agent.create_transfer(plan.direction, chunk, plan.peer, plan.memory_types, notification)
        except BusError as error:
            self.stop(error)
            return
        self.posted = True
        self._in_flight.append(handle)  # from here on only NIXL's word takes it out
        try:
            if agent.post(handle) is not TransferState.DONE or len(self._in_flight) > 1:
                return
            self._measured.append(agent.telemetry(handle))
        except BusError as error:
            self.stop(error)
        self._in_flight.remove(handle)
        _release(agent, handle)

    def _check_may_post(self) -> None:
        if self.cancelled:
            raise TransferCancelled("the transfer was cancelled", peer=self.plan.peer)
        if self.deadline.expired:
            raise DeadlineExceeded("the lease ran out before everything was posted", peer=self.plan.peer)


def _release(agent: NixlAgent, handle: int) -> None:
    try:
        agent.release(handle)
    except BusError as error:
        _LOG.warning("a transfer handle was not released: %s", error)
