"""The target's table of operations: those that wait, and those whose memory is fenced.

In: memory to grant; claims, acks, answers to status queries and proofs of death from elsewhere. Out: operations, and
their ends. An ack that is nobody's, or not its initiator's, is counted and dropped: else any worker could complete
another's operation. Fenced memory is bounded: past the bound nothing more is granted and the worker is not ready.
"""

import asyncio
import hmac
import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from bus.data_plane.addressing import resolve
from bus.data_plane.checksum import checksum
from bus.data_plane.memory import LocalMemory, RegisteredMemory
from bus.data_plane.transfer_engine import TransferEngine
from bus.deadline import Deadline
from bus.errors import (
    BusError,
    ChecksumMismatch,
    DataPlaneError,
    Draining,
    LocalProtocolError,
    PeerLost,
    PoolExhausted,
    ReadOnlyMemory,
    StaleGrant,
)
from bus.handshake import statements
from bus.handshake.authentication import KeyRing
from bus.operations import dynamo
from bus.operations.conclusions import Conclusions
from bus.operations.target import ANONYMOUS, PassiveOperation, ReadableOperation, Seat, WritableOperation
from observability import semantic_conventions as names
from observability.active_span import NO_SPAN, Span
from observability.tracing import is_tracing, start_span
from schemas.operations import (
    MAX_CLAIMS,
    ClaimReply,
    ClaimRequest,
    CompletionAck,
    Initiator,
    OperationKind,
    OperationState,
    OperationStatusReply,
    OperationStatusRequest,
    RdmaMetadata,
)

MAX_GONE = 65_536
"""Ended workers that are remembered, so that nothing is granted to them."""

_LOG = logging.getLogger(__name__)

AskInitiator = Callable[[OperationStatusRequest], Awaitable[OperationStatusReply | None]]
"""Sends a status query; None when nobody answered, which proves nothing."""


class GrantTerms(NamedTuple):
    """What a grant says besides its memory."""

    kind: OperationKind
    deadline: Deadline
    name: str = "nixl"
    """Of the wait's span."""
    initiator: Initiator | None = None
    max_claims: int = 1
    checksum: bool = False
    allow_unauthenticated: bool = False
    """For an initiator that has no bus, and proves nothing."""


class QuarantineBound(NamedTuple):
    """How much memory may be fenced before the worker stops granting."""

    num_bytes: int
    num_operations: int


class Grants:
    """The table; a `target.Listener`. Of one event loop."""

    def __init__(
        self,
        identity: Initiator,
        memory: RegisteredMemory,
        bound: QuarantineBound,
        ask_initiator: AskInitiator,
        conclusions: Conclusions,
        engine: TransferEngine,
        keys: KeyRing,
    ) -> None:
        self._identity = identity
        self._memory = memory
        self._bound = bound
        self._ask_initiator = ask_initiator
        self._conclusions = conclusions
        self._engine = engine
        self._keys = keys
        self._is_closed = False
        self._serials: Counter[Initiator] = Counter()
        self._gone: OrderedDict[Initiator, None] = OrderedDict()
        self._notified_by: dict[bytes, PassiveOperation] = {}
        self._operations: dict[str, PassiveOperation] = {}
        self._asked: set[str] = set()
        self.overrun: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolves, with the numbers, when more is fenced than the bound allows."""
        self.num_quarantined = 0
        self.quarantined_bytes = 0
        self.num_dropped_acks = 0
        self.num_recovered_acks = 0
        """Acks that a status query brought back."""

    @property
    def num_open(self) -> int:
        """Operations whose memory somebody else may touch."""
        return len(self._operations)

    async def create(self, local: Any, terms: GrantTerms) -> PassiveOperation:
        """Grant memory.

        Raises what `RegisteredMemory.hold` raises, `LocalProtocolError`, `ReadOnlyMemory`, `PeerLost` for an initiator
        that is gone, and `PoolExhausted` when too much is fenced.
        """
        memory = self._memory.hold(local)
        try:
            self._check(memory, terms)
            proof = None
            if terms.checksum and terms.kind is OperationKind.READABLE:
                ranges = resolve(memory.extents, self._memory.regions)
                proof = await checksum(ranges, memory.lease, memory.storage)
                self._check(memory, terms)  # what may have changed meanwhile
            operation = self._add(self._metadata(memory, terms, proof), memory, terms)
        except BaseException:
            memory.lease.unpin()
            raise
        if terms.allow_unauthenticated:
            try:
                self._invite(operation)
            except BaseException:
                operation.revoke(ANONYMOUS)  # nobody was told of it
                raise
        return operation

    def claim(self, request: ClaimRequest) -> ClaimReply:
        """Answer an initiator's claim.

        Raises `AuthenticationError`, and `StaleGrant` for a grant that is unknown, taken, or of another epoch.
        """
        operation_id, initiator = request.operation_id, request.initiator
        if request.epoch != self._identity.epoch:
            raise StaleGrant("the grant is of another epoch", operation_id=operation_id)
        operation = self._operations.get(operation_id)
        if operation is None:
            raise StaleGrant("no such grant: it ended, or never was", operation_id=operation_id)
        statements.check_claim(self._keys, request, operation.metadata)
        if operation.metadata.token is not None:
            raise StaleGrant("the grant is named, and needs no claim", operation_id=operation_id)
        if initiator in self._gone:
            raise StaleGrant("the initiator is known to be gone", operation_id=operation_id)
        tokens = statements.claim_tokens(self._keys, operation_id, request.epoch, initiator)
        return operation.claim(initiator, tokens)

    def acknowledge(self, ack: CompletionAck, headers: Mapping[str, str] | None = None) -> None:
        """Hand an ack to its operation; one that is nobody's is counted and dropped."""
        operation = self._operations.get(ack.operation_id)
        if operation is None or not operation.acknowledge(ack, headers):
            self.num_dropped_acks += 1
            _LOG.info("an ack for operation %s from %s was dropped", ack.operation_id, ack.initiator.worker_id)

    def notified(self, payload: bytes) -> None:
        """A peer's NIXL notification: who knows an invitation's key has done what it invites to."""
        operation = self._notified_by.get(payload)
        if operation is not None:
            operation.notified()

    def initiator_gone(self, initiator: Initiator) -> None:
        """A process is proved to be gone, or its epoch drained: end its claims and free what they fenced."""
        self._gone[initiator] = None
        self._serials.pop(initiator, None)
        if len(self._gone) > MAX_GONE:
            self._gone.popitem(last=False)
        for operation in list(self._operations.values()):
            operation.initiator_gone(initiator)

    def cancel_all(self) -> None:
        """Answer every waiter, and ask nobody any more; for shutdown."""
        self._is_closed = True
        for operation in list(self._operations.values()):
            operation.cancel()
            operation.stop_asking()

    def quarantined(self, operation: PassiveOperation, is_so: bool) -> None:
        """Count fenced memory; see `Listener`."""
        self.num_quarantined += 1 if is_so else -1
        self.quarantined_bytes += operation.memory.num_bytes if is_so else -operation.memory.num_bytes
        if self.is_overrun and not self.overrun.done():
            self.overrun.set_result(self._overrun_text())

    def freed(self, operation: PassiveOperation) -> None:
        """Forget an operation; see `Listener`."""
        self._operations.pop(operation.metadata.operation_id, None)
        if operation.invitation:
            del self._notified_by[(operation.metadata.token or b"").hex().encode()]
            self._engine.expect_notifications(-1)

    def ask(self, operation: PassiveOperation, initiator: Initiator) -> None:
        """Ask an initiator what became of an operation, once at a time; see `Listener`."""
        key = f"{operation.metadata.operation_id}.{initiator.worker_id}"
        if key not in self._asked:
            self._asked.add(key)
            self._conclusions.add(self._ask(operation, initiator, key))

    def verify(self, operation: PassiveOperation, seat: Seat, ack: CompletionAck) -> None:
        """Hold the bytes against the ack's checksum, off the loop; see `Listener`."""
        self._conclusions.add(self._verify(operation, seat, ack))

    @property
    def is_overrun(self) -> bool:
        """Whether more is fenced than the bound allows."""
        return self.quarantined_bytes > self._bound.num_bytes or self.num_quarantined > self._bound.num_operations

    def _overrun_text(self) -> str:
        return (
            f"{self.quarantined_bytes:,} bytes of {self.num_quarantined} operations are fenced, for peers that may "
            f"still write; the bound is {self._bound.num_bytes:,} bytes and {self._bound.num_operations} operations"
        )

    def _check(self, memory: LocalMemory, terms: GrantTerms) -> None:
        if self._is_closed:
            raise Draining("the bus is closing and grants nothing more")
        if terms.deadline.expired:
            raise LocalProtocolError("a grant needs time: its deadline has passed")
        if terms.kind is OperationKind.WRITABLE and not memory.is_writable:
            raise ReadOnlyMemory("read-only memory can't be granted for writing", num_bytes=memory.num_bytes)
        if not 1 <= terms.max_claims <= MAX_CLAIMS:
            raise LocalProtocolError(f"max_claims is {terms.max_claims}; it can be 1 to {MAX_CLAIMS}")
        if terms.max_claims > 1 and (terms.kind is OperationKind.WRITABLE or terms.initiator):
            raise LocalProtocolError(
                "several claims are for open, readable grants: two writers of one memory would mix their bytes",
                remedy="create one writable operation for each writer",
            )
        if terms.initiator is not None and terms.initiator in self._gone:
            raise PeerLost("the grant's initiator is known to be gone", peer=terms.initiator.worker_id)
        if terms.allow_unauthenticated and (terms.checksum or terms.initiator or terms.max_claims > 1):
            raise LocalProtocolError("a grant for initiators without a bus has no checksum, name or several claims")
        if terms.checksum and memory.device.memory_type != "DRAM":
            raise LocalProtocolError("checksums are for host memory", remedy="leave checksum off for device memory")
        if self.is_overrun:
            raise PoolExhausted(self._overrun_text(), remedy="restart the worker, or find the peers that hang")

    def _metadata(self, memory: LocalMemory, terms: GrantTerms, proof: bytes | None) -> RdmaMetadata:
        named = ANONYMOUS if terms.allow_unauthenticated else terms.initiator
        if named is not None:
            self._serials[named] += 1
        metadata = RdmaMetadata(
            operation_id=secrets.token_hex(8),
            kind=terms.kind,
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            memory=list(memory.extents),
            lease_ms=max(1, terms.deadline.remaining_ms),
            initiator=named,
            serial=self._serials[named] if named else 0,
            layout=memory.layout,
            max_claims=terms.max_claims,
            checksummed=terms.checksum,
            checksum=proof,
        )
        if named is None:
            return metadata
        msgspec.structs.force_setattr(metadata, "token", statements.grant_token(self._keys, metadata))  # not out yet
        return metadata

    def _add(self, metadata: RdmaMetadata, memory: LocalMemory, terms: GrantTerms) -> PassiveOperation:
        operation_type = ReadableOperation if terms.kind is OperationKind.READABLE else WritableOperation
        operation = operation_type(metadata, memory, terms.deadline, _wait_span(metadata, memory, terms), self)
        self._operations[metadata.operation_id] = operation
        return operation

    def _invite(self, operation: PassiveOperation) -> None:
        key = (operation.metadata.token or b"").hex()
        operation.invitation = dynamo.invitation(
            self._engine.agent, self._memory, operation.memory, operation.metadata.kind, key
        )
        self._notified_by[key.encode()] = operation
        self._engine.expect_notifications(1)

    async def _ask(self, operation: PassiveOperation, initiator: Initiator, key: str) -> None:
        request = OperationStatusRequest(
            operation_id=operation.metadata.operation_id,
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            initiator=initiator,
            nonce=secrets.token_bytes(16),
            serial=operation.metadata.serial,
        )
        request = statements.status_request(self._keys, request)
        try:
            reply = await self._ask_initiator(request)
        finally:
            self._asked.discard(key)
        if reply is None or reply.initiator != initiator:  # silence, or another epoch, proves nothing
            return
        if not statements.is_status_proved(self._keys, request, reply):
            _LOG.warning("what became of %s was said without proof", request.operation_id)
        elif reply.state is OperationState.REFUSED:
            operation.revoke(initiator)
        elif reply.ack is not None and operation.acknowledge(reply.ack, None):
            self.num_recovered_acks += 1

    async def _verify(self, operation: PassiveOperation, seat: Seat, ack: CompletionAck) -> None:
        error: BusError | None = None
        try:
            memory = operation.memory
            ours = await checksum(resolve(memory.extents, self._memory.regions), memory.lease, memory.storage)
        except BaseException as failure:
            error = DataPlaneError(
                f"the checksum could not be computed: {type(failure).__name__}", operation_id=ack.operation_id
            )
            operation.conclude(seat, ack, error)
            raise
        if ack.checksum is None or not hmac.compare_digest(ours, ack.checksum):
            error = ChecksumMismatch(
                "the bytes that arrived are not those that were sent",
                peer=ack.initiator.worker_id,
                operation_id=ack.operation_id,
            )
        operation.conclude(seat, ack, error)


def _wait_span(metadata: RdmaMetadata, memory: LocalMemory, terms: GrantTerms) -> Span:
    if not is_tracing():
        return NO_SPAN
    return start_span(
        f"{terms.name}.{terms.kind.value}",
        attributes={
            names.NIXL_OPERATION_ID: metadata.operation_id,
            names.NIXL_OPERATION_GRANTED_BYTES: memory.num_bytes,
        },
    )
