"""A claim: the initiator asks for an open grant before it posts anything, and owes one ack from then on.

In: a target's `RdmaMetadata`. Out: a `Claim`, which one transfer spends; or, unspent, an ack that says so, so that the
target's memory is free at once. `PendingClaim` is one on its way beside other work.
"""

import asyncio
import logging
from dataclasses import dataclass

from bus.control_plane.call import Caller
from bus.control_plane.connection import Connection
from bus.data_plane.memory import RegisteredMemory
from bus.data_plane.transfer import TransferEngine
from bus.deadline import Deadline
from bus.errors import BusError, LocalProtocolError, StaleGrant, fault_of
from bus.handshake.exchange import Peer, Peers
from bus.operations.conclusions import Conclusions
from observability.active_span import Span
from observability.propagation import inject
from schemas.codec import encode
from schemas.operations import AckOutcome, ClaimReply, ClaimRequest, CompletionAck, Initiator, RdmaMetadata
from schemas.subjects import Subjects

CLAIM_ENDPOINT = "claim"

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lanes:
    """What an initiator works with: this worker's half of both planes."""

    identity: Initiator
    subjects: Subjects
    connection: Connection
    caller: Caller
    peers: Peers
    memory: RegisteredMemory
    engine: TransferEngine
    conclusions: Conclusions


class Claim:
    """A grant that is ours: made by `claim`, spent by one transfer.

    An async context manager: leaving it unspent tells the target that nothing was posted, so that it can free its
    memory at once.
    """

    def __init__(self, lanes: Lanes, metadata: RdmaMetadata, peer: Peer, token: bytes, deadline: Deadline) -> None:
        self.metadata = metadata
        self.peer = peer
        self.deadline = deadline
        self._lanes = lanes
        self._token = token
        self._spent = False

    def spend(self) -> None:
        """Mark it used: from now on whoever spends it owes the ack. Raises `LocalProtocolError` the second time."""
        if self._spent:
            raise LocalProtocolError("the claim was used already", operation_id=self.metadata.operation_id)
        self._spent = True

    async def acknowledge(
        self,
        outcome: AckOutcome,
        num_bytes: int = 0,
        error: BaseException | None = None,
        span: Span | None = None,
    ) -> None:
        """Publish the terminal ack."""
        lanes = self._lanes
        ack = CompletionAck(
            operation_id=self.metadata.operation_id,
            outcome=outcome,
            initiator=lanes.identity,
            token=self._token,
            num_bytes=num_bytes,
            fault=fault_of(error, worker_id=lanes.identity.worker_id) if error else None,
        )
        headers: dict[str, str] = {}
        if span is not None:
            inject(headers, span)
        subject = lanes.subjects.ack(self.metadata.worker_id, self.metadata.operation_id)
        await lanes.connection.publish(subject, encode(ack), headers=headers)

    async def release(self) -> None:
        """Give an unspent claim back."""
        if not self._spent:
            self._spent = True
            await self.acknowledge(AckOutcome.NEVER_POSTED)

    async def __aenter__(self) -> "Claim":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.release()


async def claim(lanes: Lanes, metadata: RdmaMetadata) -> Claim:
    """Make an open grant ours, or take up a named one; the target's agent is known to NIXL then.

    Raises `StaleGrant` (taken, ended, another epoch, another initiator), `NoResponders` if the target is gone, and
    what the handshake raises. Cancelled, it gives back what the target may have granted meanwhile.
    """
    deadline = Deadline.after(metadata.lease_ms / 1000)
    peer = await lanes.peers.ensure(metadata.worker_id, metadata.epoch)
    if metadata.token is not None:
        if metadata.initiator != lanes.identity:
            raise StaleGrant("the grant names another initiator", operation_id=metadata.operation_id)
        return Claim(lanes, metadata, peer, metadata.token, deadline)
    claiming = asyncio.create_task(_ask(lanes, metadata, peer, deadline))
    try:
        return await asyncio.shield(claiming)
    except asyncio.CancelledError:
        lanes.conclusions.add(_give_back(claiming))
        raise


async def _ask(lanes: Lanes, metadata: RdmaMetadata, peer: Peer, deadline: Deadline) -> Claim:
    reply = await lanes.caller.request(
        lanes.subjects.worker(metadata.worker_id, CLAIM_ENDPOINT),
        ClaimRequest(operation_id=metadata.operation_id, epoch=metadata.epoch, initiator=lanes.identity),
        ClaimReply,
        timeout_s=max(0.001, deadline.remaining_s),
        traced=False,
    )
    return Claim(lanes, metadata, peer, reply.token, Deadline.after(reply.lease_ms / 1000))


async def _give_back(claiming: "asyncio.Task[Claim]") -> None:
    """Never cancelled: a claim that the target granted and we forgot would fence its memory past the lease."""
    try:
        await (await claiming).release()
    except BusError as error:
        _LOG.debug("a claim that nobody waits for ended: %s", error)


class PendingClaim:
    """A claim on its way, beside other work. An async context manager; leaving it gives an unspent claim back."""

    def __init__(self, lanes: Lanes, metadata: RdmaMetadata) -> None:
        self._lanes = lanes
        self._claiming = asyncio.create_task(claim(lanes, metadata))

    async def granted(self) -> Claim:
        """The claim, when it is there. Raises what `claim` raises."""
        return await asyncio.shield(self._claiming)

    async def __aenter__(self) -> "PendingClaim":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._lanes.conclusions.add(_give_back(self._claiming))
