"""The active side of an operation: check the grant, move the bytes, publish the one terminal ack.

In: a target's `RdmaMetadata` and local memory. Out: a `ReadOperation` or `WriteOperation`, awaited for its report.
Everything that can be refused is refused before a byte moves: wrong pairing, length or layout, an expired lease, a
stale epoch, an address outside the target's regions. Whatever happens after the claim, the target gets exactly one
ack, and only when NIXL will not touch its memory again: so it is sent after DONE, after the drain of a cancelled
transfer, or at once if nothing was posted. A waiter is answered at the deadline even where the drain takes longer.
"""

import asyncio
import hmac
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import Context
from typing import Any, NamedTuple, Protocol

from bus.data_plane.addressing import AddressRange, pair, resolve
from bus.data_plane.agent import MEMORY_TYPES, TransferDirection
from bus.data_plane.checksum import checksum
from bus.data_plane.memory import LocalMemory
from bus.data_plane.transfer import Transfer, TransferCancelled, TransferPlan, TransferReport
from bus.deadline import Deadline
from bus.errors import (
    BusError,
    ChecksumMismatch,
    DeadlineExceeded,
    IncompatiblePeer,
    LeaseExpired,
    LocalProtocolError,
    ReadOnlyMemory,
    RemoteProtocolError,
    TransferError,
    WrongLayout,
    WrongLength,
    WrongPairing,
)
from bus.operations.claim import Claim, Lanes, claim, named_claim
from bus.operations.target import OperationStatus
from bus.operations.verdict import Verdict
from observability import semantic_conventions as names
from observability.active_span import NO_SPAN, Span
from observability.tracing import is_tracing, start_span
from schemas.handshake import Region
from schemas.operations import AckOutcome, MemoryExtent, OperationKind, RdmaMetadata

LEASE_MARGIN_S = 0.05
"""Nothing is posted this close to the end of a lease: the ack has to arrive before the target gives up."""

Progress = Callable[[int], None]
"""Called on the event loop with the bytes that are done so far, after each chunk of a large transfer."""


class OperationReport(NamedTuple):
    """What an operation moved, and where its time went."""

    transfer: TransferReport
    wire_ms: float
    """From the post until NIXL said DONE, as seen by this process."""


class Owed(Protocol):
    """What an operation owes its target: of a `Claim`, the part that outlives the post."""

    @property
    def metadata(self) -> RdmaMetadata: ...  # noqa: D102
    @property
    def deadline(self) -> Deadline: ...  # noqa: D102
    def drain(self) -> None: ...  # noqa: D102
    def acknowledge(  # noqa: D102
        self,
        outcome: AckOutcome,
        num_bytes: int = 0,
        *,
        error: BaseException | None = None,
        checksum: bytes | None = None,
        span: Span = NO_SPAN,
    ) -> None: ...


class ActiveOperation:
    """A transfer that we began. Await it for its report."""

    def __init__(self, lanes: Lanes, claim: Owed, memory: LocalMemory, ranges: Sequence[AddressRange], span: Span):
        self.metadata = claim.metadata
        self._lanes = lanes
        self._claim = claim
        self._memory = memory
        self._ranges = ranges
        self._span = span
        self._loop = asyncio.get_running_loop()
        self._started_s = time.perf_counter()
        self._verdict = Verdict()
        self._wire_ms = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._transfer: Transfer

    def __await__(self) -> Generator[None, None, OperationReport]:
        return self.wait().__await__()

    async def wait(self) -> OperationReport:
        """The report of a transfer that NIXL called DONE and the target was told of.

        Raises `TransferError`, `PeerLost`, `DeadlineExceeded`, `ChecksumMismatch`. Cancelling the wait cancels the
        operation. Safe from any event loop.
        """
        if asyncio.get_running_loop() is not self._loop:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.wait(), self._loop))
        await self._verdict.wait(self.cancel)
        return OperationReport(self._transfer.report(), self._wire_ms)

    @property
    def status(self) -> OperationStatus:
        """Where it is, in NIXL Connect's words."""
        if not self._verdict.is_decided:
            return OperationStatus.IN_PROGRESS
        error = self._verdict.error
        if error is None:
            return OperationStatus.COMPLETE
        return OperationStatus.CANCELLED if isinstance(error, TransferCancelled) else OperationStatus.ERRORED

    def cancel(self) -> None:
        """Post nothing further; the target hears when what was posted has drained."""
        error = TransferCancelled("the operation was cancelled", operation_id=self.metadata.operation_id)
        if asyncio._get_running_loop() is not self._loop:
            self._loop.call_soon_threadsafe(self._give_up, error)
        else:
            self._give_up(error)

    def start(self, transfer: Transfer) -> None:
        """Hand the transfer to the engine; its end comes by `on_transfer_end`, often before this returns."""
        self._transfer = transfer
        self._span.event("posted")
        self._lanes.engine.start(transfer)
        if not self._verdict.is_decided:
            remaining_s = self._claim.deadline.remaining_s
            self._timer = self._loop.call_later(remaining_s, self._on_lease_end, context=Context())

    def on_transfer_end(self) -> None:
        """NIXL will not touch the memory any more: tell the target, then our waiter."""
        self._wire_ms = (time.perf_counter() - self._started_s) * 1e3
        self._span.event("done")
        error = self._transfer.error
        if error is not None:
            error.peer, error.operation_id = self.metadata.worker_id, self.metadata.operation_id  # NIXL knew its agent
            self._conclude_failed(error)
        elif self.metadata.checksummed:
            self._lanes.conclusions.add(self._conclude_proved())
        else:
            self._conclude(None)

    async def _conclude_proved(self) -> None:
        try:
            ours = await checksum(self._ranges, self._memory.lease, self._memory.storage)
        except BaseException as failure:
            what = f"the checksum could not be computed: {type(failure).__name__}"
            self._conclude_failed(TransferError(what, operation_id=self.metadata.operation_id))
            raise
        theirs = self.metadata.checksum
        if self.metadata.kind is OperationKind.READABLE and not hmac.compare_digest(ours, theirs or b""):
            self._conclude_failed(
                ChecksumMismatch(
                    "the bytes that were read are not those that were granted",
                    peer=self.metadata.worker_id,
                    operation_id=self.metadata.operation_id,
                )
            )
        else:
            self._conclude(ours)

    def _conclude(self, proof: bytes | None) -> None:
        num_bytes = self._transfer.num_done_bytes
        self._claim.acknowledge(AckOutcome.COMPLETE, num_bytes, checksum=proof, span=self._span)
        self._memory.lease.unpin()
        if self._span.is_recording:
            self._span.set(_measured(self._transfer.report(), self._wire_ms))
            self._span.event("acknowledged")
        self._decide(None)
        self._span.end()

    def _conclude_failed(self, error: BusError) -> None:
        outcome = AckOutcome.FAILED if self._transfer.posted else AckOutcome.NEVER_POSTED
        if self._transfer.posted and isinstance(error, (DeadlineExceeded, TransferCancelled)):
            outcome = AckOutcome.DRAINED
        self._decide(error)
        self._claim.acknowledge(outcome, error=error, span=self._span)
        self._memory.lease.unpin()
        self._span.end()

    def _on_lease_end(self) -> None:
        self._give_up(
            DeadlineExceeded(
                "the transfer was not done before the lease ended", operation_id=self.metadata.operation_id
            )
        )

    def _give_up(self, error: BusError) -> None:
        if not self._verdict.is_decided:
            self._transfer.cancel()
            self._claim.drain()
            self._decide(error)

    def _decide(self, error: BusError | None) -> None:
        if self._verdict.is_decided:
            return
        if self._timer is not None:
            self._timer.cancel()
        if error is not None:
            self._span.fail(error)
        self._verdict.decide(error)

    async def __aenter__(self) -> "ActiveOperation":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class ReadOperation(ActiveOperation):
    """We read the target's memory into ours."""


class WriteOperation(ActiveOperation):
    """We write our memory into the target's."""


class Pairing(NamedTuple):
    """What pairs with a kind of grant."""

    direction: TransferDirection
    operation_type: type[ActiveOperation]
    span_name: str


PAIRINGS = {
    OperationKind.READABLE: Pairing(TransferDirection.READ, ReadOperation, "nixl.read"),
    OperationKind.WRITABLE: Pairing(TransferDirection.WRITE, WriteOperation, "nixl.write"),
}


async def begin(
    lanes: Lanes,
    kind: OperationKind,
    grant: RdmaMetadata | Claim,
    local: Any,
    on_progress: Progress | None = None,
) -> ActiveOperation:
    """Check, claim if need be, and start the one transfer that pairs with a grant of `kind`.

    Raises `WrongPairing`, `WrongLength`, `WrongLayout`, `ReadOnlyMemory`, `LeaseExpired` and what `claim` raises;
    nothing was posted then, and a claim that was ours is given back.
    """
    metadata = grant.metadata if isinstance(grant, Claim) else grant
    span = _span(lanes, PAIRINGS[kind], metadata)
    memory: LocalMemory | None = None
    try:
        memory = lanes.memory.hold(local)
        _check_pairing(metadata, kind, memory)
        if not isinstance(grant, Claim):
            if span.is_recording:
                span.event("handshake" if lanes.peers.known(metadata) is None else "peer known")
            grant = named_claim(lanes, metadata) or await claim(lanes, metadata)
            span.event("claimed")
        return _started(lanes, grant, memory, PAIRINGS[kind], span, on_progress)
    except BaseException as error:
        if memory is not None:
            memory.lease.unpin()
        if isinstance(grant, Claim):
            grant.release()
        span.fail(error)
        span.end()
        raise


def _started(
    lanes: Lanes, grant: Claim, memory: LocalMemory, pairing: Pairing, span: Span, on_progress: Progress | None
) -> ActiveOperation:
    metadata, peer = grant.metadata, grant.peer
    local = resolve(memory.extents, lanes.memory.regions)
    remote = resolve(metadata.memory, peer.regions, peer=peer.worker_id)
    plan = TransferPlan(
        pairing.direction,
        pair(local, remote),
        peer.agent_name,
        memory.num_bytes,
        (memory.device.memory_type, _memory_type(metadata.memory, peer.regions, peer.worker_id)),
    )
    post_until = Deadline(grant.deadline.at_s - LEASE_MARGIN_S)
    if post_until.expired:
        raise LeaseExpired("too little is left of the grant's lease", operation_id=metadata.operation_id)
    operation = pairing.operation_type(lanes, grant, memory, local, span)
    transfer = Transfer(plan, post_until, operation.on_transfer_end, on_progress)
    lanes.engine.check_room()
    grant.spend()
    operation.start(transfer)
    return operation


def _span(lanes: Lanes, pairing: Pairing, metadata: RdmaMetadata) -> Span:
    if not is_tracing():
        return NO_SPAN
    return start_span(
        pairing.span_name,
        attributes={
            names.NIXL_OPERATION: pairing.direction.value,
            names.NIXL_OPERATION_ID: metadata.operation_id,
            names.NIXL_BACKEND: lanes.engine.agent.backend,
            names.NIXL_AGENT_LOCAL: lanes.identity.worker_id,
            names.NIXL_AGENT_REMOTE: metadata.worker_id,
        },
    )


def _check_pairing(metadata: RdmaMetadata, kind: OperationKind, memory: LocalMemory) -> None:
    operation_id = metadata.operation_id
    if metadata.kind is not kind:
        raise WrongPairing(
            f"a {metadata.kind.value} grant does not pair with this operation, which needs a {kind.value} one",
            operation_id=operation_id,
        )
    num_bytes = metadata.num_bytes
    if num_bytes != memory.num_bytes:
        raise WrongLength(
            f"the local memory holds {memory.num_bytes:,} bytes and the grant {num_bytes:,}",
            operation_id=operation_id,
            num_bytes=memory.num_bytes,
        )
    ours, theirs = memory.layout, metadata.layout
    if ours is not None and theirs is not None and ours != theirs:
        raise WrongLayout(
            f"the local memory is {ours.dtype} {ours.shape} and the grant {theirs.dtype} {theirs.shape}",
            operation_id=operation_id,
        )
    if kind is OperationKind.READABLE and not memory.is_writable:
        raise ReadOnlyMemory("read-only memory can't be read into", operation_id=operation_id)
    if metadata.checksummed and memory.device.memory_type != "DRAM":
        raise LocalProtocolError("checksums are for host memory, and the grant wants one", operation_id=operation_id)


def _memory_type(extents: Sequence[MemoryExtent], regions: Mapping[int, Region], peer: str) -> str:
    types = {regions[extent.region].memory_type for extent in extents}
    if len(types) > 1:
        raise IncompatiblePeer("one operation can't mix host and device memory on one side", peer=peer)
    memory_type = types.pop()
    if memory_type not in MEMORY_TYPES:
        raise RemoteProtocolError(f"the peer's memory is {memory_type[:20]!r}", peer=peer)
    return memory_type


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
