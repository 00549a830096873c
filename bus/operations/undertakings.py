"""The initiator's table: what it has undertaken towards each target, from the claim to the ack and a while after.

In: beginnings, posts, ends, and targets' status queries. Out: refusals, and acks told once more. A named grant is begun
once, whoever delivers it twice and however much later: each target counts its grants to us, and a window over these
serials says which were used; a query for one that was not seen uses it up, since the query may have overtaken the
grant. (Of an open grant the target decides.) Everything is bounded; the oldest acks are forgotten first.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable

from bus.errors import Draining, PoolExhausted, StaleGrant
from bus.operations.lifecycle import MAY_TOUCH, InitiatorEvent, InitiatorState, next_initiator_state
from bus.operations.serial_window import SerialWindow
from schemas.operations import (
    CompletionAck,
    Initiator,
    OperationState,
    OperationStatusReply,
    OperationStatusRequest,
    RdmaMetadata,
)

MAX_CONCLUDED = 16_384
"""Ended operations whose acks can still be told to a late status query."""
MAX_TARGETS = 16_384
"""Targets, by epoch, whose named grants we can tell apart."""

Key = tuple[str, str, str]
"""Target's worker id and epoch, and operation id."""


class Undertaking:
    """One operation of ours at a target."""

    __slots__ = ("_table", "ack", "key", "release", "state")

    def __init__(self, table: "Undertakings", key: Key) -> None:
        self._table = table
        self.key = key
        self.state = InitiatorState.UNSEEN
        self.ack: CompletionAck | None = None
        self.release: Callable[[], None] | None = None
        """Gives the claim back, once there is one."""

    def move(self, event: InitiatorEvent) -> None:
        """Take an event; see `lifecycle`."""
        before, self.state = self.state, next_initiator_state(self.state, event)
        if (before in MAY_TOUCH) != (self.state in MAY_TOUCH):
            self._table._note(self)


class Undertakings:
    """The table."""

    def __init__(self, identity: Initiator) -> None:
        self._identity = identity
        self._open: dict[Key, Undertaking] = {}
        self._concluded: OrderedDict[Key, Undertaking] = OrderedDict()
        self._windows: dict[tuple[str, str], SerialWindow] = {}
        self._when_idle: asyncio.Event | None = None
        self.is_closed = False
        """Whether nothing more may begin."""

    @property
    def num_open(self) -> int:
        """Operations whose target's memory we may still touch."""
        return len(self._open)

    def begin(self, metadata: RdmaMetadata) -> Undertaking:
        """Enter an operation. Raises `StaleGrant` for one that was begun or refused before, `Draining` once closed."""
        if self.is_closed:
            raise Draining("the bus is closing and begins nothing more")
        key = (metadata.worker_id, metadata.epoch, metadata.operation_id)
        if key in self._open or key in self._concluded:
            raise StaleGrant("the grant was used already", operation_id=metadata.operation_id)
        if metadata.token is not None and not self._window(metadata.worker_id, metadata.epoch).admit(metadata.serial):
            raise StaleGrant(
                "the grant was used already, or the target asked about it and was told that it will not be used",
                operation_id=metadata.operation_id,
            )
        undertaking = Undertaking(self, key)
        undertaking.move(InitiatorEvent.BEGIN)
        return undertaking

    def forget(self, undertaking: Undertaking) -> None:
        """An open grant that its target never heard of again: it can be tried once more."""
        self._concluded.pop(undertaking.key, None)

    def answer(self, request: OperationStatusRequest) -> OperationStatusReply:
        """What became of an operation that a target asks about."""
        key = (request.worker_id, request.epoch, request.operation_id)
        state, ack = OperationState.UNKNOWN, None
        if request.initiator == self._identity:
            concluded = self._concluded.get(key)
            if key in self._open:
                state = OperationState.UNDER_WAY
            elif concluded is not None:
                ack = concluded.ack
                state = OperationState.CONCLUDED if ack else OperationState.REFUSED
            else:
                state = OperationState.REFUSED
                if request.serial:
                    self._window(request.worker_id, request.epoch).admit(request.serial)
        return OperationStatusReply(operation_id=request.operation_id, initiator=self._identity, state=state, ack=ack)

    def close(self) -> None:
        """Begin nothing more, and give back every claim that was not spent."""
        self.is_closed = True
        for undertaking in list(self._open.values()):
            if undertaking.release is not None:
                undertaking.release()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is open, for up to `timeout_s`; returns whether it is so."""
        if not self._open:
            return True
        self._when_idle = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._when_idle.wait()
        return not self._open

    def _window(self, worker_id: str, epoch: str) -> SerialWindow:
        window = self._windows.get((worker_id, epoch))
        if window is None:
            if len(self._windows) >= MAX_TARGETS:
                raise PoolExhausted(f"{MAX_TARGETS:,} targets have made named grants", remedy="restart the worker")
            window = self._windows[worker_id, epoch] = SerialWindow()
        return window

    def _note(self, undertaking: Undertaking) -> None:
        if undertaking.state in MAY_TOUCH:
            self._open[undertaking.key] = undertaking
            return
        del self._open[undertaking.key]
        self._concluded[undertaking.key] = undertaking
        if len(self._concluded) > MAX_CONCLUDED:
            self._concluded.popitem(last=False)
        if self._when_idle is not None and not self._open:
            self._when_idle.set()
