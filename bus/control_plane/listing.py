"""What service discovery tells of one thing that a worker serves: an endpoint, a handler of events, a queue of jobs.

In: whatever is `Listed`. Out: values that `discovery` makes its answers of.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

Kind = Literal["unary", "stream", "event", "job"]


@dataclass(frozen=True, slots=True)
class Listing:
    """What stays the same while it is served."""

    name: str
    subject: str
    queue_group: str
    kind: Kind
    request_type: Any
    reply_type: Any = None
    """A message class, a union of frames, or None."""
    concurrency: int = 1
    max_queued: int = 0
    timeout_s: float = 60.0
    public: bool = False


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What STATS tells beyond the fields that ADR-32 has."""

    refused: int = 0
    cancelled: int = 0
    active: int = 0
    queued: int = 0


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What STATS tells, times in nanoseconds."""

    name: str
    subject: str
    queue_group: str
    num_requests: int
    num_errors: int
    last_error: str = ""
    processing_time: int = 0
    average_processing_time: int = 0
    data: Load


class Listed(Protocol):
    """What can be told of."""

    def listing(self) -> Listing: ...  # noqa: D102
    def statistics(self) -> Statistics: ...  # noqa: D102
