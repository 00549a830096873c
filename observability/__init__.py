"""Spans, their way through messages, and a place to look at them: the public names.

In: work that the other packages do. Out: OpenTelemetry traces, on the wire in W3C headers and OTLP.
Invariants: importing this package imports neither gRPC nor rich nor the OpenTelemetry SDK; a receiver, a
drawing or a configured exporter does. The only package that imports `opentelemetry`; imports nothing else of
ours.
Leaves out: metrics. Attribute names are in `observability.semantic_conventions`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from observability.active_span import ROOT, Attributes, AttributeValue, Span, SpanContext, SpanKind
from observability.logs import configure_logging
from observability.propagation import extract, inject, traceparent
from observability.span_record import (
    SpanEventRecord,
    SpanLinkRecord,
    SpanRecord,
    orphans,
    roots,
    tree,
)
from observability.trace_store import TraceIncompleteError, TraceStore
from observability.tracing import (
    SpanScope,
    configure,
    current_span,
    current_trace_id,
    export_counts,
    flush,
    is_tracing,
    service_name,
    shutdown,
    span,
    start_span,
)

if TYPE_CHECKING:
    from observability.receiver import OtlpReceiver, ReceiverBindError
    from observability.span_export import ExportCounts
    from observability.span_recorder import SpanRecorder
    from observability.waterfall import render_waterfall

__all__ = [
    "ROOT",
    "AttributeValue",
    "Attributes",
    "ExportCounts",
    "OtlpReceiver",
    "ReceiverBindError",
    "Span",
    "SpanContext",
    "SpanEventRecord",
    "SpanKind",
    "SpanLinkRecord",
    "SpanRecord",
    "SpanRecorder",
    "SpanScope",
    "TraceIncompleteError",
    "TraceStore",
    "configure",
    "configure_logging",
    "current_span",
    "current_trace_id",
    "export_counts",
    "extract",
    "flush",
    "inject",
    "is_tracing",
    "orphans",
    "render_waterfall",
    "roots",
    "service_name",
    "shutdown",
    "span",
    "start_span",
    "traceparent",
    "tree",
]

# What costs an import that a worker without a collector doesn't need.
_LAZY = {
    "ExportCounts": "observability.span_export",
    "OtlpReceiver": "observability.receiver",
    "ReceiverBindError": "observability.receiver",
    "SpanRecorder": "observability.span_recorder",
    "render_waterfall": "observability.waterfall",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
