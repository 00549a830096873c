"""The target of measurements: grants memory that nothing else uses.

In: a request for a grant. Out: the grant of one operation, named for whoever asked. One piece of memory is kept from
one operation of a size to the next, and given back when no further grant is asked for.
"""

import asyncio

from bus import ArenaTensor, Bus
from schemas.performance import PerformanceGrant, PerformanceGrantRequest
from workers.performance.memory import zeroed

LEASE_S = 30.0
RESERVED_FOR_S = 2.0
"""How long the memory stays reserved after the last grant of it."""


class PerformanceTarget:
    """Grants memory that nothing else uses: one piece, kept from one operation of a size to the next."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._reserved: ArenaTensor | None = None
        self._reserved_bytes = 0
        self._release: asyncio.TimerHandle | None = None

    async def grant(self, request: PerformanceGrantRequest) -> PerformanceGrant:
        """Grant it to the initiator. Raises `PoolExhausted`."""
        memory = (await self._reserve(request.num_bytes)).descriptor
        create = self._bus.create_writable if request.direction == "write" else self._bus.create_readable
        operation = await create(memory, name="perf", lease_s=LEASE_S, initiator=request.initiator, checksum=False)
        return PerformanceGrant(grant=operation.metadata)

    async def _reserve(self, num_bytes: int) -> ArenaTensor:
        if self._release is not None:
            self._release.cancel()
        if self._reserved is None or self._reserved_bytes != num_bytes:
            self._free()
            self._reserved, self._reserved_bytes = await zeroed(self._bus, num_bytes), num_bytes
        self._release = asyncio.get_running_loop().call_later(RESERVED_FOR_S, self._free)
        return self._reserved

    def _free(self) -> None:
        if self._reserved is not None:
            self._reserved.free()
        self._reserved = None
