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

from opentelemetry import baggage, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.trace.span import TraceState

from observability.active_span import Span, SpanContext
from observability.passing_span import PassingSpan, traceparent_of

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
BAGGAGE = "baggage"

_BAGGAGE_PROPAGATOR = W3CBaggagePropagator()

_PLAIN = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})(?P<ids>-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(?P<rest>-[\x21-\x7e]*)?",
    re.ASCII,
)
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
    otel_span = span.otel if span is not None else trace.get_current_span()
    if isinstance(otel_span, PassingSpan):
        headers[TRACEPARENT] = otel_span.traceparent
        state = otel_span.state
    else:
        otel = otel_span.get_span_context()
        if not otel.is_valid:
            return
        headers[TRACEPARENT] = traceparent_of(otel)
        state = otel.trace_state
    if state:
        headers[TRACESTATE] = state.to_header()
    if baggage.get_all():
        _BAGGAGE_PROPAGATOR.inject(headers)


def header_lines(span: Span) -> str:
    """Return what `inject` would put into headers as the lines of a header block, "" when there is no trace."""
    if isinstance(span.otel, PassingSpan) and span.otel.state is None and not baggage.get_all():
        return f"{TRACEPARENT}: {span.otel.traceparent}\r\n"
    headers: dict[str, str] = {}
    inject(headers, span)
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def extract(headers: Mapping[str, str] | None) -> SpanContext | None:
    """Return the span that a message's headers name, for `parent=`, or None.

    Names are matched whatever their case. A malformed traceparent counts as none; a malformed tracestate or
    baggage is left out alone.
    """
    if not headers:
        return None
    parent = state = members = None
    for name in headers:
        # By length first: most headers are none of the three, and lower() costs as much as the rest of this.
        length = len(name)
        if length == 11 and (name == TRACEPARENT or name.lower() == TRACEPARENT):
            parent = headers[name]
        elif length == 10 and name.lower() == TRACESTATE:
            state = headers[name]
        elif length == 7 and name.lower() == BAGGAGE:
            members = headers[name]
    header = _checked(parent)
    if header is None:
        return None
    if state is None and members is None:
        return SpanContext(PassingSpan(header))
    return SpanContext(PassingSpan(header, _parse_tracestate(_value(state))), _parse_baggage(_value(members)))


def span_context_of(traceparent: str) -> SpanContext | None:
    """Return the span that a traceparent names, which came without companions; None for a malformed one."""
    header = _checked(traceparent)
    return SpanContext(PassingSpan(header)) if header else None


def traceparent(span: Span | SpanContext) -> str:
    """Return the traceparent of a span, 55 characters, or "" when it has none.

    For carriers that are no headers, such as a NIXL notification; `extract({"traceparent": text})` reads it.
    """
    otel = span.otel if isinstance(span, SpanContext) else span.otel.get_span_context()
    return traceparent_of(otel) if otel.is_valid else ""


def _value(value: object) -> str | None:
    return value.strip(" \t") if isinstance(value, str) else None


def _checked(value: object) -> str | None:
    """Return a traceparent as version 00 writes it, or None for what is none."""
    if value is None:
        return None
    if type(value) is str and _PLAIN.fullmatch(value):
        return value
    if not isinstance(value, str) or (match := _TRACEPARENT.fullmatch(value.strip(" \t"))) is None:
        return None
    version, rest = match["version"], match["rest"]
    if version == "ff" or (version == "00" and rest):
        return None
    return f"00{match['ids']}"


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
