"""Operations with peers that speak NVIDIA Dynamo's `nixl_connect`, and have no bus: no claim, no ack, no proof.

In: a Dynamo target's metadata, or memory that a Dynamo initiator may touch. Out: the same operations as elsewhere, with
weaker promises, so that both ways are off unless the caller allows them:
- NIXL is handed agent metadata that nobody signed, which can crash the process.
- A Dynamo initiator is told of our memory by raw address, can't be asked for its state, and is nobody whose death could
  be proved: after a cancel or the lease the memory stays fenced until its notification comes, perhaps for ever.
- Completion is its NIXL notification, which says nothing of how many bytes moved; while one is awaited the owner thread
  polls for it. Each operation that Dynamo initiates leaks a socket in both processes, by its own disconnecting.
"""

import asyncio
import secrets
from typing import Any

from bus.data_plane.addressing import AddressRange, pair, resolve
from bus.data_plane.agent import NixlAgent
from bus.data_plane.descriptor import Device
from bus.data_plane.memory import LocalMemory, RegisteredMemory
from bus.data_plane.transfer import Transfer, TransferPlan
from bus.deadline import Deadline
from bus.errors import (
    DeadlineExceeded,
    IncompatiblePeer,
    ReadOnlyMemory,
    RemoteProtocolError,
    WrongLength,
    WrongPairing,
)
from bus.operations.claim import Lanes
from bus.operations.initiator import PAIRINGS, ActiveOperation, Progress
from observability.active_span import NO_SPAN, Span
from schemas.codec import MessageError
from schemas.dynamo import READ, WRITE, DynamoDescriptor, DynamoMetadata, packed_agent_metadata
from schemas.operations import AckOutcome, OperationKind, RdmaMetadata

_KINDS = {READ: OperationKind.READABLE, WRITE: OperationKind.WRITABLE}


def invitation(agent: NixlAgent, regions: RegisteredMemory, memory: LocalMemory, kind: OperationKind, key: str) -> str:
    """The JSON by which a Dynamo initiator may act on `memory`; it discloses the regions that this memory lies in."""
    ranges = resolve(memory.extents, regions.regions)
    device = memory.device
    numbers = sorted({extent.region for extent in memory.extents})
    registered = [regions.regions[number] for number in numbers]
    metadata = agent.partial_metadata(
        device.memory_type, [AddressRange(region.address, region.length_bytes, device.id) for region in registered]
    )
    name = device.kind.value if device.memory_type == "DRAM" else f"{device.kind.value}:{device.id}"
    return DynamoMetadata(
        descriptors=[DynamoDescriptor(name, part.address, part.length_bytes) for part in ranges],
        nixl_metadata=packed_agent_metadata(metadata),
        notification_key=key,
        operation_kind=READ if kind is OperationKind.READABLE else WRITE,
    ).to_json()


class _Unacknowledged:
    """Stands for a claim towards a target that takes no ack: its NIXL notification goes with the last bytes."""

    def __init__(self, metadata: RdmaMetadata, deadline: Deadline) -> None:
        self.metadata = metadata
        self.deadline = deadline

    def drain(self) -> None:
        """The target can't be told."""

    def acknowledge(
        self,
        outcome: AckOutcome,
        num_bytes: int = 0,
        *,
        error: BaseException | None = None,
        checksum: bytes | None = None,
        span: Span = NO_SPAN,
    ) -> None:
        """The target can't be told."""


async def begin(
    lanes: Lanes,
    kind: OperationKind,
    invited: DynamoMetadata,
    data: Any,
    lease_s: float,
    on_progress: Progress | None = None,
) -> ActiveOperation:
    """Start the transfer that a Dynamo target invites to.

    Raises `WrongPairing`, `WrongLength`, `ReadOnlyMemory`, `RemoteProtocolError`, `PeerLost`; nothing was posted then.
    """
    deadline = Deadline.after(lease_s)
    memory = lanes.memory.hold(data)
    try:
        _check(kind, invited, memory)
        remote_type, remote = _remote(invited)
        try:
            agent_metadata = invited.agent_metadata()
        except MessageError as error:
            raise RemoteProtocolError(str(error)) from None
        try:
            async with asyncio.timeout(deadline.remaining_s):
                peer = await lanes.engine.call(lambda: lanes.engine.agent.load_peer(agent_metadata))
        except TimeoutError:
            raise DeadlineExceeded("NIXL did not take the peer's agent metadata in time") from None
        local = resolve(memory.extents, lanes.memory.regions)
        types = (memory.device.memory_type, remote_type)
        pairing = PAIRINGS[kind]
        plan = TransferPlan(
            pairing.direction, pair(local, remote), peer, memory.num_bytes, types, invited.notification_key
        )
        metadata = RdmaMetadata(
            operation_id=secrets.token_hex(8), kind=kind, worker_id=peer, epoch="", memory=[], lease_ms=1
        )
        operation = pairing.operation_type(lanes, _Unacknowledged(metadata, deadline), memory, local, NO_SPAN)
        lanes.engine.check_room()
        operation.start(Transfer(plan, deadline, operation.on_transfer_end, on_progress))
    except BaseException:
        memory.lease.unpin()
        raise
    return operation


def _check(kind: OperationKind, invited: DynamoMetadata, memory: LocalMemory) -> None:
    if _KINDS[invited.operation_kind] is not kind:
        raise WrongPairing(f"Dynamo's metadata invites to {'read' if invited.operation_kind == READ else 'write'}")
    if invited.num_bytes != memory.num_bytes:
        raise WrongLength(
            f"the local memory holds {memory.num_bytes:,} bytes and Dynamo's target {invited.num_bytes:,}",
            num_bytes=memory.num_bytes,
        )
    if kind is OperationKind.READABLE and not memory.is_writable:
        raise ReadOnlyMemory("read-only memory can't be read into")


def _remote(invited: DynamoMetadata) -> tuple[str, list[AddressRange]]:
    devices = {Device(descriptor.device) for descriptor in invited.descriptors}
    if len(devices) > 1:
        raise IncompatiblePeer("one operation can't mix devices on one side")
    device = devices.pop()
    return device.memory_type, [AddressRange(part.ptr, part.size, device.id) for part in invited.descriptors]
