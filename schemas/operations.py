"""The paired operation on the wire: a grant of memory, its claim, and the one ack that ends it.

Addresses never travel here. Memory is named as region, generation and offsets; the peer looks the region up in the
authenticated description that the handshake gave it, and checks every bound. Claims, status queries and acks go only
between workers that have shaken hands, so they carry no protocol header: the handshake's messages did.
"""

import time
from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from schemas.dynamo import DynamoMetadata
from schemas.fault import Fault
from schemas.message import Message, Part

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
OperationId = Annotated[str, Meta(pattern=r"^[0-9a-f]{16,64}\Z")]
WorkerId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64})?\Z")]
Epoch = Annotated[str, Meta(max_length=64)]
Token = Annotated[bytes, Meta(min_length=16, max_length=16)]
Checksum = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""XXH3 with 128 bits over the operation's bytes in their order, canonical (big-endian) form."""

UNPROVED = bytes(16)
"""Stands where a proof will."""
MAX_RUNS = 65_536
"""Runs in one grant: a block list longer than this wants more than one operation."""

MAX_CLAIMS = 1024
"""Peers that may act on one grant."""


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
        return self.count * sum([run.length_bytes for run in self.runs])


class Initiator(Part, frozen=True, kw_only=True):
    """The peer that may act on a named grant."""

    worker_id: WorkerId
    epoch: Epoch


class TensorLayout(Part, frozen=True, kw_only=True):
    """What the bytes are, where their owner says: held against the other side's before anything is posted."""

    dtype: str
    """torch's name without its prefix: float32, bfloat16, uint8."""
    shape: Annotated[list[Count], Meta(max_length=16)]


class ProcessIdentity(Part, frozen=True, kw_only=True):
    """A process that can't be mistaken for another: a pid alone is used again."""

    boot_id: Annotated[str, Meta(max_length=64)]
    pid_namespace: Annotated[str, Meta(max_length=64)]
    pid: Annotated[int, Meta(ge=1, le=2**22)]
    """At most what Linux gives out, so that no system call stumbles over it."""
    start_ticks: Count
    """Field 22 of /proc/<pid>/stat: clock ticks from the boot to the process's start."""


class RdmaMetadata(Message, frozen=True, kw_only=True, dict=True, tag="operation.grant"):
    """A grant: what a target publishes so that an initiator can read or write its memory.

    Open (no `initiator`, no `token`): it must be claimed before the post. Named: only that initiator may act, once; the
    token proves every field under the key of the bus, and goes back with the ack.
    """

    operation_id: OperationId
    kind: OperationKind
    worker_id: WorkerId
    epoch: Epoch
    memory: Annotated[list[MemoryExtent], Meta(min_length=1, max_length=1024)]
    lease_ms: Positive
    """How long the grant lasts from its receipt, in milliseconds: a duration, never a clock reading."""
    initiator: Initiator | None = None
    token: Token | None = None
    serial: Count = 0
    """Of a named grant: counts the target's grants to that initiator, so that none is used twice."""
    layout: TensorLayout | None = None
    max_claims: Annotated[int, Meta(ge=1, le=MAX_CLAIMS)] = 1
    """How many initiators may act on it, each once; more than one is for readable memory."""
    checksummed: bool = False
    """Whether the ack must prove the bytes."""
    checksum: Checksum | None = None
    """Of readable memory whose reader is to prove what it got."""

    def __post_init__(self) -> None:
        self.__dict__["received_at_s"] = time.monotonic()

    @staticmethod
    def from_dynamo(text: str | bytes) -> DynamoMetadata:
        """Parse the metadata of a `dynamo.nixl_connect` target, for `begin_read` or `begin_write`.

        It is no grant: it carries no proof, lease or claim. Raises `InvalidMessage`.
        """
        return DynamoMetadata.from_json(text)

    @property
    def received_at_s(self) -> float:
        """When this process made or decoded it, by its own monotonic clock: where the lease begins. Not on the wire."""
        at_s: float = self.__dict__["received_at_s"]
        return at_s

    @property
    def num_bytes(self) -> int:
        """Bytes that the operation moves."""
        return sum([extent.num_bytes for extent in self.memory])


class ClaimRequest(Message, frozen=True, kw_only=True, tag="operation.claim"):
    """ "Mine?": an initiator asks for an open grant before it posts anything."""

    operation_id: OperationId
    epoch: Epoch
    """The epoch of the target that the grant named."""
    initiator: Initiator
    proof: Token = UNPROVED
    """That a member of the bus asks, for the grant as the target made it."""


class ClaimReply(Message, frozen=True, kw_only=True, tag="operation.claimed"):
    """ "Yes": and what is left of the lease. The ack's token is not told: who has the key can make it."""

    operation_id: OperationId
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
    checksum: Checksum | None = None
    """Of the bytes as their source held them after the transfer; for a grant that asks for it."""


class OperationState(StrEnum):
    """What an initiator says of an operation that a target asks about."""

    UNDER_WAY = "under_way"
    CONCLUDED = "concluded"
    REFUSED = "refused"
    UNKNOWN = "unknown"


class OperationStatusRequest(Message, frozen=True, kw_only=True, tag="operation.status"):
    """ "What became of it?": a target asks the initiator of a grant whose ack is late.

    It also revokes: an initiator that has not seen the operation will refuse it from then on.
    """

    operation_id: OperationId
    worker_id: WorkerId
    """The target that asks."""
    epoch: Epoch
    """Of the target."""
    initiator: Initiator
    nonce: Token = UNPROVED
    serial: Count = 0
    """Of a named grant: it is refused from now on."""
    proof: Token = UNPROVED
    """That a member of the bus asks."""


class OperationStatusReply(Message, frozen=True, kw_only=True, tag="operation.status_reply"):
    """The initiator's answer. REFUSED: nothing was posted and nothing will be. UNKNOWN proves nothing."""

    operation_id: OperationId
    initiator: Initiator
    """Who answers; another epoch than the one asked about can say nothing of it."""
    state: OperationState
    ack: CompletionAck | None = None
    """Once more, of a concluded operation."""
    proof: Token = UNPROVED
    """That a member of the bus says so, to this question."""


class EpochDrained(Message, frozen=True, kw_only=True, tag="operation.epoch_drained"):
    """A worker's last word: nothing that this epoch posted is under way, and nothing more will be posted."""

    worker_id: WorkerId
    epoch: Epoch
    key_id: str
    mac: Annotated[bytes, Meta(min_length=32, max_length=32)]


class ProcessReaped(Message, frozen=True, kw_only=True, tag="operation.process_reaped"):
    """A supervisor's report that it has reaped a worker's process."""

    worker_id: WorkerId
    process: ProcessIdentity
    key_id: str
    mac: Annotated[bytes, Meta(min_length=32, max_length=32)]
