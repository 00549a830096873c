"""Asking a trace store on the bus for the spans it received."""

from typing import Annotated, Any

from msgspec import Meta

from schemas.message import Message

TRACE_STORE_ID = "traces"
"""The worker id of the trace store: well known, so that a client finds it without discovery; one per bus."""


class TraceRequest(Message, frozen=True, kw_only=True, tag="trace.request"):
    """One trace by id, or the last one that ended."""

    trace_id: Annotated[str, Meta(pattern="^([0-9a-f]{32})?$")] = ""


class TraceReply(Message, frozen=True, kw_only=True, tag="trace.reply"):
    """The spans of one trace, as `nixlbus trace --json` prints them."""

    trace_id: str
    spans: list[dict[str, Any]]
