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
from random import getrandbits
from types import TracebackType
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from observability.active_span import (
    NO_SPAN,
    LazyAttributes,
    Span,
    SpanContext,
    SpanKind,
    otel_context_of,
    without_none,
)
from observability.export_environment import is_export_wanted
from observability.passing_span import PassingSpan, passing_span_of, unsampled_root
from observability.sampling import HeadSampler
from observability.semantic_conventions import SCHEMA_URL

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

    from observability.span_export import ExportCounts, SpanPipeline
    from observability.trace_ids import TraceIds

_tracer: trace.Tracer | None = None
_sampler = HeadSampler()
_trace_ids: "TraceIds | None" = None
_pipeline: "SpanPipeline | None" = None
_service_name = ""
_identity: dict[str, str] = {}
"""What the process called itself in `configure`."""
_listeners: "list[SpanProcessor]" = []

_EMPTY = Context()
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
    attributes: LazyAttributes | None = None,
    links: Iterable[SpanContext | Span] = (),
    parent: SpanContext | Span | None = None,
) -> "SpanScope":
    """Return a context manager that records a span and makes it the current one.

    Use it with plain `with`, also around awaits. What leaves it as an exception, a cancellation included,
    marks the span failed (`Span.fail`) and goes on. `parent` is the current span by default; `ROOT` begins a
    new trace. Attributes given here cost half of those set later; a function that makes them is only called for a
    span that is recorded.
    """
    if _tracer is None and parent is None:
        return _UNTRACED
    started, base = _start(name, kind, attributes, links, parent)
    return SpanScope(started, base)


def start_span(
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: LazyAttributes | None = None,
    links: Iterable[SpanContext | Span] = (),
    parent: SpanContext | Span | None = None,
) -> Span:
    """Return a span that begins now and is *not* the current one. The caller must `end()` it."""
    if _tracer is None and parent is None:
        current = trace.get_current_span()
        return NO_SPAN if current is trace.INVALID_SPAN else _passing_through(current)
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

    __slots__ = ("_base", "_span", "_token")

    def __init__(self, started: Span, base: Context | None) -> None:
        self._span = started
        self._base = base
        self._token: Token[Context] | None = None

    def __enter__(self) -> Span:
        self._token = otel_context.attach(trace.set_span_in_context(self._span.otel, self._base))
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
        current = trace.get_current_span()
        return NO_SPAN if current is trace.INVALID_SPAN else _passing_through(current)

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
    global _service_name, _sampler, _trace_ids, _tracer
    _tracer = None
    if not _pipeline and not _listeners:
        return
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider

    from observability.trace_ids import TraceIds

    resource = Resource.create({**_identity, **OTELResourceDetector().detect().attributes})
    if _identity:
        _service_name = str(resource.attributes["service.name"])
    _sampler = HeadSampler("always_on") if _listeners else HeadSampler.from_environment()
    _trace_ids = TraceIds()
    provider = TracerProvider(_sampler.for_sdk(), resource, shutdown_on_exit=False, id_generator=_trace_ids)
    for processor in (*([_pipeline] if _pipeline else []), *_listeners):
        provider.add_span_processor(processor)
    _tracer = provider.get_tracer("nixlbus", _identity.get("service.version", ""), SCHEMA_URL)


def _start(
    name: str,
    kind: SpanKind,
    attributes: LazyAttributes | None,
    links: Iterable[SpanContext | Span],
    parent: SpanContext | Span | None,
) -> tuple[Span, Context | None]:
    """Return a span that has begun, and the context in which it may be made the current one (None: the current)."""
    if isinstance(parent, SpanContext):
        above, base = parent.otel_span, parent.otel_base or _EMPTY
    else:
        above, base = trace.get_current_span() if parent is None else parent.otel, None
    if _tracer is None:
        return _passing_through(above), base
    if (dropped := _dropped(above)) is not None:
        return Span(dropped), base
    otel_links = [trace.Link(target) for link in links if (target := otel_context_of(link)).is_valid]
    context = None if parent is None else trace.set_span_in_context(above, base)
    values = without_none(attributes() if callable(attributes) else attributes)
    return Span(_tracer.start_span(name, context, _OTEL_KINDS[kind], values, otel_links)), base


def _dropped(above: trace.Span) -> PassingSpan | None:
    """Return what stands for a span that the sampler drops, below `above`; None for one to be recorded.

    It is the parent itself where there is one, as in a process with tracing off: a span that nobody sees needs no id.
    """
    if isinstance(above, PassingSpan):
        drops = not above.is_sampled if _sampler.follows_parent else _sampler.drops(above.trace_id)
        return above.not_sampled() if drops else None
    if above is trace.INVALID_SPAN or not (otel := above.get_span_context()).is_valid:
        return _dropped_root()
    drops = not otel.trace_flags.sampled if _sampler.follows_parent else _sampler.drops(otel.trace_id)
    if not drops or (passing := passing_span_of(above)) is None:
        return None
    return passing.not_sampled()


def _dropped_root() -> PassingSpan | None:
    """Return what stands for the first span of a trace that the sampler drops; None for one to be recorded."""
    if _sampler.keeps_all:
        return None
    trace_id = getrandbits(128) or 1
    if _sampler.drops(trace_id):
        return unsampled_root(trace_id)
    if _trace_ids is not None:
        _trace_ids.use(trace_id)
    return None


def _passing_through(otel_span: trace.Span) -> Span:
    """Return a span that records nothing but keeps a peer's trace connected across this process."""
    passing = passing_span_of(otel_span)
    return Span(passing) if passing else NO_SPAN


def _ignore_foreign_detach(record: logging.LogRecord) -> bool:
    """Drop one harmless error: a generator with a span inside, closed from another task than it ran in.

    Its context is gone with its task, so there is nothing to restore, but `opentelemetry` logs a traceback.
    """
    return record.msg != "Failed to detach context"


logging.getLogger("opentelemetry.context").addFilter(_ignore_foreign_detach)
