"""The passive side of an operation: a grant of memory, the claims on it, and its waiter.

In: memory to let peers read or write. Out: a `ReadableOperation` or `WritableOperation`, whose `metadata` goes to the
peer in any message, and which is awaited: it returns when the ack says complete, and raises otherwise.
Nothing is polled: an ack, a deadline, a proof of death or the caller ends the wait. An initiator whose ack is late is
asked at a half, three quarters and nine tenths of the lease, and after that, ever more rarely, for as long as its
claim keeps the memory fenced. The memory is pinned until nobody else may touch it, which can be long after the waiter
was answered (`lifecycle`). Leaves out: the table of operations and who asks (`grants`).
"""

import asyncio
import hmac
from collections.abc import Generator, Mapping
from contextvars import Context
from enum import Enum
from typing import NamedTuple, Protocol

from bus.data_plane.memory import LocalMemory
from bus.deadline import Deadline
from bus.errors import (
    BusError,
    DataPlaneError,
    DeadlineExceeded,
    IncompleteOperation,
    LocalProtocolError,
    PeerLost,
    RemoteFault,
    StaleGrant,
)
from bus.operations.lifecycle import MEMORY_FREE, WAITING, GrantEvent, GrantState, event_of, next_state
from bus.operations.verdict import Verdict
from observability import semantic_conventions as names
from observability.active_span import Span
from observability.propagation import extract
from schemas.operations import AckOutcome, ClaimReply, CompletionAck, Initiator, OperationKind, RdmaMetadata

ASK_AT = (0.5, 0.75, 0.9)
"""Fractions of the lease at which an initiator whose ack is late is asked for it."""
FIRST_ASK_AFTER_LEASE_S = 0.5
LONGEST_ASK_S = 30.0


ANONYMOUS = Initiator(worker_id="anonymous", epoch="")
"""Who acts on a grant for initiators that have no bus."""


class OperationStatus(Enum):
    """Where an operation is, in the words of NIXL Connect."""

    INITIALIZED = "initialized"
    IN_PROGRESS = "in progress"
    COMPLETE = "complete"
    CANCELLED = "cancelled"
    ERRORED = "errored"


class PeerOutcome(NamedTuple):
    """How one peer's share of an operation went; `ack` when it completed, `error` when it did not."""

    initiator: Initiator | None
    state: GrantState
    ack: CompletionAck | None
    error: BusError | None


class Seat:
    """One of the claims that a grant has room for."""

    __slots__ = ("ack", "error", "initiator", "is_verified", "state", "tokens")

    def __init__(self, initiator: Initiator | None, token: bytes | None) -> None:
        self.initiator = initiator
        self.tokens = [token] if token else []
        self.state = GrantState.CLAIMED if token else GrantState.GRANTED  # a named grant may be acted on at once
        self.ack: CompletionAck | None = None
        self.error: BusError | None = None
        self.is_verified = False

    def is_by(self, ack: CompletionAck) -> bool:
        """Whether an ack is of the initiator that sits here: worker, epoch and token."""
        return ack.initiator == self.initiator and any(hmac.compare_digest(ack.token, own) for own in self.tokens)


class Listener(Protocol):
    """What an operation tells its table."""

    def quarantined(self, operation: "PassiveOperation", is_so: bool) -> None:
        """Its waiter is answered but its memory fenced; or no longer."""

    def freed(self, operation: "PassiveOperation") -> None:
        """Nobody else may touch the memory any more."""

    def ask(self, operation: "PassiveOperation", initiator: Initiator) -> None:
        """The initiator's ack is late."""

    def verify(self, operation: "PassiveOperation", seat: Seat, ack: CompletionAck) -> None:
        """The bytes are to be held against the ack's checksum; `verified` takes the result."""


class PassiveOperation:
    """A grant of our memory. Await it, or use it as an async context manager, which cancels it if it wasn't awaited."""

    def __init__(
        self, metadata: RdmaMetadata, memory: LocalMemory, deadline: Deadline, span: Span, listener: Listener
    ) -> None:
        loop = asyncio.get_running_loop()
        self.metadata = metadata
        self.deadline = deadline
        self.memory = memory
        self.span = span
        self.invitation = ""
        """For an initiator that has no bus; see `to_dynamo`."""
        self._listener = listener
        self._seats = [Seat(metadata.initiator, metadata.token) for _ in range(metadata.max_claims)]
        self._num_waiting = self._num_fenced = metadata.max_claims
        self._verdict = Verdict()
        self._loop = loop
        self._lease_s = deadline.remaining_s
        self._is_quarantined = False
        self._num_asks = 0
        self._timer = loop.call_later(ASK_AT[0] * self._lease_s, self._on_timer, context=Context())

    def __await__(self) -> Generator[None, None, CompletionAck]:
        return self.wait().__await__()

    async def wait(self) -> CompletionAck:
        """The ack of a proved completion; with several claims, the last one, and `outcomes` has them all.

        Raises `DeadlineExceeded` at the end of the lease, `RemoteFault` when the initiator failed, `PeerLost` when its
        process is gone, `StaleGrant` when the grant was cancelled, `ChecksumMismatch`; and `IncompleteOperation` when
        some of several peers did not complete. Cancelling the wait cancels the operation. Safe from any event loop.
        """
        if asyncio.get_running_loop() is not self._loop:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.wait(), self._loop))
        await self._verdict.wait(self.cancel)
        ack = self._seats[-1].ack
        assert ack is not None  # decided without an error: complete
        return ack

    @property
    def state(self) -> GrantState:
        """Where the grant is; of several claims, the one that is furthest from its end."""
        return min((seat.state for seat in self._seats), key=_ORDER.index)

    @property
    def status(self) -> OperationStatus:
        """The same in NIXL Connect's words."""
        if not self._verdict.is_decided:
            claimed = any(seat.state is GrantState.CLAIMED for seat in self._seats)
            return OperationStatus.IN_PROGRESS if claimed else OperationStatus.INITIALIZED
        error = self._verdict.error
        if error is None:
            return OperationStatus.COMPLETE
        return OperationStatus.CANCELLED if isinstance(error, StaleGrant) else OperationStatus.ERRORED

    @property
    def outcomes(self) -> list[PeerOutcome]:
        """How each claim went, in the order of the claims."""
        return [PeerOutcome(seat.initiator, seat.state, seat.ack, seat.error) for seat in self._seats]

    def cancel(self) -> None:
        """Refuse the grant from now on. Claimed memory stays fenced until the initiator's ack or proved death."""
        if asyncio._get_running_loop() is not self._loop:
            self._loop.call_soon_threadsafe(self._cancel)
        else:
            self._cancel()

    def claim(self, initiator: Initiator, tokens: list[bytes]) -> ClaimReply:
        """Give a seat to `initiator`, or the one that it has, once more. Raises `StaleGrant` if there is none.

        `tokens`: what its ack must carry, one of them.
        """
        operation_id = self.metadata.operation_id
        seat = next((seat for seat in self._seats if seat.initiator == initiator), None)
        if seat is None:
            seat = next((seat for seat in self._seats if seat.state is GrantState.GRANTED), None)
            if seat is None:
                raise StaleGrant(f"the grant is {self.state.value}", operation_id=operation_id)
            seat.tokens, seat.initiator = tokens, initiator
            self._move(seat, GrantEvent.CLAIM)
            self.span.event("claimed", {names.NIXL_AGENT_REMOTE: initiator.worker_id})
        if seat.state is not GrantState.CLAIMED:
            raise StaleGrant(f"the claim is {seat.state.value}", operation_id=operation_id)
        return ClaimReply(operation_id=operation_id, lease_ms=max(1, self.deadline.remaining_ms))

    def acknowledge(self, ack: CompletionAck, headers: Mapping[str, str] | None) -> bool:
        """Take an initiator's ack; returns whether it was one's to give (right initiator, epoch and token)."""
        seat = next((seat for seat in self._seats if seat.is_by(ack)), None)
        if seat is None or seat.state in MEMORY_FREE:
            return False
        initiator_span = extract(headers) if headers else None
        if initiator_span is not None:
            self.span.link(initiator_span)
        wants_proof = self.metadata.checksummed and self.metadata.kind is OperationKind.WRITABLE
        if wants_proof and _is_complete(ack):
            if not seat.is_verified:
                seat.is_verified = True  # one look, however often the ack comes
                self._listener.verify(self, seat, ack)
        else:
            self.conclude(seat, ack)
        return True

    def to_dynamo(self) -> str:
        """The JSON by which a `dynamo.nixl_connect` initiator may act on the memory, instead of `metadata`.

        Raises `LocalProtocolError` for an operation that was not created with `allow_unauthenticated=True`.
        """
        if not self.invitation:
            raise LocalProtocolError(
                "the operation is for members of the bus",
                remedy="create it with allow_unauthenticated=True",
                operation_id=self.metadata.operation_id,
            )
        return self.invitation

    def notified(self) -> None:
        """An initiator without a bus says by NIXL's notification that it is done."""
        for seat in self._seats:
            seat.ack = CompletionAck(
                operation_id=self.metadata.operation_id,
                outcome=AckOutcome.COMPLETE,
                initiator=ANONYMOUS,
                token=seat.tokens[0],
                num_bytes=self.memory.num_bytes,
            )
            self._move(seat, GrantEvent.ACK_COMPLETE)
        self._answer_if_decided()

    def conclude(self, seat: Seat, ack: CompletionAck, error: BusError | None = None) -> None:
        """End a claim by its ack, or by what was found wrong with it."""
        error = error or self._objection(ack)
        if seat.state in WAITING:
            seat.error = error
            seat.ack = ack if error is None else None
            if error is None and self.span.is_recording:
                self.span.set({names.NIXL_OPERATION_ACKNOWLEDGED_BYTES: ack.num_bytes})
        self._move(seat, GrantEvent.ACK_FAILED if error else GrantEvent.ACK_COMPLETE)
        self._answer_if_decided()

    def revoke(self, initiator: Initiator) -> None:
        """The initiator says that it posted nothing and never will."""
        self._end_claims_of(initiator, GrantEvent.ACK_FAILED, "the initiator never posted anything", DataPlaneError)

    def initiator_gone(self, initiator: Initiator) -> None:
        """The initiator's process is proved to be gone: it writes no more."""
        self._end_claims_of(initiator, GrantEvent.INITIATOR_GONE, "the initiator's process is gone", PeerLost)

    def _end_claims_of(
        self, initiator: Initiator, event: GrantEvent, what: str, error_type: type[DataPlaneError]
    ) -> None:
        for seat in self._seats:
            is_looked_at = seat.is_verified and seat.state in WAITING  # its ack is here; the checksum concludes it
            if seat.initiator == initiator and seat.state not in MEMORY_FREE and not is_looked_at:
                if seat.state in WAITING:
                    seat.error = error_type(what, peer=initiator.worker_id, operation_id=self.metadata.operation_id)
                self._move(seat, event)
        self._answer_if_decided()

    def _cancel(self) -> None:
        self._end_all(
            GrantEvent.CANCEL, StaleGrant("the operation was cancelled", operation_id=self.metadata.operation_id)
        )

    def _end_all(self, event: GrantEvent, error: BusError) -> None:
        for seat in self._seats:
            if seat.state in WAITING:
                seat.error = error
                self._move(seat, event)
        self._answer_if_decided()

    def _objection(self, ack: CompletionAck) -> BusError | None:
        operation_id = self.metadata.operation_id
        if not _is_complete(ack):
            if ack.fault is not None:
                return RemoteFault(ack.fault)
            return DataPlaneError(f"the initiator gave up: {ack.outcome.value}", operation_id=operation_id)
        expected = self.memory.num_bytes
        if ack.num_bytes != expected:
            return DataPlaneError(
                f"the initiator moved {ack.num_bytes:,} of {expected:,} bytes", operation_id=operation_id
            )
        return None

    def _on_timer(self) -> None:
        if self._num_asks == len(ASK_AT) and not self.deadline.expired:  # uvloop's timers may fire too early
            self._timer = self._loop.call_later(self.deadline.remaining_s, self._on_timer, context=Context())
            return
        self._num_asks += 1
        if not self._verdict.is_decided and self.deadline.expired:
            self._end_all(
                GrantEvent.LEASE_END,
                DeadlineExceeded("no ack before the lease ended", operation_id=self.metadata.operation_id),
            )
        for seat in self._seats:
            if seat.initiator is not None and seat.state in (GrantState.CLAIMED, GrantState.QUARANTINED):
                self._listener.ask(self, seat.initiator)
        if self._num_fenced:
            self._timer = self._loop.call_later(self._next_look_s(), self._on_timer, context=Context())

    def _next_look_s(self) -> float:
        if self._num_asks < len(ASK_AT):
            return self.deadline.remaining_s - (1 - ASK_AT[self._num_asks]) * self._lease_s
        if self._num_asks == len(ASK_AT):
            return self.deadline.remaining_s
        return float(min(FIRST_ASK_AFTER_LEASE_S * 2 ** min(self._num_asks - len(ASK_AT) - 1, 8), LONGEST_ASK_S))

    def _move(self, seat: Seat, event: GrantEvent) -> None:
        before, seat.state = seat.state, next_state(seat.state, event)
        self._num_waiting -= before in WAITING and seat.state not in WAITING
        if before not in MEMORY_FREE and seat.state in MEMORY_FREE:
            self._num_fenced -= 1
            if not self._num_fenced:
                self._free()

    def _free(self) -> None:
        self._timer.cancel()
        self._note_quarantine(False)
        self._listener.freed(self)
        self.memory.lease.unpin()

    def stop_asking(self) -> None:
        """Ask initiators nothing more; for shutdown."""
        self._timer.cancel()

    def _note_quarantine(self, is_so: bool) -> None:
        if is_so is not self._is_quarantined:
            self._is_quarantined = is_so
            self._listener.quarantined(self, is_so)

    def _answer_if_decided(self) -> None:
        if self._num_waiting or self._verdict.is_decided:
            return
        failures = [seat for seat in self._seats if seat.error is not None]
        error: BusError | None = None
        if failures:
            is_alone = len(self._seats) == 1 or all(isinstance(seat.error, StaleGrant) for seat in self._seats)
            error = failures[0].error if is_alone else self._incomplete(failures)
        self._verdict.decide(error)
        self.span.end(error)
        if self._num_fenced:
            self._note_quarantine(True)

    def _incomplete(self, failures: list[Seat]) -> IncompleteOperation:
        num_seats = len(self._seats)
        return IncompleteOperation(
            f"{num_seats - len(failures)} of {num_seats} peers completed the operation; first failure: "
            f"{failures[0].error}",
            operation_id=self.metadata.operation_id,
        )

    async def __aenter__(self) -> "PassiveOperation":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class ReadableOperation(PassiveOperation):
    """Our memory, for a peer to read."""


class WritableOperation(PassiveOperation):
    """Our memory, for a peer to write."""


_ORDER = (
    GrantState.CLAIMED,
    GrantState.GRANTED,
    GrantState.QUARANTINED,
    GrantState.FAILED,
    GrantState.REVOKED,
    GrantState.RELEASED,
    GrantState.COMPLETE,
)


def _is_complete(ack: CompletionAck) -> bool:
    return event_of(ack.outcome) is GrantEvent.ACK_COMPLETE
