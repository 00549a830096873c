"""What `nixlbus perf` asks of workers: every worker with a data plane serves both sides of a measurement.

In: a `PerformanceRequest` at the initiator, which asks the target's `perf_grant` for memory, operation by operation.
Out: rows by size, and the lanes that UCX took. One measurement of an initiator runs at a time. Needs torch.
"""

from bus import Bus, EndpointConfig
from schemas.performance import (
    GRANT_ENDPOINT,
    PERFORMANCE_ENDPOINT,
    PerformanceGrant,
    PerformanceGrantRequest,
    PerformanceReport,
    PerformanceRequest,
)
from workers.performance.initiator import PerformanceInitiator
from workers.performance.target import PerformanceTarget


async def serve(bus: Bus) -> None:
    """Serve both sides at a worker's own subjects."""
    perf, grant = (bus.subjects.worker(bus.worker_id, name) for name in (PERFORMANCE_ENDPOINT, GRANT_ENDPOINT))
    await bus.serve(
        EndpointConfig(
            PERFORMANCE_ENDPOINT,
            perf,
            PerformanceRequest,
            concurrency=1,
            max_queued=1,
            reply_type=PerformanceReport,
        ),
        PerformanceInitiator(bus).measure,
    )
    await bus.serve(
        EndpointConfig(GRANT_ENDPOINT, grant, PerformanceGrantRequest, concurrency=1, reply_type=PerformanceGrant),
        PerformanceTarget(bus).grant,
    )
