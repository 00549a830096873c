"""The passive side of an operation: grant memory, answer claims, wait for the one ack.

In: a `Descriptor` to let a peer read or write. Out: a `ReadableOperation` or `WritableOperation`, whose `metadata`
goes to the peer in any message, and which is awaited: it returns when the ack says complete, and raises otherwise.
Nothing is polled: an ack, a deadline or the caller ends the wait. The descriptor's memory is pinned until nobody else
may touch it, which can be long after the waiter was answered (`lifecycle`).
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable, Generator, Mapping
from typing import Any

from bus.data_plane.memory import Descriptor
from bus.deadline import Deadline
from bus.errors import BusError, DataPlaneError, DeadlineExceeded, LocalProtocolError, RemoteFault, StaleGrant
from bus.operations.lifecycle import MEMORY_FREE, WAITING, GrantEvent, GrantState, event_of, next_state
from observability import semantic_conventions as names
from observability.active_span import Span
from observability.propagation import extract
from observability.tracing import start_span
from schemas.operations import (
    AckOutcome,
    ClaimReply,
    ClaimRequest,
    CompletionAck,
    Initiator,
    OperationKind,
    RdmaMetadata,
)

_LOG = logging.getLogger(__name__)


class PassiveOperation:
    """A grant of our memory. Await it, or use it as an async context manager, which cancels it if it wasn't awaited."""

    def __init__(self, metadata: RdmaMetadata, descriptor: Descriptor, deadline: Deadline, span: Span) -> None:
        self.metadata = metadata
        self.state = GrantState.GRANTED
        self.deadline = deadline
        self._descriptor = descriptor
        self._span = span
        self._token = metadata.token or b""
        self._initiator = metadata.initiator
        self._done: asyncio.Future[CompletionAck] = asyncio.get_running_loop().create_future()
        self._on_free: list[Callable[[], None]] = []
        if self._token:
            self.state = GrantState.CLAIMED  # a named grant may be acted on at once
        descriptor.lease.pin()
        self._timer = asyncio.get_running_loop().call_later(deadline.remaining_s, self._on_lease_end)

    def __await__(self) -> Generator[Any, None, CompletionAck]:
        return self.wait().__await__()

    async def wait(self) -> CompletionAck:
        """The ack of a proved completion.

        Raises `DeadlineExceeded` at the end of the lease, `RemoteFault` when the initiator failed, `StaleGrant` when
        the grant was cancelled. Cancelling the wait cancels the operation.
        """
        try:
            return await asyncio.shield(self._done)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Refuse the grant from now on. Claimed memory stays fenced until the initiator's ack."""
        self._move(GrantEvent.CANCEL)
        self._end(StaleGrant("the operation was cancelled", operation_id=self.metadata.operation_id))

    def on_free(self, callback: Callable[[], None]) -> None:
        """Call back when nobody else may touch the memory any more."""
        self._on_free.append(callback)

    def claim(self, initiator: Initiator) -> ClaimReply:
        """Give the grant to `initiator`. Raises `StaleGrant` if it isn't open."""
        if self.state is not GrantState.GRANTED:
            raise StaleGrant(f"the grant is {self.state.value}", operation_id=self.metadata.operation_id)
        self._token, self._initiator = secrets.token_bytes(16), initiator
        self._move(GrantEvent.CLAIM)
        self._span.event("claimed", {names.NIXL_AGENT_REMOTE: initiator.worker_id})
        return ClaimReply(
            operation_id=self.metadata.operation_id,
            token=self._token,
            lease_ms=max(1, self.deadline.remaining_ms),
        )

    def acknowledge(self, ack: CompletionAck, headers: Mapping[str, str] | None) -> bool:
        """Take the initiator's ack; returns whether it was ours to take (right initiator, epoch and token)."""
        if not self._token or ack.initiator != self._initiator or not hmac.compare_digest(ack.token, self._token):
            return False
        initiator_span = extract(headers)
        if initiator_span is not None:
            self._span.link(initiator_span)
        waiting = self.state in WAITING
        self._move(event_of(ack.outcome))
        if waiting:
            self._end(self._verdict(ack), ack)
        return True

    def _verdict(self, ack: CompletionAck) -> BusError | None:
        operation_id = self.metadata.operation_id
        if ack.outcome is not AckOutcome.COMPLETE:
            if ack.fault is not None:
                return RemoteFault(ack.fault)
            return DataPlaneError(f"the initiator gave up: {ack.outcome.value}", operation_id=operation_id)
        if ack.num_bytes != self.metadata.num_bytes:
            return DataPlaneError(
                f"the initiator moved {ack.num_bytes:,} of {self.metadata.num_bytes:,} bytes",
                operation_id=operation_id,
            )
        return None

    def _on_lease_end(self) -> None:
        if self.state in WAITING:
            self._move(GrantEvent.LEASE_END)
            self._end(DeadlineExceeded("no ack before the lease ended", operation_id=self.metadata.operation_id))

    def _move(self, event: GrantEvent) -> None:
        was_free = self.state in MEMORY_FREE
        self.state = next_state(self.state, event)
        if self.state in MEMORY_FREE and not was_free:
            self._descriptor.lease.unpin()
            for callback in self._on_free:
                callback()

    def _end(self, error: BusError | None, ack: CompletionAck | None = None) -> None:
        if self._done.done():
            return
        self._timer.cancel()
        if error is None and ack is not None:
            self._span.set({names.NIXL_OPERATION_ACKNOWLEDGED_BYTES: ack.num_bytes})
            self._done.set_result(ack)
        elif error is not None:
            self._span.fail(error)
            self._done.set_exception(error)
            self._done.exception()  # whoever cancelled may never await: that is no unhandled error
        self._span.end()

    async def __aenter__(self) -> "PassiveOperation":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class ReadableOperation(PassiveOperation):
    """Our memory, for a peer to read."""


class WritableOperation(PassiveOperation):
    """Our memory, for a peer to write."""


class Grants:
    """The target's table of operations: those that wait, and those whose memory is fenced."""

    def __init__(self, worker_id: str, epoch: str) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._operations: dict[str, PassiveOperation] = {}
        self.num_dropped_acks = 0

    @property
    def num_open(self) -> int:
        """Operations whose memory somebody else may touch."""
        return len(self._operations)

    @property
    def num_quarantined(self) -> int:
        """Those among them whose waiter was answered."""
        return sum(operation.state is GrantState.QUARANTINED for operation in self._operations.values())

    def create(
        self,
        kind: OperationKind,
        descriptor: Descriptor,
        deadline: Deadline,
        name: str,
        initiator: Initiator | None,
    ) -> PassiveOperation:
        """Grant memory until `deadline`. Raises `LocalProtocolError` if that has passed."""
        if deadline.expired:
            raise LocalProtocolError("a grant needs time: its deadline has passed")
        metadata = RdmaMetadata(
            operation_id=secrets.token_hex(8),
            kind=kind,
            worker_id=self._worker_id,
            epoch=self._epoch,
            memory=list(descriptor.extents),
            lease_ms=max(1, deadline.remaining_ms),
            initiator=initiator,
            token=secrets.token_bytes(16) if initiator else None,
        )
        wait_span = start_span(
            f"{name}.{kind.value}",
            attributes={
                names.NIXL_OPERATION_ID: metadata.operation_id,
                names.NIXL_OPERATION_GRANTED_BYTES: metadata.num_bytes,
            },
        )
        operation_type = ReadableOperation if kind is OperationKind.READABLE else WritableOperation
        operation = operation_type(metadata, descriptor, deadline, wait_span)
        self._operations[metadata.operation_id] = operation
        operation.on_free(lambda: self._forget(metadata.operation_id))
        return operation

    async def claim(self, request: ClaimRequest) -> ClaimReply:
        """Answer an initiator's claim. Raises `StaleGrant` for one that is unknown, taken, or of another epoch."""
        if request.epoch != self._epoch:
            raise StaleGrant("the grant is of another epoch", operation_id=request.operation_id)
        operation = self._operations.get(request.operation_id)
        if operation is None:
            raise StaleGrant("no such grant: it ended, or never was", operation_id=request.operation_id)
        return operation.claim(request.initiator)

    def acknowledge(self, ack: CompletionAck, headers: Mapping[str, str] | None) -> None:
        """Hand an ack to its operation; one that is nobody's, or not its initiator's, is counted and dropped."""
        operation = self._operations.get(ack.operation_id)
        if operation is None or not operation.acknowledge(ack, headers):
            self.num_dropped_acks += 1
            _LOG.info("an ack for operation %s from %s was dropped", ack.operation_id, ack.initiator.worker_id)

    def cancel_all(self) -> None:
        """Answer every waiter; for shutdown."""
        for operation in list(self._operations.values()):
            operation.cancel()

    def _forget(self, operation_id: str) -> None:
        self._operations.pop(operation_id, None)
