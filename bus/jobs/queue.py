"""A queue of durable jobs as its declaration says it, and what a submitter gets back.

In: what a framework user writes. Out: frozen values, checked on construction.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from bus.errors import LocalProtocolError
from schemas.jobs import JOB_ID_HEADER, MSG_ID_HEADER, REPLAY_HEADER, UNIQUE_HEADER, durable_name
from schemas.message import Message
from schemas.subjects import Subject, Subjects, identifier

PAUSE_JITTER = 0.2
"""The part by which a pause is longer or shorter, by chance."""
if TYPE_CHECKING:
    from typing_extensions import TypeVar  # its stubs come with every type checker

    Q = TypeVar("Q", bound=Message, default=Any)
else:
    from typing import TypeVar

    Q = TypeVar("Q", bound=Message)

JOB_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What may stand in a header, without a space."""


@dataclass(frozen=True, kw_only=True)  # with slots, JobQueueConfig[Task](...) is an error of typing's
class JobQueueConfig(Generic[Q]):
    """One queue of jobs: `<prefix>.v1.job.<graph>.<queue>`. Raises `LocalProtocolError`, `InvalidIdentifier`."""

    taken_by: ClassVar[str] = "await bus.submit(...)"

    graph: str
    """Or the group of a plain service."""
    queue: str
    message_type: type[Q]
    concurrency: int = 16
    """Jobs at once in this worker; it never fetches more than it has room for."""
    ack_wait_s: float = 30.0
    """A job whose worker is silent for so long goes to another; a live worker speaks at a third of it."""
    max_duration_s: float = 600.0
    """The longest that one delivery may run; then it is cancelled, and counts as failed."""
    max_deliver: int = 5
    """Deliveries of one job; after the last it is a dead letter."""
    backoff_s: tuple[float, ...] = (1.0, 5.0, 30.0, 120.0)
    """The pause after each failed delivery; the last stands for all further ones. A fifth more or less, by chance."""
    idempotent_handler: bool = False
    """The handler may run twice for one job: no claims are kept, and the ack isn't waited for."""
    max_ack_pending: int = 10_000
    """Jobs of all workers together that are delivered and not settled, the ones in their pause included."""
    public: bool = False
    """Open to plain clients: the protocol header may be absent, and JSON is understood."""

    def __post_init__(self) -> None:
        identifier("graph", self.graph)
        identifier("queue", self.queue)
        for name, low, high in (
            ("concurrency", 1, 4096),
            ("ack_wait_s", 0.2, 1800.0),
            ("max_duration_s", 0.01, 7 * 86_400.0),
            ("max_deliver", 1, 1000),
            ("max_ack_pending", 1, 1_000_000),
        ):
            if not low <= getattr(self, name) <= high:
                raise LocalProtocolError(f"{name}={getattr(self, name)} of a job queue is not from {low} to {high}")
        if not self.backoff_s or not all(0 < pause_s <= 86_400 for pause_s in self.backoff_s):
            raise LocalProtocolError(
                f"backoff_s={self.backoff_s} of a job queue is not a tuple of seconds above 0",
                remedy="a pause of 0 would use up all deliveries at once",
            )

    def __str__(self) -> str:
        return f"the queue of jobs {self.graph}.{self.queue}"

    def subject(self, subjects: Subjects) -> Subject:
        """Where its jobs are published."""
        return subjects.job(self.graph, self.queue)

    @property
    def durable(self) -> str:
        """The name of its consumer."""
        return durable_name(self.graph, self.queue)

    @property
    def claim_s(self) -> float:
        """The longest that may pass between two writes to a job's claim, by a worker that finds room for the job:
        a delivery, the silence of its worker, a pause. A claim that is forgotten sooner forgets attempts.
        """
        return self.max_duration_s + self.ack_wait_s + max(self.backoff_s) * (1 + PAUSE_JITTER)


@dataclass(frozen=True, slots=True)
class JobReceipt:
    """A job is stored."""

    job_id: str
    stream_sequence: int
    """Its number in the stream; of the first one, if it is a duplicate."""
    duplicate: bool
    """A job of this id was stored already, not long ago; this one was not."""


def checked_job_id(job_id: str) -> str:
    """Return `job_id` if it may stand in a header, else raise `LocalProtocolError`."""
    if not JOB_ID.fullmatch(job_id):
        raise LocalProtocolError(
            f"job_id {job_id[:80]!r} can't be used", remedy="use 1 to 128 printable ASCII characters without spaces"
        )
    return job_id


def message_id(subject: Subject | str, job_id: str) -> str:
    """`Nats-Msg-Id` of a job: the stream holds all queues, so the queue's name is part of it."""
    queue = str(subject).split(".job.", 1)[-1]
    return f"{queue}/{job_id}"


def job_id_of(headers: Any, stream_sequence: int, stored_at_ns: int) -> str:
    """The id that a delivered job goes by: its own, else NATS's, else its place in the stream."""
    named = headers.get(JOB_ID_HEADER) or headers.get(MSG_ID_HEADER)
    return named if named and JOB_ID.fullmatch(named) else f"{stream_sequence}-{stored_at_ns}"


def claim_name(job_id: str, headers: Any) -> str:
    """What the claim of a delivered job is kept under: a replayed job has one of its own."""
    replay = headers.get(REPLAY_HEADER, "")
    return f"{job_id} {replay}" if replay else job_id


def is_unique(headers: Any) -> bool:
    """Whether no other message has this job's id; one that is replayed may be there twice."""
    return UNIQUE_HEADER in headers and REPLAY_HEADER not in headers
