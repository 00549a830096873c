"""A claim: the initiator asks for an open grant before it posts anything, and owes one ack from then on.

In: a target's `RdmaMetadata`. Out: a `Claim`, which one transfer spends; or, unspent, an ack that says so, so that the
target's memory is free at once. `PendingClaim` is one on its way beside other work. Every claim is entered among the
initiator's undertakings before the target hears of it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable
from contextvars import Context
from dataclasses import dataclass

from bus.control_plane.call import Caller
from bus.control_plane.connection import Connection
from bus.data_plane.memory import RegisteredMemory
from bus.data_plane.transfer_engine import TransferEngine
from bus.deadline import Deadline
from bus.errors import (
    BusError,
    ConnectionLost,
    DeadlineExceeded,
    ForeignGrant,
    LeaseExpired,
    LocalProtocolError,
    RemoteFault,
    StaleGrant,
    fault_of,
)
from bus.handshake import statements
from bus.handshake.authentication import KeyRing
from bus.handshake.exchange import Peer, Peers
from bus.operations.conclusions import Conclusions
from bus.operations.lifecycle import InitiatorEvent, InitiatorState
from bus.operations.undertakings import Undertaking, Undertakings
from observability.active_span import NO_SPAN, Span
from observability.propagation import inject
from schemas.codec import encode
from schemas.fault import FaultCode
from schemas.operations import AckOutcome, ClaimReply, CompletionAck, Initiator, RdmaMetadata
from schemas.subjects import Subjects

CLAIM_ENDPOINT = "claim"
CLAIM_RETRY_S = 2.0
"""A claim without an answer is sent again: the target gives the same initiator the same token."""

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
    undertakings: Undertakings
    conclusions: Conclusions
    keys: KeyRing
    loop: asyncio.AbstractEventLoop


class Claim:
    """A grant that is ours: made by `claim`, spent by one transfer.

    An async context manager: leaving it unspent tells the target that nothing was posted, so that it can free its
    memory at once.
    """

    __slots__ = ("_lanes", "_token", "_undertaking", "deadline", "metadata", "peer", "timer")

    def __init__(
        self,
        lanes: Lanes,
        metadata: RdmaMetadata,
        peer: Peer,
        token: bytes,
        deadline: Deadline,
        undertaking: Undertaking,
    ) -> None:
        self.metadata = metadata
        self.peer = peer
        self.deadline = deadline
        self._lanes = lanes
        self._token = token
        self._undertaking = undertaking
        undertaking.release = self.release
        self.timer: asyncio.TimerHandle | None = None
        """Gives it back at the end of its lease, if it is never used."""

    @property
    def is_spent(self) -> bool:
        """Whether a transfer has used it, or it was given back."""
        return self._undertaking.state is not InitiatorState.HELD

    def spend(self) -> None:
        """Mark it used: from now on whoever spends it owes the ack. Raises `LocalProtocolError` the second time."""
        if self.is_spent:
            raise LocalProtocolError("the claim was used already", operation_id=self.metadata.operation_id)
        self._undertaking.move(InitiatorEvent.POST)

    def drain(self) -> None:
        """Nothing further will be posted; the ack comes when NIXL is done."""
        self._undertaking.move(InitiatorEvent.CANCEL)

    def acknowledge(
        self,
        outcome: AckOutcome,
        num_bytes: int = 0,
        *,
        error: BaseException | None = None,
        checksum: bytes | None = None,
        span: Span = NO_SPAN,
    ) -> None:
        """Publish the terminal ack; it is remembered, so that a status query gets it if it is lost."""
        lanes = self._lanes
        ack = CompletionAck(
            operation_id=self.metadata.operation_id,
            outcome=outcome,
            initiator=lanes.identity,
            token=self._token,
            num_bytes=num_bytes,
            fault=fault_of(error, worker_id=lanes.identity.worker_id) if error else None,
            checksum=checksum,
        )
        self._undertaking.ack = ack
        if self.timer is not None:
            self.timer.cancel()
        self._undertaking.release = None  # or the two would keep each other, and what was moved, alive
        self._undertaking.move(InitiatorEvent.END)
        headers: dict[str, str] | None = None
        if span.is_recording:
            inject(headers := {}, span)
        subject = self.peer.ack_prefix + self.metadata.operation_id  # of hex digits, by its type
        try:
            lanes.connection.publish_now(subject, encode(ack), headers=headers)
        except BusError as failure:
            _LOG.warning("the ack of operation %s could not be sent: %s", ack.operation_id, failure)

    def release(self) -> None:
        """Give an unspent claim back; from any thread."""
        home = self._lanes.loop
        if asyncio._get_running_loop() is not home:
            home.call_soon_threadsafe(self.release)
        elif not self.is_spent:
            self._undertaking.move(InitiatorEvent.CANCEL)
            self.acknowledge(AckOutcome.NEVER_POSTED)

    async def __aenter__(self) -> "Claim":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()


def named_claim(lanes: Lanes, metadata: RdmaMetadata) -> Claim | None:
    """Take up a named grant of a peer that is known: the usual case, in which nobody is asked anything.

    None for every other grant: `claim` it. Raises `StaleGrant`, `ForeignGrant`, `LeaseExpired`.
    """
    if metadata.token is None or (peer := lanes.peers.known(metadata)) is None:
        return None
    deadline = _deadline(lanes, metadata)
    statements.check_grant(lanes.keys, metadata)
    return Claim(lanes, metadata, peer, metadata.token, deadline, lanes.undertakings.begin(metadata))


async def claim(lanes: Lanes, metadata: RdmaMetadata) -> Claim:
    """Make an open grant ours, or take up a named one; the target's agent is known to NIXL then.

    Raises `StaleGrant` (taken, ended, used before, another epoch), `ForeignGrant` (it names another initiator),
    `LeaseExpired`, `NoResponders` if the target is gone, and what the handshake raises. Cancelled, it gives back what
    the target may have granted meanwhile.
    """
    deadline = _deadline(lanes, metadata)
    if metadata.token is not None:
        statements.check_grant(lanes.keys, metadata)
    undertaking = lanes.undertakings.begin(metadata)
    try:
        peer = lanes.peers.known(metadata)
        if peer is None:
            async with asyncio.timeout(deadline.remaining_s):
                peer = await lanes.peers.ensure(metadata)
    except BaseException as error:
        _give_up(lanes, metadata, undertaking)
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded("the handshake took longer than the lease", peer=metadata.worker_id) from None
        raise
    if metadata.token is not None:
        return _timed(lanes, Claim(lanes, metadata, peer, metadata.token, deadline, undertaking))
    try:
        return _timed(lanes, await _ask(lanes, metadata, peer, deadline, undertaking))
    except asyncio.CancelledError:
        lanes.conclusions.add(_give_back(_ask(lanes, metadata, peer, deadline, undertaking)))  # once more, to let go
        raise


def _timed(lanes: Lanes, held: Claim) -> Claim:
    """See that a claim that is never spent goes back at the end of its lease."""
    remaining_s = max(0.0, held.deadline.remaining_s)
    held.timer = lanes.loop.call_later(remaining_s, held.release, context=Context())
    if lanes.undertakings.is_closed:  # it was asked for before, and nobody will use it
        held.release()
    return held


def _deadline(lanes: Lanes, metadata: RdmaMetadata) -> Deadline:
    deadline = Deadline.at(metadata.received_at_s + metadata.lease_ms / 1000)
    if deadline.expired:
        raise LeaseExpired("the grant's lease is over", peer=metadata.worker_id, operation_id=metadata.operation_id)
    if metadata.token is not None and metadata.initiator != lanes.identity:
        raise ForeignGrant("the grant names another initiator", operation_id=metadata.operation_id)
    return deadline


def _give_up(lanes: Lanes, metadata: RdmaMetadata, undertaking: Undertaking) -> None:
    """End what never came to a claim; whoever named us is told, so that its memory is free at once."""
    undertaking.move(InitiatorEvent.CANCEL)
    if metadata.token is None:
        lanes.undertakings.forget(undertaking)
        return
    undertaking.ack = CompletionAck(
        operation_id=metadata.operation_id,
        outcome=AckOutcome.NEVER_POSTED,
        initiator=lanes.identity,
        token=metadata.token,
    )
    try:
        subject = lanes.subjects.ack(metadata.worker_id, metadata.operation_id)
        lanes.connection.publish_now(subject, encode(undertaking.ack))
    except BusError as failure:
        _LOG.debug("the ack of operation %s could not be sent: %s", metadata.operation_id, failure)


async def _ask(lanes: Lanes, metadata: RdmaMetadata, peer: Peer, deadline: Deadline, undertaking: Undertaking) -> Claim:
    request = statements.claim_request(lanes.keys, metadata, lanes.identity)
    subject = lanes.subjects.worker(metadata.worker_id, CLAIM_ENDPOINT)
    try:
        while True:
            timeout_s = max(0.001, min(CLAIM_RETRY_S, deadline.remaining_s))
            asked_at_s = time.monotonic()
            try:
                reply = await lanes.caller.ask_peer(subject, request, ClaimReply, timeout_s=timeout_s)
                break
            except (DeadlineExceeded, ConnectionLost):
                if deadline.remaining_s < CLAIM_RETRY_S / 10:
                    raise
                await asyncio.sleep(CLAIM_RETRY_S / 20)
    except RemoteFault as refusal:
        undertaking.move(InitiatorEvent.CANCEL)
        if refusal.fault.code == FaultCode.STALE_GRANT:
            raise StaleGrant(
                refusal.fault.message, peer=metadata.worker_id, operation_id=metadata.operation_id
            ) from None
        raise
    except asyncio.CancelledError:
        raise  # who is cancelled asks again, to give back what the target may have granted
    except BaseException:
        undertaking.move(InitiatorEvent.CANCEL)  # from now on a query is told that nothing was posted
        raise
    token = statements.claim_tokens(lanes.keys, metadata.operation_id, metadata.epoch, lanes.identity)[0]
    until = Deadline(min(deadline.at_s, asked_at_s + reply.lease_ms / 1000))  # as if the answer had taken no time
    return Claim(lanes, metadata, peer, token, until, undertaking)


async def _give_back(claiming: Awaitable[Claim]) -> None:
    """Never cancelled: a claim that the target granted and we forgot would fence its memory past the lease."""
    try:
        (await claiming).release()
    except BusError as error:
        _LOG.debug("a claim that nobody waits for ended: %s", error)


class PendingClaim:
    """A claim on its way, beside other work. An async context manager; leaving it gives an unspent claim back."""

    def __init__(self, lanes: Lanes, metadata: RdmaMetadata) -> None:
        if asyncio.get_running_loop() is not lanes.loop:
            raise LocalProtocolError("claim_ahead is for the event loop of the bus", remedy="await bus.claim instead")
        self._lanes = lanes
        self._claiming = asyncio.create_task(claim(lanes, metadata))

    async def granted(self) -> Claim:
        """The claim, when it is there. Raises what `claim` raises."""
        return await asyncio.shield(self._claiming)

    async def __aenter__(self) -> "PendingClaim":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._lanes.conclusions.add(_give_back(self._claiming))
