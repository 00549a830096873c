"""`nixlbus trace`: one request's waterfall, from the trace store on the bus."""

import msgspec

from bus import NoResponders
from observability.span_record import SpanRecord
from observability.waterfall import render_waterfall
from schemas.traces import TRACE_STORE_ID, TraceReply, TraceRequest
from workers.cli.client import OPERATOR, open_client
from workers.cli.output import Output

TIMEOUT_S = 10.0
"""The store itself waits up to 5 s for the rest of a trace."""


async def run(trace_id: str, nats: str | None, as_json: bool) -> int:
    """Fetch the trace and draw it; returns the exit status."""
    output = Output(as_json)
    async with open_client(OPERATOR, nats) as bus:
        subject = bus.subjects.worker(TRACE_STORE_ID, "trace")
        try:
            reply = await bus.request(subject, TraceRequest(trace_id=trace_id), TraceReply, timeout_s=TIMEOUT_S)
        except NoResponders:
            raise NoResponders(
                "no trace store answers on this bus",
                remedy="'nixlbus up' has one; elsewhere run 'nixlbus worker traces', or look in your Jaeger",
            ) from None
    output.result({"trace_id": reply.trace_id, "spans": reply.spans})
    output.text(render_waterfall([msgspec.convert(span, SpanRecord) for span in reply.spans]))
    return 0
