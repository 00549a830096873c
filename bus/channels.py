"""The subjects of the bus itself, described: what a worker serves beside what its class declares.

In: the bus's subjects. Out: `Channel` values for the AsyncAPI document: what a paired operation needs (handshake,
claim, status, ack, signs of death), the cancellation of a request, and the shape of jobs and their dead letters.
"""

from collections.abc import Iterator

from bus.data_lane import DRAINED_EVENT, REAPED_EVENT, STATUS_ENDPOINT
from bus.handshake.exchange import ENDPOINT as HANDSHAKE_ENDPOINT
from bus.operations.claim import CLAIM_ENDPOINT
from schemas.asyncapi import Action, Channel, address_of, placeholder
from schemas.handshake import AgentMetadataReply, AgentMetadataRequest
from schemas.json_schema import json_schema
from schemas.operations import (
    ClaimReply,
    ClaimRequest,
    CompletionAck,
    EpochDrained,
    OperationStatusReply,
    OperationStatusRequest,
    ProcessReaped,
)
from schemas.subjects import Subjects

_WORKER = placeholder("worker_id")
_BOTH: tuple[Action, ...] = ("receive", "send")


def bus_channels(subjects: Subjects) -> Iterator[Channel]:
    """Every subject that the bus uses by itself."""
    yield from _requests(subjects)
    yield Channel(
        name="ack",
        address=address_of(subjects.ack(_WORKER, placeholder("operation_id"))),
        kind="event",
        summary="The completion ack of an operation, to its target; each initiator sends one for each claim.",
        request=json_schema(CompletionAck),
        actions=_BOTH,
    )
    for kind, message_type, summary in (
        (DRAINED_EVENT, EpochDrained, "A worker's last word: it touches nobody's memory any more."),
        (REAPED_EVENT, ProcessReaped, "A supervisor's report that a worker's process is gone."),
    ):
        yield Channel(
            name=f"event.{kind}",
            address=address_of(subjects.event(_WORKER, kind)),
            kind="event",
            summary=summary,
            request=json_schema(message_type),
            actions=_BOTH,
        )
    yield Channel(
        name="cancel",
        address=address_of(subjects.cancel(placeholder("request_id"))),
        kind="event",
        summary="An empty message: the caller of this request is gone, and whoever works on it stops.",
        bare=True,
        actions=_BOTH,
    )
    group, queue = placeholder("group"), placeholder("queue")
    yield Channel(
        name="job",
        address=address_of(subjects.job(group, queue)),
        kind="job",
        summary="Durable work of a queue, kept in a JetStream stream until it is done.",
        actions=_BOTH,
    )
    yield Channel(
        name="dlq",
        address=address_of(subjects.dead_letter(group, queue)),
        kind="job",
        summary="Jobs of a queue that could not be done, as they were sent.",
        actions=("send",),
    )


def _requests(subjects: Subjects) -> Iterator[Channel]:
    for name, request, reply, summary in (
        (HANDSHAKE_ENDPOINT, AgentMetadataRequest, AgentMetadataReply, "The handshake: who this worker's agent is."),
        (CLAIM_ENDPOINT, ClaimRequest, ClaimReply, "An initiator asks for an open grant before it posts anything."),
        (
            STATUS_ENDPOINT,
            OperationStatusRequest,
            OperationStatusReply,
            "A target asks an initiator what became of an operation.",
        ),
    ):
        yield Channel(
            name=f"worker.{name}",
            address=address_of(subjects.worker(_WORKER, name)),
            kind="unary",
            summary=summary,
            request=json_schema(request),
            reply=json_schema(reply),
            bare=name != HANDSHAKE_ENDPOINT,
            actions=_BOTH,
        )
