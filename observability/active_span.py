"""A span that is being recorded, and its address: what other packages hold instead of `opentelemetry`.

In: an `opentelemetry` span made by `tracing`. Out: attributes, events, links, errors and the end of that
span; its `SpanContext` for links and parents.
Invariants: no method raises or logs, whatever the state of the span (not recording, ended, ended twice); a
span that records nothing costs a method call.
Leaves out: making spans and the current one (`tracing`), headers (`propagation`), finished spans
(`span_record`).
Source: OpenTelemetry trace API; `error.type` and exception events after semantic conventions 1.44.0.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context

from observability.passing_span import PassingSpan
from observability.semantic_conventions import ERROR_TYPE, ERROR_TYPE_CANCELLED, ERROR_TYPE_OTHER

AttributeValue = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]
Attributes = Mapping[str, AttributeValue | None]
"""Attributes of a span, event or link. An attribute whose value is None is left out."""

LazyAttributes = Attributes | Callable[[], Mapping[str, Any]]
"""Attributes, or what makes them: called only for a span that is recorded."""


class SpanKind(Enum):
    """The side of a call that a span stands for; OpenTelemetry's five kinds."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"
    PRODUCER = "producer"
    CONSUMER = "consumer"


class SpanContext:
    """The address of a span, in this process or another: opaque, hashable, equal by trace id and span id.

    Pass it as `parent=` or in `links=`. It is falsy when it addresses no span.
    """

    __slots__ = ("otel_base", "otel_span")

    def __init__(self, otel_span: trace.Span, otel_base: Context | None = None) -> None:
        """`otel_span` and `otel_base` (what else came with the headers: baggage) are for this package alone."""
        self.otel_span = otel_span
        self.otel_base = otel_base

    @property
    def otel(self) -> trace.SpanContext:
        """For this package alone."""
        return self.otel_span.get_span_context()

    @property
    def trace_id(self) -> str:
        """32 hex digits, or "" when it addresses no span."""
        return f"{self.otel.trace_id:032x}" if self.otel.is_valid else ""

    @property
    def span_id(self) -> str:
        """16 hex digits, or "" when it addresses no span."""
        return f"{self.otel.span_id:016x}" if self.otel.is_valid else ""

    @property
    def is_sampled(self) -> bool:
        """Whether whoever made that span exports it."""
        return self.otel.trace_flags.sampled

    def __bool__(self) -> bool:
        return isinstance(self.otel_span, PassingSpan) or self.otel.is_valid

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SpanContext):
            return NotImplemented
        return (self.otel.trace_id, self.otel.span_id) == (other.otel.trace_id, other.otel.span_id)

    def __hash__(self) -> int:
        return hash((self.otel.trace_id, self.otel.span_id))

    def __repr__(self) -> str:
        return f"SpanContext(trace_id={self.trace_id!r}, span_id={self.span_id!r})"


ROOT = SpanContext(trace.INVALID_SPAN)
"""As `parent=`: begin a new trace, whatever the current span is."""


class Span:
    """A span being recorded. Safe to use from any thread; every method is a no-op once it has ended."""

    __slots__ = ("otel",)

    def __init__(self, otel: trace.Span) -> None:
        """`otel` is for this package alone: `tracing.span` and `tracing.start_span` make spans."""
        self.otel = otel

    def set(self, attributes: Attributes) -> None:
        """Add attributes, replacing those of the same name."""
        if self.otel.is_recording():
            self.otel.set_attributes(without_none(attributes) or {})

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Add an event at the current time."""
        if self.otel.is_recording():
            self.otel.add_event(name, without_none(attributes))

    def link(self, context: "SpanContext | Span") -> None:
        """Point at a span of this or another trace. A context that addresses no span is left out."""
        if self.otel.is_recording() and (target := otel_context_of(context)).is_valid:
            self.otel.add_link(target)

    def fail(self, error: BaseException | str) -> None:
        """Mark the span as failed: status error, `error.type` and, for an exception, an exception event.

        `error.type` is the `code` of the exception's class where that is a string, "cancelled" for a
        cancellation, else the name of the class; for a text it is the conventions' `_OTHER`.
        """
        if not self.otel.is_recording():
            return
        if isinstance(error, BaseException):
            self.otel.record_exception(error, escaped=True)
        self.otel.set_attribute(ERROR_TYPE, error_type(error))
        self.otel.set_status(trace.StatusCode.ERROR, str(error) or type(error).__name__)

    def end(self, error: BaseException | str | None = None) -> None:
        """End the span, failed if `error` is given. The second and later calls do nothing."""
        if not self.otel.is_recording():
            return
        if error is not None:
            self.fail(error)
        self.otel.end()

    @property
    def context(self) -> SpanContext:
        """The span's address, for links and parents."""
        return SpanContext(self.otel)

    @property
    def trace_id(self) -> str:
        """32 hex digits, or "" for a span that is not recorded (tracing off, not sampled)."""
        return self.context.trace_id if self._is_recorded else ""

    @property
    def span_id(self) -> str:
        """16 hex digits, or "" for a span that is not recorded."""
        return self.context.span_id if self._is_recorded else ""

    @property
    def is_recording(self) -> bool:
        """Whether what is set now will be exported: worth asking before computing a costly attribute."""
        return self.otel.is_recording()

    @property
    def _is_recorded(self) -> bool:
        return not isinstance(self.otel, trace.NonRecordingSpan)

    def __repr__(self) -> str:
        return f"Span(trace_id={self.trace_id!r}, span_id={self.span_id!r})"


NO_SPAN = Span(trace.INVALID_SPAN)
"""The span of everything that is not traced."""


def error_type(error: BaseException | str) -> str:
    """Return the low-cardinality name of an error, as `Span.fail` describes it."""
    if isinstance(error, str):
        return ERROR_TYPE_OTHER
    # GeneratorExit: whoever read a streamed reply stopped reading.
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return ERROR_TYPE_CANCELLED
    code = getattr(type(error), "code", None)
    return code if isinstance(code, str) else type(error).__name__


def otel_context_of(source: SpanContext | Span) -> trace.SpanContext:
    """Return the address of a span or of a context in `opentelemetry`'s form. For this package alone."""
    return source.otel if isinstance(source, SpanContext) else source.otel.get_span_context()


def without_none(attributes: Attributes | None) -> dict[str, Any] | None:
    """Return the attributes that have a value, or None when there are none."""
    if not attributes:
        return None
    return {name: value for name, value in attributes.items() if value is not None}
