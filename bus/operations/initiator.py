"""The active side of an operation: check the grant, move the bytes, publish the one terminal ack.

In: a target's `RdmaMetadata` and local memory. Out: a `ReadOperation` or `WriteOperation`, awaited for its report.
Everything that can be refused is refused before a byte moves: wrong pairing, wrong length, an expired lease, a stale
epoch, an address outside the target's regions. Whatever happens after the claim, the target gets exactly one ack, and
only when NIXL will not touch its memory again: so it is sent after DONE, after the drain of a cancelled transfer, or
at once if nothing was posted. A waiter is answered at the deadline even where the drain takes longer.
"""

import asyncio
import logging
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

from bus.data_plane.addressing import CopyPair, pair, resolve
from bus.data_plane.agent import TransferDirection
from bus.data_plane.arena import Pinnable
from bus.data_plane.memory import Descriptor
from bus.data_plane.transfer import Transfer, TransferCancelled, TransferReport
from bus.deadline import Deadline
from bus.errors import BusError, DeadlineExceeded, IncompatiblePeer, LocalProtocolError
from bus.operations.claim import Claim, Lanes, claim
from observability import semantic_conventions as names
from observability.active_span import Span
from observability.tracing import start_span
from schemas.handshake import Region
from schemas.operations import (
    AckOutcome,
    MemoryExtent,
    OperationKind,
    RdmaMetadata,
)

LEASE_MARGIN_S = 0.05
"""Nothing is posted this close to the end of a lease: the ack has to arrive before the target gives up."""

_LOG = logging.getLogger(__name__)


class OperationReport(NamedTuple):
    """What an operation moved, and where its time went."""

    transfer: TransferReport
    wire_ms: float
    """From the post until NIXL said DONE, as seen by this process."""


class ActiveOperation:
    """A transfer that we began. Await it for its report."""

    def __init__(self, claim: Claim, transfer: Transfer, lease: Pinnable, span: Span, started_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.metadata = claim.metadata
        self._claim = claim
        self._transfer = transfer
        self._lease = lease
        self._span = span
        self._started_s = started_s
        self._answer: asyncio.Future[OperationReport] = loop.create_future()
        self._timer = loop.call_later(max(0.0, claim.deadline.remaining_s), self._on_lease_end)

    def __await__(self) -> Generator[Any, None, OperationReport]:
        return self.wait().__await__()

    async def wait(self) -> OperationReport:
        """The report of a transfer that NIXL called DONE and the target was told of.

        Raises `TransferError`, `PeerLost`, `DeadlineExceeded`. Cancelling the wait cancels the operation.
        """
        try:
            return await asyncio.shield(self._answer)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Post nothing further; the target hears when what was posted has drained."""
        self._give_up(TransferCancelled("the operation was cancelled", operation_id=self.metadata.operation_id))

    async def conclude(self) -> None:
        """See the transfer to its end, whoever still waits, then tell the target and our waiter. Never cancelled."""
        await self._transfer.ended
        self._timer.cancel()
        self._lease.unpin()
        wire_ms = (time.perf_counter() - self._started_s) * 1e3
        self._span.event("done")
        try:
            report = self._transfer.report()
            await self._claim.acknowledge(AckOutcome.COMPLETE, report.num_bytes, span=self._span)
            self._span.set(_measured(report, wire_ms))
            self._resolve(OperationReport(report, wire_ms))
        except BusError as error:
            self._fail(error)
            await self._acknowledge_failure(error)
        finally:
            self._span.end()

    async def _acknowledge_failure(self, error: BusError) -> None:
        outcome = AckOutcome.FAILED if self._transfer.posted else AckOutcome.NEVER_POSTED
        if self._transfer.posted and isinstance(error, (DeadlineExceeded, TransferCancelled)):
            outcome = AckOutcome.DRAINED
        try:
            await self._claim.acknowledge(outcome, error=error, span=self._span)
        except BusError as failure:
            _LOG.warning("the ack of operation %s could not be sent: %s", self.metadata.operation_id, failure)

    def _on_lease_end(self) -> None:
        self._give_up(
            DeadlineExceeded(
                "the transfer was not done before the lease ended", operation_id=self.metadata.operation_id
            )
        )

    def _give_up(self, error: BusError) -> None:
        self._transfer.cancel()
        self._fail(error)

    def _resolve(self, report: OperationReport) -> None:
        self._span.event("acknowledged")
        if not self._answer.done():
            self._answer.set_result(report)

    def _fail(self, error: BusError) -> None:
        if not self._answer.done():
            self._span.fail(error)
            self._answer.set_exception(error)
            self._answer.exception()  # whoever cancelled may never await: that is no unhandled error


class ReadOperation(ActiveOperation):
    """We read the target's memory into ours."""


class WriteOperation(ActiveOperation):
    """We write our memory into the target's."""


class _Pairing(NamedTuple):
    direction: TransferDirection
    operation_type: type[ActiveOperation]
    span_name: str


_PAIRINGS = {
    OperationKind.READABLE: _Pairing(TransferDirection.READ, ReadOperation, "nixl.read"),
    OperationKind.WRITABLE: _Pairing(TransferDirection.WRITE, WriteOperation, "nixl.write"),
}


async def begin(
    lanes: Lanes,
    kind: OperationKind,
    grant: RdmaMetadata | Claim,
    descriptor: Descriptor,
) -> ActiveOperation:
    """Check, claim if need be, and start the one transfer that pairs with a grant of `kind`.

    Raises `LocalProtocolError` for a wrong pairing or length and what `claim` raises; nothing was posted then, and a
    claim that was ours is given back.
    """
    metadata = grant.metadata if isinstance(grant, Claim) else grant
    pairing = _PAIRINGS[kind]
    span = start_span(
        pairing.span_name,
        attributes={
            names.NIXL_OPERATION: pairing.direction.value,
            names.NIXL_OPERATION_ID: metadata.operation_id,
            names.NIXL_BACKEND: lanes.engine.agent.backend,
            names.NIXL_AGENT_LOCAL: lanes.identity.worker_id,
            names.NIXL_AGENT_REMOTE: metadata.worker_id,
        },
    )
    try:
        _check_pairing(metadata, kind, descriptor)
        if not isinstance(grant, Claim):
            span.event("handshake" if not lanes.peers.known(metadata.worker_id, metadata.epoch) else "peer known")
            grant = await claim(lanes, metadata)
            span.event("claimed")
        pairs, memory_types = await _paired(lanes, grant, descriptor)
        grant.spend()
    except BaseException as error:
        span.fail(error)
        span.end()
        raise
    descriptor.lease.pin()
    span.event("posted")
    post_until = Deadline(grant.deadline.at_s - LEASE_MARGIN_S)
    started_s = time.perf_counter()
    transfer = lanes.engine.start(pairing.direction, pairs, grant.peer.agent_name, post_until, memory_types)
    operation = pairing.operation_type(grant, transfer, descriptor.lease, span, started_s)
    lanes.conclusions.add(operation.conclude())
    return operation


def _check_pairing(metadata: RdmaMetadata, kind: OperationKind, descriptor: Descriptor) -> None:
    if metadata.kind is not kind:
        raise LocalProtocolError(
            f"a {metadata.kind.value} grant does not pair with this operation, which needs a {kind.value} one",
            remedy="begin_read takes the metadata of create_readable, begin_write that of create_writable",
            operation_id=metadata.operation_id,
        )
    if metadata.num_bytes != descriptor.num_bytes:
        raise LocalProtocolError(
            f"the local memory holds {descriptor.num_bytes:,} bytes and the grant {metadata.num_bytes:,}",
            operation_id=metadata.operation_id,
            num_bytes=descriptor.num_bytes,
        )


async def _paired(lanes: Lanes, grant: Claim, descriptor: Descriptor) -> tuple[list[CopyPair], tuple[str, str]]:
    try:
        local = resolve(descriptor.extents, lanes.memory.regions)
        remote = resolve(grant.metadata.memory, grant.peer.regions, peer=grant.peer.worker_id)
        memory_types = (
            _memory_type(descriptor.extents, lanes.memory.regions, ""),
            _memory_type(grant.metadata.memory, grant.peer.regions, grant.peer.worker_id),
        )
        return pair(local, remote), memory_types
    except BaseException:
        await grant.release()
        raise


def _memory_type(extents: Sequence[MemoryExtent], regions: Mapping[int, Region], peer: str) -> str:
    types = {regions[extent.region].memory_type for extent in extents}
    if len(types) > 1:
        raise IncompatiblePeer("one operation can't mix host and device memory on one side", peer=peer)
    return types.pop()


def _measured(report: TransferReport, wire_ms: float) -> dict[str, Any]:
    return {
        names.NIXL_BYTES: report.num_bytes,
        names.NIXL_DESCRIPTORS_COUNT: report.num_descriptors,
        names.NIXL_CHUNKS_COUNT: report.num_chunks,
        names.NIXL_POST_US: report.post_us,
        names.NIXL_WAIT_POST_TO_DONE_MS: round(wire_ms, 3),
        names.NIXL_BANDWIDTH_BYTES_PER_S: round(report.num_bytes / max(wire_ms / 1e3, 1e-9)),
        names.NIXL_STATUS: "DONE",
    }
