"""The lanes that UCX takes to a target: an operation that another process of this worker carries out.

In: a writable grant of memory reserved for this. Out: UCX's own wording. It is claimed, written once and acked as any
other, and the ack goes out when the process is gone, whoever still waits: so the target's fence holds.
"""

import asyncio
import os

from bus.data_plane.addressing import resolve
from bus.data_plane.lane_probe import LaneProbe, write_apart
from bus.errors import (
    BusError,
    DataPlaneError,
    Draining,
    LeaseExpired,
    LocalProtocolError,
    TransferError,
    WrongPairing,
)
from bus.operations.claim import Claim, Lanes, claim, named_claim
from schemas.operations import AckOutcome, OperationKind, RdmaMetadata

MAX_PROBE_BYTES = 1 << 20
TIMEOUT_S = 20.0
"""Half a second is usual; a first import from a cold disk takes several."""
LEASE_MARGIN_S = 0.5
"""Kept of the lease, for the end of the process and the ack."""


async def lanes_to(lanes: Lanes, metadata: RdmaMetadata) -> str:
    """Write zeros into the granted memory and return the lanes they took.

    Raises `WrongPairing`, `LocalProtocolError`, `TransferError`, `DeadlineExceeded`, `DataPlaneError` when UCX does not
    say, and what `claim` raises. Cancelling the wait lets the write come to its end.
    """
    _check(metadata)
    async with named_claim(lanes, metadata) or await claim(lanes, metadata) as held:
        description = await lanes.peers.describe(metadata)
        regions = {region.region: region for region in description.regions}
        ranges = resolve(metadata.memory, regions, peer=metadata.worker_id)
        memory_type = regions[metadata.memory[0].region].memory_type
        probe = LaneProbe(description.agent_name, description.agent_metadata, memory_type, ranges, os.getpid())
        timeout_s = min(TIMEOUT_S, held.deadline.remaining_s - LEASE_MARGIN_S)
        if timeout_s <= 0:
            raise LeaseExpired("too little is left of the grant's lease", operation_id=metadata.operation_id)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        held.spend()
        lanes.conclusions.add(_conclude(held, probe, timeout_s, answer))
    return await answer


async def _conclude(held: Claim, probe: LaneProbe, timeout_s: float, answer: "asyncio.Future[str]") -> None:
    try:
        told = await asyncio.to_thread(write_apart, probe, timeout_s)
    except Exception as error:
        failure = error if isinstance(error, BusError) else TransferError(f"the probe failed: {type(error).__name__}")
        held.acknowledge(AckOutcome.FAILED, error=failure)
        if not answer.done():
            answer.set_exception(failure)
    else:
        held.acknowledge(AckOutcome.COMPLETE, probe.num_bytes)
        if told and not answer.done():
            answer.set_result(told)
        elif not answer.done():
            answer.set_exception(DataPlaneError("UCX's log does not name its lanes", peer=held.metadata.worker_id))
    finally:
        if not answer.done():
            answer.set_exception(Draining("the bus closed before the probe had ended"))
            answer.exception()  # perhaps nobody waits any more


def _check(metadata: RdmaMetadata) -> None:
    if metadata.kind is not OperationKind.WRITABLE:
        raise WrongPairing("the lanes to a peer are seen by a write", operation_id=metadata.operation_id)
    if len(metadata.memory) != 1 or metadata.num_bytes > MAX_PROBE_BYTES or metadata.checksummed:
        raise LocalProtocolError(
            f"the lanes to a peer are seen by a write of one piece, of up to {MAX_PROBE_BYTES:,} bytes, unchecked",
            operation_id=metadata.operation_id,
        )
