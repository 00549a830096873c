"""The trace in a message's headers: W3C Trace Context and Baggage, as plain lower-case keys.

In: the current span, or the headers of a message. Out: headers to send, or the `SpanContext` to pass as
`parent=`.
Invariants: `inject` writes nothing when there is no trace; a span that was not sampled *is* written, with its
flag off, so that no peer begins a trace of its own in the middle of a request; `extract` never raises and
never logs, whatever a peer sent.
Leaves out: which headers a NATS message has besides.
Source: https://www.w3.org/TR/trace-context/ (version 00, unknown versions read as 00) and
https://www.w3.org/TR/baggage/.
"""

import re
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.trace.span import TraceState

from observability.active_span import Span, SpanContext

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
BAGGAGE = "baggage"

_BAGGAGE_PROPAGATOR = W3CBaggagePropagator()

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?", re.ASCII)
_TRACESTATE_MEMBER = re.compile(
    r"[a-z0-9][a-z0-9_\-*/]{0,240}(?:@[a-z][a-z0-9_\-*/]{0,13})?=[\x21-\x2b\x2d-\x3c\x3e-\x7e]{1,256}",
    re.ASCII,
)
_BAGGAGE_MEMBER = re.compile(r"[\w!#$%&'*+.^`|~\-]+=[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*", re.ASCII)
# The limits of the two specifications; more is dropped whole.
_MAX_TRACESTATE_MEMBERS = 32
_MAX_TRACESTATE_CHARACTERS = 512
_MAX_BAGGAGE_MEMBERS = 180
_MAX_BAGGAGE_CHARACTERS = 8192


def inject(headers: dict[str, str], span: Span | None = None) -> None:
    """Put the trace of `span`, or of the current span, into the headers of a message about to be sent."""
    otel = (span.otel if span is not None else trace.get_current_span()).get_span_context()
    if not otel.is_valid:
        return
    headers[TRACEPARENT] = _format(otel)
    if otel.trace_state:
        headers[TRACESTATE] = otel.trace_state.to_header()
    _BAGGAGE_PROPAGATOR.inject(headers)


def extract(headers: Mapping[str, str] | None) -> SpanContext | None:
    """Return the span that a message's headers name, for `parent=`, or None.

    Names are matched whatever their case. A malformed traceparent counts as none; a malformed tracestate or
    baggage is left out alone.
    """
    if not headers:
        return None
    lowered = {name.lower(): value for name, value in headers.items()}
    if (header := _value(lowered, TRACEPARENT)) is None:
        return None
    otel = _parse(header, _parse_tracestate(_value(lowered, TRACESTATE)))
    return SpanContext(otel, _parse_baggage(_value(lowered, BAGGAGE))) if otel else None


def traceparent(span: Span | SpanContext) -> str:
    """Return the traceparent of a span, 55 characters, or "" when it has none.

    For carriers that are no headers, such as a NIXL notification; `extract({"traceparent": text})` reads it.
    """
    otel = span.otel if isinstance(span, SpanContext) else span.otel.get_span_context()
    return _format(otel) if otel.is_valid else ""


def _format(otel: trace.SpanContext) -> str:
    return f"00-{otel.trace_id:032x}-{otel.span_id:016x}-{otel.trace_flags:02x}"


def _value(headers: Mapping[str, str], name: str) -> str | None:
    value = headers.get(name)
    return value.strip(" \t") if isinstance(value, str) else None


def _parse(header: str, state: TraceState | None) -> trace.SpanContext | None:
    match = _TRACEPARENT.fullmatch(header)
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest):
        return None
    otel = trace.SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(flags, 16)),
        trace_state=state,
    )
    return otel if otel.is_valid else None


def _parse_tracestate(header: str | None) -> TraceState | None:
    if not header or len(header) > _MAX_TRACESTATE_CHARACTERS:
        return None
    members = [member.strip(" \t") for member in header.split(",")]
    if len(members) > _MAX_TRACESTATE_MEMBERS or not all(map(_TRACESTATE_MEMBER.fullmatch, members)):
        return None
    entries = [(key, value) for key, _, value in (member.partition("=") for member in members)]
    return TraceState(entries) if len({key for key, _ in entries}) == len(entries) else None


def _parse_baggage(header: str | None) -> Context | None:
    if not header or len(header) > _MAX_BAGGAGE_CHARACTERS:
        return None
    members = [member.strip(" \t") for member in header.split(",")]
    if len(members) > _MAX_BAGGAGE_MEMBERS or not all(map(_BAGGAGE_MEMBER.fullmatch, members)):
        return None
    return _BAGGAGE_PROPAGATOR.extract({BAGGAGE: ",".join(members)}, Context())
