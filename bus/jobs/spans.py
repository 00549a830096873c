"""The spans of durable work: PRODUCER where a job is submitted, CONSUMER for each delivery of it.

In: a job's subject and headers. Out: spans. Every delivery is a child of the submission, in its trace, and links to
it; a later delivery also links to the one before (see `consumer`).
"""

from bus.control_plane.delivery import Delivery
from observability import semantic_conventions as names
from observability.active_span import Span, SpanKind
from observability.propagation import extract
from observability.tracing import SpanScope, is_tracing, span, start_span
from schemas.subjects import Subject


def submit_span(subject: Subject, job_id: str, num_bytes: int) -> Span:
    """The span of one submission, until its confirmation. Not the current one; the caller ends it."""
    return start_span(
        f"send {subject.template}",
        kind=SpanKind.PRODUCER,
        attributes={
            names.MESSAGING_SYSTEM: names.MESSAGING_SYSTEM_NATS,
            names.MESSAGING_OPERATION_NAME: "send",
            names.MESSAGING_OPERATION_TYPE: names.MESSAGING_OPERATION_TYPE_SEND,
            names.MESSAGING_DESTINATION_NAME: subject.name,
            names.MESSAGING_DESTINATION_TEMPLATE: subject.template,
            names.MESSAGING_MESSAGE_ID: job_id,
            names.MESSAGING_MESSAGE_BODY_SIZE: num_bytes,
        }
        if is_tracing()
        else None,
    )


def process_span(subject: Subject, delivery: Delivery, consumer: str, worker_id: str) -> SpanScope:
    """The span of one delivery."""
    submitted = extract(delivery.headers)
    if not is_tracing():
        return span(f"process {subject.template}", parent=submitted)
    return span(
        f"process {subject.template}",
        kind=SpanKind.CONSUMER,
        parent=submitted,
        links=[submitted] if submitted else [],
        attributes={
            names.MESSAGING_SYSTEM: names.MESSAGING_SYSTEM_NATS,
            names.MESSAGING_OPERATION_NAME: "process",
            names.MESSAGING_OPERATION_TYPE: names.MESSAGING_OPERATION_TYPE_PROCESS,
            names.MESSAGING_DESTINATION_NAME: subject.name,
            names.MESSAGING_DESTINATION_TEMPLATE: subject.template,
            names.MESSAGING_CONSUMER_GROUP_NAME: consumer,
            names.MESSAGING_CLIENT_ID: worker_id,
            names.MESSAGING_MESSAGE_BODY_SIZE: len(delivery.payload),
            names.NIXL_JOB_DELIVERY_COUNT: delivery.num_delivered,
            names.NIXL_JOB_STREAM_SEQUENCE: delivery.stream_sequence,
        },
    )
