"""The initiator of measurements.

In: a `PerformanceRequest`. Out: a `PerformanceReport`. Each operation is a whole paired one, on the bus and the NIXL
agent that the worker's own requests use, one after the other. They are not traced: thousands of spans would cost what
they measure, and drown the others. Sizes, bytes and time are bounded.
"""

import secrets
import time

from bus import ArenaTensor, Bus, BusError, Deadline, NoResponders, PoolExhausted, RemoteFault, RequestRefused
from observability.propagation import extract
from observability.tracing import SpanScope, span
from schemas.fault import FaultCode
from schemas.operations import Initiator, RdmaMetadata
from schemas.performance import (
    GRANT_ENDPOINT,
    Direction,
    PerformanceGrant,
    PerformanceGrantRequest,
    PerformanceReport,
    PerformanceRequest,
    PerformanceRow,
    SkippedSize,
)
from workers.performance.memory import zeroed
from workers.performance.row import Sample, row_of, sample_of

LANES_BYTES = 4096
"""Of the write that shows the lanes."""
MAX_TOTAL_BYTES = 1 << 40
OPERATION_TIMEOUT_S = 30.0
"""Of one operation, from the request for its grant."""


class PerformanceInitiator:
    """Measures, one operation after the other."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._identity = Initiator(worker_id=bus.worker_id, epoch=bus.epoch)

    async def measure(self, request: PerformanceRequest) -> PerformanceReport:
        """Measure every size in turn; one that an arena has no room for, or that no time is left for, is skipped.

        Raises `RequestRefused` for a measurement of a worker with itself, or of too much; `NoResponders` if the target
        is not there; `PoolExhausted`, or the target's fault of that, if no size could be measured; and what an
        operation raises.
        """
        self._check(request)
        until = Deadline.after(request.time_limit_ms / 1000)
        rows: list[PerformanceRow] = []
        skipped: list[SkippedSize] = []
        with _untraced():
            for size_bytes in request.sizes_bytes:
                try:
                    if rows and until.expired:
                        skipped.append(SkippedSize(size_bytes=size_bytes, reason="no time was left for it"))
                        continue
                    rows.append(await self._row(request, size_bytes, until))
                except BusError as error:
                    is_last_hope = not rows and size_bytes == request.sizes_bytes[-1]
                    if is_last_hope or not _has_no_room(error):
                        raise
                    where = error.fault.worker_id if isinstance(error, RemoteFault) else self._bus.worker_id
                    skipped.append(SkippedSize(size_bytes=size_bytes, reason=f"{where}: {error.what}"))
            lanes, reason = await self._lanes(request.target)
        return PerformanceReport(
            rows=rows, skipped=skipped, backend=self._bus.backend, lanes=lanes, lanes_reason=reason
        )

    def _check(self, request: PerformanceRequest) -> None:
        if request.target == self._bus.worker_id:
            raise RequestRefused(
                FaultCode.UNSUPPORTED,
                "a worker can't be measured with itself",
                remedy="name two workers; 'nixlbus ps' lists the live ones",
            )
        total_bytes = sum(request.sizes_bytes) * request.repetitions
        if total_bytes > MAX_TOTAL_BYTES:
            raise RequestRefused(
                FaultCode.UNSUPPORTED,
                f"{total_bytes:,} bytes are asked for, {MAX_TOTAL_BYTES:,} are the most",
                remedy="ask for smaller sizes or fewer repetitions",
            )

    async def _row(self, request: PerformanceRequest, size_bytes: int, until: Deadline) -> PerformanceRow:
        with await zeroed(self._bus, size_bytes) as local:
            await self._operation(request, local)  # not measured: the first contact, the target's memory
            samples = [await self._operation(request, local)]
            while len(samples) < request.repetitions and not until.expired:
                samples.append(await self._operation(request, local))
        return row_of(size_bytes, samples)

    async def _operation(self, request: PerformanceRequest, local: ArenaTensor) -> Sample:
        memory = local.descriptor
        started_s = time.perf_counter()
        grant = await self._grant(request.target, request.direction, memory.num_bytes)
        if request.direction == "write":
            report = await (await self._bus.begin_write(grant, memory))
        else:
            report = await (await self._bus.begin_read(grant, memory))
        return sample_of(time.perf_counter() - started_s, report)

    async def _grant(self, target: str, direction: Direction, num_bytes: int) -> RdmaMetadata:
        request = PerformanceGrantRequest(num_bytes=num_bytes, direction=direction, initiator=self._identity)
        subject = self._bus.subjects.worker(target, GRANT_ENDPOINT)
        try:
            reply = await self._bus.request(subject, request, PerformanceGrant, timeout_s=OPERATION_TIMEOUT_S)
        except NoResponders:
            raise NoResponders(
                f"no worker {target!r} with a data plane answers", remedy="'nixlbus ps' lists the live workers"
            ) from None
        return reply.grant

    async def _lanes(self, target: str) -> tuple[str, str]:
        """The lanes, or "unknown" and why."""
        try:
            return await self._bus.lanes_to(await self._grant(target, "write", LANES_BYTES)), ""
        except BusError as error:
            return "unknown", str(error)


def _has_no_room(error: BusError) -> bool:
    code = error.fault.code if isinstance(error, RemoteFault) else error.code
    return code == PoolExhausted.code


def _untraced() -> SpanScope:
    """A scope under a parent that is not sampled: neither side records what happens in it."""
    return span("perf", parent=extract({"traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"}))
