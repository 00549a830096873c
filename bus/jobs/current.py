"""`current_job()`: what a handler may ask about the job that it works on, and its one way to speak up meanwhile.

In: nothing; the job is the current task's. Out: a `CurrentJob`.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar

from bus.errors import LocalProtocolError

Checkpoint = Callable[[bytes], Awaitable[None]]


class CurrentJob:
    """One delivery of a job, as its handler sees it."""

    __slots__ = ("_checkpoint", "age_s", "attempt", "delivery_count", "job_id", "progress", "stream_sequence")

    def __init__(
        self,
        job_id: str,
        delivery_count: int,
        attempt: int,
        stream_sequence: int,
        age_s: float,
        progress: bytes,
        checkpoint: Checkpoint,
    ) -> None:
        self.job_id = job_id
        """The same for every delivery, and after a replay: what effects outside are best kept under."""
        self.delivery_count = delivery_count
        """1 for the first delivery."""
        self.attempt = attempt
        """The same without deliveries that no worker began with, or that a draining one gave back: what counts."""
        self.stream_sequence = stream_sequence
        self.age_s = age_s
        """Seconds between its submission and this delivery, by the NATS server's clock."""
        self.progress = progress
        """What the last `checkpoint` of an earlier delivery noted; empty at first."""
        self._checkpoint = checkpoint

    async def checkpoint(self, progress: bytes = b"") -> None:
        """Note how far the job is, for the next delivery if this one dies, and prove that it is still ours.

        Good just before an effect that can't be taken back. A write to NATS. Raises `JobTakenOver` when a later
        delivery has the job, `LocalProtocolError` on a queue without claims, `ConnectionLost`, `DeadlineExceeded`.
        """
        await self._checkpoint(progress)
        self.progress = progress


async def no_checkpoint(progress: bytes) -> None:
    """The checkpoint of a queue that keeps no claims."""
    raise LocalProtocolError(
        "this queue keeps no claims, so there is nowhere to note progress",
        remedy="declare it without idempotent_handler",
    )


_current: ContextVar[CurrentJob] = ContextVar("nixlbus_job")


def current_job() -> CurrentJob:
    """The job that the current task works on. Raises `LocalProtocolError` outside a job's handler."""
    try:
        return _current.get()
    except LookupError:
        raise LocalProtocolError("no job is being worked on here", remedy="call it in a job's handler") from None


def working_on(job: CurrentJob) -> None:
    """Make `job` the current task's, for the rest of the task."""
    _current.set(job)
