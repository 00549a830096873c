"""`nixlbus perf`: latency and bandwidth by size between two live workers, measured by the initiator.

The client asks the initiator (`perf`), which asks the target for one grant after another (`perf_grant`).
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from schemas.message import Message, Part
from schemas.operations import Count, Initiator, Positive, RdmaMetadata, WorkerId

PERFORMANCE_ENDPOINT = "perf"
GRANT_ENDPOINT = "perf_grant"
MAX_SIZES = 32
MAX_REPETITIONS = 10_000
MAX_TIME_LIMIT_MS = 600_000

Direction = Literal["write", "read"]
"""What the initiator does with the target's memory."""


class PerformanceRequest(Message, frozen=True, kw_only=True, tag="performance.request"):
    """Measure operations from the worker that is asked to `target`."""

    target: WorkerId
    direction: Direction = "write"
    sizes_bytes: Annotated[list[Positive], Meta(min_length=1, max_length=MAX_SIZES)]
    repetitions: Annotated[int, Meta(ge=1, le=MAX_REPETITIONS)]
    """Measured operations of each size; one more goes ahead of them."""
    time_limit_ms: Annotated[int, Meta(ge=1, le=MAX_TIME_LIMIT_MS)]
    """For the measured operations of all sizes together; a size that it cuts short has fewer of them."""


class PerformanceRow(Part, frozen=True, kw_only=True):
    """The operations of one size."""

    size_bytes: Positive
    num_operations: Positive
    num_bytes: Count
    """Bytes that NIXL counted in them."""
    p50_us: float
    """A whole paired operation: request for the grant, its reply, transfer, ack sent."""
    p99_us: float
    wire_p50_us: float
    """From the post to DONE: NIXL's own figure, or of several chunks, which overlap, the initiator's clock."""
    bytes_per_s: float
    """`size_bytes` over `wire_p50_us`."""


class SkippedSize(Part, frozen=True, kw_only=True):
    """A size that was not measured."""

    size_bytes: Positive
    reason: str


class PerformanceReport(Message, frozen=True, kw_only=True, tag="performance.report"):
    """What was measured."""

    rows: list[PerformanceRow]
    skipped: list[SkippedSize] = msgspec.field(default_factory=list)
    backend: str
    """NIXL's name of it: UCX."""
    lanes: str
    """The transport, in UCX's own words; "unknown" where it could not be seen."""
    lanes_reason: str = ""
    """Why it is unknown."""


class PerformanceGrantRequest(Message, frozen=True, kw_only=True, tag="performance.grant_request"):
    """The initiator asks the target for memory that is reserved for measurements."""

    num_bytes: Positive
    direction: Direction
    initiator: Initiator


class PerformanceGrant(Message, frozen=True, kw_only=True, tag="performance.grant"):
    """The memory, granted to that initiator for one operation."""

    grant: RdmaMetadata
