"""A finished span as plain values, and what can be said of a list of them.

In: spans in OTLP's protobuf form, as the receiver gets them. Out: `SpanRecord`s; roots, orphans and the order
in which a tree is read.
Invariants: every value is plain JSON; the functions are pure and end on any input, cycles and doubles
included.
Leaves out: keeping records (`trace_store`), drawing them (`waterfall`).
Source: opentelemetry.proto.trace.v1.
"""

import base64
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage

# By their numbers in the protocol, which has an "unspecified" kind that is to be read as internal.
_KINDS = ("internal", "internal", "server", "client", "producer", "consumer")
_STATUSES: tuple[Literal["unset", "ok", "error"], ...] = ("unset", "ok", "error")


class SpanEventRecord(msgspec.Struct, frozen=True):
    """Something that happened during a span."""

    name: str
    time_ns: int
    attributes: dict[str, Any]


class SpanLinkRecord(msgspec.Struct, frozen=True):
    """Another span that a span points at."""

    trace_id: str
    span_id: str


class SpanRecord(msgspec.Struct, frozen=True):
    """A finished span. Ids are lower-case hex; times are ns since 1970 by the clock of the span's host."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    """"" for a root."""
    service: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any] = {}
    events: tuple[SpanEventRecord, ...] = ()
    links: tuple[SpanLinkRecord, ...] = ()
    status: Literal["unset", "ok", "error"] = "unset"
    status_message: str = ""

    @property
    def duration_ns(self) -> int:
        """Never negative, even where a clock was set back."""
        return max(0, self.end_ns - self.start_ns)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a dict for JSON; `msgspec.convert(d, SpanRecord)` is the way back."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def span_records(messages: "Iterable[ResourceSpans]") -> list[SpanRecord]:
    """Return the spans of an OTLP export request, in its order."""
    return [
        _span_record(message, service)
        for resource_spans in messages
        for service in [_service_of(resource_spans)]
        for scope_spans in resource_spans.scope_spans
        for message in scope_spans.spans
    ]


def roots(spans: Iterable[SpanRecord]) -> list[SpanRecord]:
    """Return the spans that have no parent."""
    return [span for span in spans if not span.parent_id]


def orphans(spans: Sequence[SpanRecord]) -> list[SpanRecord]:
    """Return the spans whose parent is not among the spans."""
    known = {span.span_id for span in spans}
    return [span for span in spans if span.parent_id and span.parent_id not in known]


def tree(spans: Sequence[SpanRecord]) -> list[tuple[int, SpanRecord]]:
    """Return every span once with its depth, parents before children, siblings by their start.

    Roots and orphans have depth 0. So has the earliest span of a cycle of parents, which only a broken sender
    makes.
    """
    in_order = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    known = {span.span_id for span in in_order}
    children: dict[str | None, list[SpanRecord]] = {}
    for span in in_order:
        children.setdefault(span.parent_id if span.parent_id in known else None, []).append(span)
    rows: list[tuple[int, SpanRecord]] = []
    seen: set[int] = set()
    for top in [*children.get(None, ()), *in_order]:
        stack = [(0, top)]
        while stack:
            depth, span = stack.pop()
            if id(span) not in seen:
                seen.add(id(span))
                rows.append((depth, span))
                stack.extend((depth + 1, child) for child in reversed(children.get(span.span_id, ())))
    return rows


def _service_of(resource_spans: "ResourceSpans") -> str:
    return str(_attributes(resource_spans.resource.attributes).get("service.name", ""))


def _span_record(message: "SpanMessage", service: str) -> SpanRecord:
    return SpanRecord(
        name=message.name,
        kind=_KINDS[message.kind] if message.kind < len(_KINDS) else _KINDS[0],
        trace_id=message.trace_id.hex(),
        span_id=message.span_id.hex(),
        parent_id=message.parent_span_id.hex(),
        service=service,
        start_ns=message.start_time_unix_nano,
        end_ns=message.end_time_unix_nano,
        attributes=_attributes(message.attributes),
        events=tuple(
            SpanEventRecord(event.name, event.time_unix_nano, _attributes(event.attributes)) for event in message.events
        ),
        links=tuple(SpanLinkRecord(link.trace_id.hex(), link.span_id.hex()) for link in message.links),
        status=_STATUSES[message.status.code] if message.status.code < len(_STATUSES) else _STATUSES[0],
        status_message=message.status.message,
    )


def _attributes(pairs: "Iterable[KeyValue]") -> dict[str, Any]:
    return {pair.key: _plain(pair.value) for pair in pairs}


def _plain(value: "AnyValue") -> Any:
    """Return a value as JSON has it: bytes in base64, and what no JSON number is (NaN, infinity) as text."""
    match value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return [_plain(item) for item in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case "bytes_value":
            return base64.b64encode(value.bytes_value).decode()
        case "double_value" if not math.isfinite(value.double_value):
            return str(value.double_value)
        case field:
            return getattr(value, field)
