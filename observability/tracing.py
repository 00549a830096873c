"""Spans around our own work: configure once per process, then `with span(...)` everywhere.

In: the standard OTEL_* variables, a service name. Out: the current `Span`, and finished spans handed to
`span_export`.
Invariants: until `configure` finds an endpoint, tracing is off: a span costs about a microsecond, allocates
nothing that is kept, and the trace of an upstream peer is passed through unchanged; the provider is this
module's own, never the global one, so a host application keeps its own; the current span lives in a context
variable and so follows tasks, but not threads (pass `parent=` there).
Leaves out: headers (`propagation`), metrics.
Source: OpenTelemetry trace API and SDK configuration specification.
"""

import atexit
import logging
from collections.abc import Iterable
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from observability.active_span import (
    NO_SPAN,
    Attributes,
    Span,
    SpanContext,
    SpanKind,
    otel_context_of,
    without_none,
)
from observability.export_environment import is_export_wanted
from observability.semantic_conventions import SCHEMA_URL

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

    from observability.span_export import ExportCounts, SpanPipeline

_tracer: trace.Tracer | None = None
_pipeline: "SpanPipeline | None" = None
_service_name = ""
_identity: dict[str, str] = {}
"""What the process called itself in `configure`."""
_listeners: "list[SpanProcessor]" = []

_OTEL_KINDS = {
    SpanKind.INTERNAL: trace.SpanKind.INTERNAL,
    SpanKind.SERVER: trace.SpanKind.SERVER,
    SpanKind.CLIENT: trace.SpanKind.CLIENT,
    SpanKind.PRODUCER: trace.SpanKind.PRODUCER,
    SpanKind.CONSUMER: trace.SpanKind.CONSUMER,
}


def span(
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Attributes | None = None,
    links: Iterable[SpanContext | Span] = (),
    parent: SpanContext | Span | None = None,
) -> "SpanScope":
    """Return a context manager that records a span and makes it the current one.

    Use it with plain `with`, also around awaits. What leaves it as an exception, a cancellation included,
    marks the span failed (`Span.fail`) and goes on. `parent` is the current span by default; `ROOT` begins a
    new trace. Attributes given here cost half of those set later.
    """
    if _tracer is None and parent is None:
        return _UNTRACED
    started, context = _start(name, kind, attributes, links, parent)
    return SpanScope(started, context)


def start_span(
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Attributes | None = None,
    links: Iterable[SpanContext | Span] = (),
    parent: SpanContext | Span | None = None,
) -> Span:
    """Return a span that begins now and is *not* the current one. The caller must `end()` it."""
    if _tracer is None and parent is None:
        current = trace.get_current_span()
        return NO_SPAN if current is trace.INVALID_SPAN else _passing_through(current.get_span_context())
    return _start(name, kind, attributes, links, parent)[0]


def current_span() -> Span:
    """Return the span of the innermost `with span(...)` around the caller, or one that records nothing."""
    current = trace.get_current_span()
    return NO_SPAN if current is trace.INVALID_SPAN else Span(current)


def current_trace_id() -> str:
    """Return the trace id of the current span, 32 hex digits, or "" when nothing is recorded."""
    return current_span().trace_id


class SpanScope:
    """What `span` returns: enter it to make the span current, leave it to end the span."""

    __slots__ = ("_context", "_span", "_token")

    def __init__(self, started: Span, context: Context) -> None:
        self._span = started
        self._context = context
        self._token: Token[Context] | None = None

    def __enter__(self) -> Span:
        self._token = otel_context.attach(self._context)
        return self._span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        if self._token is not None:
            otel_context.detach(self._token)
        self._span.end(error)


class _UntracedScope(SpanScope):
    """The scope of every span while tracing is off: one object, no state."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(NO_SPAN, Context())

    def __enter__(self) -> Span:
        return _passing_through(trace.get_current_span().get_span_context())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        pass


_UNTRACED = _UntracedScope()


def configure(service_name: str, *, instance_id: str, service_version: str) -> None:
    """Turn tracing on if the environment names a collector, else leave it off.

    Variables: OTEL_EXPORTER_OTLP_ENDPOINT or _TRACES_ENDPOINT (http:// is plain text), OTEL_TRACES_EXPORTER,
    OTEL_SDK_DISABLED, OTEL_TRACES_SAMPLER(_ARG), OTEL_BSP_*, OTEL_RESOURCE_ATTRIBUTES; README.md lists them
    with our defaults. OTEL_SERVICE_NAME wins over `service_name`. Call it after a fork, not before. A second
    call replaces the first, whose spans are flushed.

    Raises:
        ValueError: a variable of the exporter can't be used.
    """
    global _service_name, _pipeline, _identity
    shutdown()
    _service_name = service_name
    _identity = {
        "service.name": service_name,
        "service.instance.id": instance_id,
        "service.version": service_version,
    }
    if is_export_wanted():
        from observability.span_export import SpanPipeline, otlp_exporter

        _pipeline = SpanPipeline(otlp_exporter())
    _connect()


def listen(listener: "SpanProcessor") -> None:
    """Tell `listener` of every span that begins from now on, sampled or not, beside or without an export."""
    _listeners.append(listener)
    _connect()


def stop_listening(listener: "SpanProcessor") -> None:
    """Tell `listener` of no further spans. Without an export and another listener, tracing is off again."""
    _listeners.remove(listener)
    _connect()


def is_tracing() -> bool:
    """Return whether spans are recorded: `configure` found a collector to send them to, or somebody listens."""
    return _tracer is not None


def service_name() -> str:
    """Return the name that this process was configured with, or ""."""
    return _service_name


def export_counts() -> "ExportCounts | None":
    """Return how many spans ended, arrived and failed, or None while tracing is off."""
    return _pipeline.counts if _pipeline else None


def flush(timeout_s: float = 2.0) -> bool:
    """Send the spans that have ended. Blocks for at most `timeout_s`.

    Beside an event loop, call it in a thread. Returns True if all arrived in time (or tracing is off).
    """
    return _pipeline.flush(timeout_s) if _pipeline else True


def shutdown(timeout_s: float = 2.0) -> None:
    """Send the spans that have ended and turn tracing off. Blocks for at most about `timeout_s`.

    Runs by itself when the interpreter exits. `configure` may be called again afterwards.
    """
    global _pipeline, _service_name, _identity
    pipeline, _pipeline = _pipeline, None
    _identity = {}
    _connect()
    if pipeline:
        pipeline.close(timeout_s)
    _service_name = ""


atexit.register(shutdown)


def _connect() -> None:
    """Make the tracer anew, for the export and the listeners that there are; none if there are none."""
    global _service_name, _tracer
    _tracer = None
    if not _pipeline and not _listeners:
        return
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    resource = Resource.create({**_identity, **OTELResourceDetector().detect().attributes})
    if _identity:
        _service_name = str(resource.attributes["service.name"])
    provider = TracerProvider(resource=resource, sampler=ALWAYS_ON if _listeners else None, shutdown_on_exit=False)
    for processor in (*([_pipeline] if _pipeline else []), *_listeners):
        provider.add_span_processor(processor)
    _tracer = provider.get_tracer("nixlbus", _identity.get("service.version", ""), SCHEMA_URL)


def _start(
    name: str,
    kind: SpanKind,
    attributes: Attributes | None,
    links: Iterable[SpanContext | Span],
    parent: SpanContext | Span | None,
) -> tuple[Span, Context]:
    """Return a span that has begun, and the context in which it is the current one."""
    base, parent_otel = _parent_of(parent)
    if _tracer is None:
        started = _passing_through(parent_otel)
    else:
        otel_links = [trace.Link(target) for link in links if (target := otel_context_of(link)).is_valid]
        above = trace.set_span_in_context(trace.NonRecordingSpan(parent_otel), base)
        started = Span(_tracer.start_span(name, above, _OTEL_KINDS[kind], without_none(attributes), otel_links))
    return started, trace.set_span_in_context(started.otel, base)


def _parent_of(parent: SpanContext | Span | None) -> tuple[Context, trace.SpanContext]:
    """Return what the new span inherits besides its parent (baggage), and the parent's address."""
    if parent is None:
        return otel_context.get_current(), trace.get_current_span().get_span_context()
    if isinstance(parent, SpanContext):
        return parent.otel_base or Context(), parent.otel
    return otel_context.get_current(), parent.otel.get_span_context()


def _passing_through(otel: trace.SpanContext) -> Span:
    """Return a span that records nothing but keeps a peer's trace connected across this process."""
    return Span(trace.NonRecordingSpan(otel)) if otel.is_valid else NO_SPAN


def _ignore_foreign_detach(record: logging.LogRecord) -> bool:
    """Drop one harmless error: a generator with a span inside, closed from another task than it ran in.

    Its context is gone with its task, so there is nothing to restore, but `opentelemetry` logs a traceback.
    """
    return record.msg != "Failed to detach context"


logging.getLogger("opentelemetry.context").addFilter(_ignore_foreign_detach)
