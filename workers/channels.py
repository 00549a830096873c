"""What workers serve, described for the AsyncAPI document: from their classes, or from live workers' own words.

In: worker classes, or the answers of service discovery. Out: `Channel` values. A new kind of declaration needs a
function beside `_endpoint` and `_event`, and its line in `class_channels`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from schemas.asyncapi import Channel, Kind, address_of, placeholder
from schemas.json_schema import Schema, json_schema
from schemas.performance import (
    GRANT_ENDPOINT,
    PERFORMANCE_ENDPOINT,
    PerformanceGrant,
    PerformanceGrantRequest,
    PerformanceReport,
    PerformanceRequest,
)
from schemas.stream import frames_of
from schemas.subjects import Subject, Subjects
from workers.declaration import DeclaredEndpoint, DeclaredJob, EventHandler, StreamEndpoint, declared
from workers.worker import Worker

_WORKER = placeholder("worker_id")


def class_channels(worker_type: type[Worker], subjects: Subjects, group: str = "") -> Iterator[Channel]:
    """What instances of a class serve; `group` if they are started in another than their class's.

    Raises `TypeError` for a declaration without its types.
    """
    for endpoint in declared(worker_type, DeclaredEndpoint):
        yield _endpoint(endpoint, worker_type, subjects, group or worker_type.group)
    for handler in declared(worker_type, EventHandler):
        yield _event(handler, subjects)
    for found in declared(worker_type, DeclaredJob):
        yield _job(found, subjects, group or worker_type.group)
    if worker_type.needs_data_plane:
        yield from _performance(subjects)


def live_channels(services: Iterable[Mapping[str, Any]], subjects: Subjects) -> Iterator[Channel]:
    """What live workers say that they serve (`Bus.services`), instances of a kind several times."""
    for service in services:
        for endpoint in service["endpoints"]:
            yield _live(endpoint, str(service["id"]), subjects)


def _endpoint(endpoint: DeclaredEndpoint, owner: type[Worker], subjects: Subjects, group: str) -> Channel:
    options = endpoint.options
    is_stream = isinstance(endpoint, StreamEndpoint)
    subject = subjects.worker(_WORKER, endpoint.stage) if options.direct else subjects.graph(group, endpoint.stage)
    queue_group = endpoint.stage if options.queue_group is None else options.queue_group
    return Channel(
        name=_name(subject),
        address=address_of(subject),
        kind="stream" if is_stream else "unary",
        summary=_first_line(endpoint.__doc__),
        request=json_schema(endpoint.request_type),
        reply=json_schema(frames_of(endpoint.reply_type) if is_stream else endpoint.reply_type),
        queue_group="" if options.direct else queue_group,
        public=options.public,
        details={
            "concurrency": options.concurrency,
            "max_queued": options.max_queued,
            "timeout_ms": int(endpoint.timeout_s(owner) * 1000),
        },
    )


def _event(handler: EventHandler[Any], subjects: Subjects) -> Channel:
    subject = subjects.event(_WORKER, handler.kind)
    return Channel(
        name=_name(subject),
        address=address_of(subject),
        kind="event",
        summary=_first_line(handler.__doc__),
        request=json_schema(handler.request_type),
        queue_group=handler.queue_group,
        details={"concurrency": handler.concurrency},
    )


def _job(found: DeclaredJob[Any], subjects: Subjects, group: str) -> Channel:
    queue = found.within(group)
    subject = queue.subject(subjects)
    return Channel(
        name=_name(subject),
        address=address_of(subject),
        kind="job",
        summary=_first_line(found.__doc__),
        request=json_schema(found.request_type),
        queue_group=queue.durable,
        public=queue.public,
        details={"concurrency": queue.concurrency, "timeout_ms": int(queue.max_duration_s * 1000)},
    )


def _performance(subjects: Subjects) -> Iterator[Channel]:
    """What every worker with a data plane serves besides (`workers.performance.serve`, which needs torch)."""
    for name, request, reply in (
        (PERFORMANCE_ENDPOINT, PerformanceRequest, PerformanceReport),
        (GRANT_ENDPOINT, PerformanceGrantRequest, PerformanceGrant),
    ):
        subject = subjects.worker(_WORKER, name)
        yield Channel(
            name=_name(subject),
            address=address_of(subject),
            kind="unary",
            summary=_first_line(request.__doc__),
            request=json_schema(request),
            reply=json_schema(reply),
        )


def _live(endpoint: Mapping[str, Any], worker_id: str, subjects: Subjects) -> Channel:
    metadata = endpoint["metadata"]
    own = subjects.worker(worker_id, "x").name.removesuffix("x")
    name = str(endpoint["subject"]).replace(own, subjects.worker(_WORKER, "x").name.removesuffix("x"))
    subject = Subject(re.sub(r"(?<=\.event\.)(\*\.)+", f"{_WORKER}.", name), "")
    kind = metadata.get("kind", "unary")
    counted = ("concurrency", "max_queued", "timeout_ms")
    ids = ("request_schema_id", "reply_schema_id")
    return Channel(
        name=_name(subject),
        address=address_of(subject),
        kind=cast(Kind, kind) if kind in ("unary", "stream", "event", "job") else "unary",
        request=_told(metadata, "request"),
        reply=_told(metadata, "reply"),
        queue_group=str(endpoint.get("queue_group") or ""),
        public=metadata.get("public") == "true",
        details={
            **{key: int(metadata[key]) for key in counted if str(metadata.get(key, "")).isdecimal()},
            **{key: metadata[key] for key in ids if key in metadata},
        },
    )


def _told(metadata: Mapping[str, str], direction: str) -> Schema | None:
    """The schema that a worker gave, or what its tags alone tell."""
    try:
        schema = json.loads(metadata.get(f"{direction}_schema", ""))
        if isinstance(schema, dict):
            return schema
    except ValueError:
        pass
    tags = [tag for tag in metadata.get(direction, "").split(",") if tag]
    members = [{"type": "object", "properties": {"type": {"enum": [tag]}}} for tag in tags]
    return {"anyOf": members} if members else None


def _name(subject: Subject) -> str:
    """The subject's last tokens, without ids: `graph.vlm.decode`, `worker.claim`, `event.drained`."""
    return ".".join(token for token in subject.name.split(".")[2:] if token != _WORKER)


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
