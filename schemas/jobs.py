"""Durable jobs: the headers that a job and a dead letter carry, and the claim that workers keep about a job.

A job is any message on `job.<graph>.<queue>`. A dead letter is the job's own payload and headers on
`dlq.<graph>.<queue>`, with the reason in `Nixlbus-Dead-*` headers, so that any NATS client can read both.
"""

from typing import Literal

from schemas.message import Message

JOB_ID_HEADER = "Nixlbus-Job-Id"
"""The caller's name for the job; `Nats-Msg-Id` says the same with the queue's name before it."""
REPLAY_HEADER = "Nixlbus-Replay"
"""On a job that came back from the dead letters: which dead letter. It has a claim of its own."""
UNIQUE_HEADER = "Nixlbus-Job-Unique"
"""On a job whose id was made when it was submitted: no other message has it, so its first delivery needs no claim."""
MSG_ID_HEADER = "Nats-Msg-Id"
"""NATS's: a second message with the same id within the stream's duplicate window is not stored."""

DEAD_CODE_HEADER = "Nixlbus-Dead-Code"
DEAD_MESSAGE_HEADER = "Nixlbus-Dead-Message"
DEAD_REMEDY_HEADER = "Nixlbus-Dead-Remedy"
DEAD_DELIVERIES_HEADER = "Nixlbus-Dead-Deliveries"
DEAD_WORKER_HEADER = "Nixlbus-Dead-Worker"
DEAD_TIME_HEADER = "Nixlbus-Dead-Time"
"""RFC 3339, UTC, by the clock of the worker that gave up."""
DEAD_SUBJECT_HEADER = "Nixlbus-Dead-Subject"
DEAD_SEQUENCE_HEADER = "Nixlbus-Dead-Sequence"
"""The job's number in the stream of jobs."""
DEAD_MSG_ID_HEADER = "Nixlbus-Dead-Msg-Id"
DEAD_TRACE_HEADER = "Nixlbus-Dead-Trace"
"""Trace id of the last delivery."""
DEAD_PREFIX = "Nixlbus-Dead-"


class JobClaim(Message, frozen=True, kw_only=True, tag="job.claim"):
    """Who works on a job, or that it is done: a value of the KV bucket, written by compare-and-set."""

    state: Literal["working", "done"]
    job_id: str
    worker_id: str
    epoch: str
    delivery: int
    """Which delivery of the message, counted from 1."""
    stream_sequence: int
    """Which message of the stream of jobs: the same job may have been submitted twice."""
    attempt: int = 1
    """The same without deliveries that no worker began with, or that a draining one gave back: what counts."""
    progress: bytes = b""
    """The handler's own note for the next delivery."""
    traceparent: str = ""
    """The span of this delivery, for the next one to link to."""
