"""The paired operation on the wire: a grant of memory, its claim, and the one ack that ends it.

Addresses never travel here. Memory is named as region, generation and offsets; the peer looks the region up in the
authenticated description that the handshake gave it, and checks every bound.
"""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from schemas.fault import Fault
from schemas.message import Message, Part

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
OperationId = Annotated[str, Meta(pattern="^[0-9a-f]{16,64}$")]
WorkerId = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
Token = Annotated[bytes, Meta(min_length=16, max_length=16)]

MAX_RUNS = 65_536
"""Runs in one grant: a block list longer than this wants more than one operation."""


class OperationKind(StrEnum):
    """What a grant lets its initiator do with the target's memory."""

    READABLE = "readable"
    WRITABLE = "writable"


class AckOutcome(StrEnum):
    """How a claim ended at the initiator. Each of them proves that it will not touch the memory again."""

    COMPLETE = "complete"
    FAILED = "failed"
    NEVER_POSTED = "never_posted"
    DRAINED = "drained"


class Run(Part, frozen=True, kw_only=True):
    """Consecutive bytes of a region."""

    offset_bytes: Count
    length_bytes: Positive


class MemoryExtent(Part, frozen=True, kw_only=True):
    """Bytes of one registered region: `runs`, repeated `count` times every `stride_bytes`.

    Their order as one byte sequence is repetition by repetition, run by run. A paged KV pool of shape
    [layers, 2, blocks, block_tokens, kv_heads, head_dim] is its block runs, repeated layers * 2 times, so the
    message stays small however many layers a model has.
    """

    region: Count
    generation: Count
    runs: Annotated[list[Run], Meta(min_length=1, max_length=MAX_RUNS)]
    count: Positive = 1
    stride_bytes: Count = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that the extent holds."""
        return self.count * sum(run.length_bytes for run in self.runs)


class Initiator(Part, frozen=True, kw_only=True):
    """The peer that may act on a named grant."""

    worker_id: WorkerId
    epoch: str


class RdmaMetadata(Message, frozen=True, kw_only=True, tag="operation.grant"):
    """A grant: what a target publishes so that an initiator can read or write its memory.

    Open (no `initiator`, no `token`): it must be claimed before the post. Named: only that initiator may act, with
    the token that stands here.
    """

    operation_id: OperationId
    kind: OperationKind
    worker_id: WorkerId
    epoch: str
    memory: Annotated[list[MemoryExtent], Meta(min_length=1, max_length=1024)]
    lease_ms: Positive
    """How long the grant lasts from its receipt, in milliseconds: a duration, never a clock reading."""
    initiator: Initiator | None = None
    token: Token | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that the operation moves."""
        return sum(extent.num_bytes for extent in self.memory)


class ClaimRequest(Message, frozen=True, kw_only=True, tag="operation.claim"):
    """ "Mine?": an initiator asks for an open grant before it posts anything."""

    operation_id: OperationId
    epoch: str
    """The epoch of the target that the grant named."""
    initiator: Initiator


class ClaimReply(Message, frozen=True, kw_only=True, tag="operation.claimed"):
    """ "Yes": the token that the ack must carry, and what is left of the lease."""

    operation_id: OperationId
    token: Token
    lease_ms: Positive


class CompletionAck(Message, frozen=True, kw_only=True, tag="operation.ack"):
    """The one terminal ack of a claim, published only after NIXL says DONE (or that nothing will be posted)."""

    operation_id: OperationId
    outcome: AckOutcome
    initiator: Initiator
    token: Token
    num_bytes: Count = 0
    """Bytes that NIXL's telemetry counted for the transfer."""
    fault: Fault | None = None
