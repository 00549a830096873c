"""A span that isn't recorded here, known by the header that names it.

In: a traceparent that was checked, or ids made here. Out: the same header for the next message, and what
`opentelemetry` wants to know of a span only when it asks: most messages are neither recorded nor asked about.
Invariants: the header is version 00 and valid.
Leaves out: reading headers (`propagation`), deciding what is recorded (`sampling`).
"""

from random import getrandbits

from opentelemetry import trace
from opentelemetry.trace.span import TraceState

_TRACE_ID = slice(3, 35)
_SPAN_ID = slice(36, 52)
_FLAGS = slice(53, 55)
_SAMPLED_DIGITS = "13579bdf"


class PassingSpan(trace.NonRecordingSpan):
    """Somebody's span, or one of ours that is not sampled."""

    state: TraceState | None = None
    _built: trace.SpanContext | None = None

    def __init__(self, traceparent: str, state: TraceState | None = None) -> None:
        self.traceparent = traceparent
        """55 characters."""
        if state is not None:
            self.state = state

    @property
    def is_sampled(self) -> bool:
        """Whether whoever made the span exports it."""
        return self.traceparent[-1] in _SAMPLED_DIGITS

    @property
    def trace_id(self) -> int:
        """The trace's number."""
        return int(self.traceparent[_TRACE_ID], 16)

    def get_span_context(self) -> trace.SpanContext:
        """What `opentelemetry` calls its context."""
        if self._built is None:
            header = self.traceparent
            self._built = trace.SpanContext(
                self.trace_id,
                int(header[_SPAN_ID], 16),
                is_remote=True,
                trace_flags=trace.TraceFlags(int(header[_FLAGS], 16)),
                trace_state=self.state,
            )
        return self._built

    def not_sampled(self) -> "PassingSpan":
        """The same span as one that nobody exports, for a trace that stops being recorded here."""
        if not self.is_sampled:
            return self
        flags = int(self.traceparent[_FLAGS], 16) & ~trace.TraceFlags.SAMPLED
        return PassingSpan(f"{self.traceparent[: _FLAGS.start]}{flags:02x}", self.state)


def unsampled_root(trace_id: int) -> PassingSpan:
    """The first span of a trace that is not recorded, with a span id of its own."""
    return PassingSpan("00-%032x-%016x-00" % (trace_id, getrandbits(64) or 1))  # noqa: UP031  # half an f-string's time


def traceparent_of(otel: trace.SpanContext) -> str:
    """The header that names a valid span."""
    return f"00-{otel.trace_id:032x}-{otel.span_id:016x}-{otel.trace_flags:02x}"


def passing_span_of(span: trace.Span) -> PassingSpan | None:
    """A span as one that passes through, or None when it is no span."""
    if isinstance(span, PassingSpan):
        return span
    otel = span.get_span_context()
    return PassingSpan(traceparent_of(otel), otel.trace_state or None) if otel.is_valid else None
