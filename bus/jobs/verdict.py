"""What becomes of a delivery: plain decisions over plain values, no I/O.

In: how often a job was delivered, what its claim says, why it failed. Out: run it, skip it, pause it, bury it.
"""

import random
from dataclasses import dataclass
from enum import Enum

import msgspec

from bus.control_plane.delivery import Delivery
from bus.errors import BusError, DeadlineExceeded, fault_of
from bus.jobs.queue import JobQueueConfig, is_unique
from schemas.fault import Fault, FaultCode
from schemas.jobs import JobClaim

HAND_BACK_DELAY_S = (0.05, 0.25)
"""For a job that a draining worker gives back: enough for the worker to have stopped asking."""
_JITTER = 0.2


class JobExpired(DeadlineExceeded):
    """The job's own time, which its submitter gave it, is up. Trying again can't help."""

    default_remedy = "submit it with a longer ttl_s, or start more workers"


class Standing(Enum):
    """What a job's claim means for one delivery of it."""

    FREE = "free"
    """Nobody's: claim it."""
    OURS = "ours"
    """An earlier delivery of the same message: its worker was silent for ack_wait, or gave it back. Take it over."""
    DONE = "done"
    """Finished: ack it, don't run it."""
    SUPERSEDED = "superseded"
    """A later delivery of the same message has it: leave it to that."""
    OTHER = "other"
    """Another message of the same job id: a duplicate, as long as that message is there."""
    SETTLED = "needless: the job is settled"
    """Out of the stream: a delivery without a claim has settled it. There is nothing left to ack."""


def standing(claim: JobClaim | None, delivery: Delivery) -> Standing:
    """What `claim` means for `delivery`."""
    if claim is None:
        return Standing.FREE
    if claim.state == "done":
        return Standing.DONE
    if claim.stream_sequence != delivery.stream_sequence:
        return Standing.OTHER
    return Standing.OURS if claim.delivery < delivery.num_delivered else Standing.SUPERSEDED


def needs_no_claim_at_first(config: JobQueueConfig, delivery: Delivery) -> bool:
    """Whether the first delivery of this job runs without a claim while its lease is sure: nobody else can have it.

    Later ones presume that it was a try, whether it began or not; so not where one try is all there is.
    """
    return not config.idempotent_handler and config.max_deliver > 1 and is_unique(delivery.headers)


def attempts(delivery: Delivery, claim: JobClaim | None) -> int:
    """Deliveries that count against the job, this one included: those that a worker began with, as its claim has it."""
    return claim.attempt if claim else delivery.num_delivered


@dataclass(frozen=True, slots=True)
class Retry:
    """Deliver it again after `delay_s`."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Bury:
    """It is a dead letter, because of `fault`."""

    fault: Fault


def after_failure(
    config: JobQueueConfig, error: BaseException, num_attempts: int, worker_id: str, trace_id: str = ""
) -> Retry | Bury:
    """What becomes of a job whose delivery failed with `error`.

    A fault that the same job would meet again (bad input: the 400s) is not tried again; everything else is, after a
    pause that grows, until the deliveries are used up.
    """
    fault = fault_of(error, worker_id=worker_id, trace_id=trace_id)
    hopeless = isinstance(error, JobExpired) or (400 <= fault.http_status < 500 and not fault.retryable)
    if hopeless or num_attempts >= config.max_deliver:
        return Bury(_named(fault, error))
    return Retry(pause_s(config, num_attempts))


def _named(fault: Fault, error: BaseException) -> Fault:
    """For an unexpected error at least the name of its class: its text may hold what nobody should read."""
    if fault.code != FaultCode.INTERNAL or isinstance(error, BusError):
        return fault
    return msgspec.structs.replace(fault, message=f"the handler raised {type(error).__name__}")


def pause_s(config: JobQueueConfig, num_attempts: int) -> float:
    """The pause after the delivery of that number, counted from 1."""
    planned = config.backoff_s[min(max(1, num_attempts), len(config.backoff_s)) - 1]
    return planned * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311
