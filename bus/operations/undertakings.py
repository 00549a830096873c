"""The initiator's table: what it has undertaken towards each target, from the claim to the ack and a while after.

In: beginnings, posts, ends, and targets' status queries. Out: refusals, and acks told once more. An operation is begun
once, whoever delivers its grant twice; a query for one that was not seen refuses it from then on, since the query may
have overtaken the grant. Both memories are bounded: the oldest acks are forgotten, while past the bound of refusals no
further promise is made (UNKNOWN proves nothing to the target, which keeps its memory fenced).
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable

from bus.errors import StaleGrant
from bus.operations.lifecycle import MAY_TOUCH, InitiatorEvent, InitiatorState, next_initiator_state
from schemas.operations import (
    CompletionAck,
    Initiator,
    OperationState,
    OperationStatusReply,
    OperationStatusRequest,
    RdmaMetadata,
)

MAX_CONCLUDED = 16_384
"""Ended operations that are remembered: what a late status query can still be told, and a replayed grant refused by."""
MAX_REFUSED = 65_536

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
        self._refused: set[Key] = set()
        self._when_idle: asyncio.Event | None = None

    @property
    def num_open(self) -> int:
        """Operations whose target's memory we may still touch."""
        return len(self._open)

    def begin(self, metadata: RdmaMetadata) -> Undertaking:
        """Enter an operation. Raises `StaleGrant` for one that was refused or begun before."""
        key = (metadata.worker_id, metadata.epoch, metadata.operation_id)
        if key in self._open or key in self._concluded:
            raise StaleGrant("the grant was used already", operation_id=metadata.operation_id)
        if key in self._refused:
            raise StaleGrant(
                "the target asked about the grant before it arrived, and was told that it will not be used",
                operation_id=metadata.operation_id,
            )
        undertaking = Undertaking(self, key)
        undertaking.move(InitiatorEvent.BEGIN)
        return undertaking

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
            elif self._refuse(key):
                state = OperationState.REFUSED
        return OperationStatusReply(operation_id=request.operation_id, initiator=self._identity, state=state, ack=ack)

    def release_all(self) -> None:
        """Give back every claim that was not spent; for shutdown."""
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

    def _refuse(self, key: Key) -> bool:
        if key not in self._refused and len(self._refused) >= MAX_REFUSED:
            return False
        self._refused.add(key)
        return True

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
