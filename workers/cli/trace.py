"""`nixlbus trace`: one request's waterfall, from the trace store on the bus."""

import msgspec

from bus import Bus, BusConfig, NoResponders
from observability.span_record import SpanRecord
from observability.waterfall import render_waterfall
from schemas.traces import TraceReply, TraceRequest
from workers.cli.output import Output
from workers.cli.request import CONNECT_TIMEOUT_S
from workers.roles.traces import SETTLE_S, WORKER_ID


async def run(trace_id: str, nats: str | None, as_json: bool) -> int:
    """Fetch the trace and draw it; returns the exit status."""
    output = Output(as_json)
    config = BusConfig.from_env("trace", nats_url=nats, connect_timeout_s=CONNECT_TIMEOUT_S)
    async with Bus.open(config, data_plane=False) as bus:
        subject = bus.subjects.worker(WORKER_ID, "trace")
        try:
            reply = await bus.request(subject, TraceRequest(trace_id=trace_id), TraceReply, timeout_s=SETTLE_S + 5)
        except NoResponders:
            raise NoResponders(
                "no trace store answers on this bus",
                remedy="'nixlbus up' has one; elsewhere run 'nixlbus worker traces', or look in your Jaeger",
            ) from None
    output.result({"trace_id": reply.trace_id, "spans": reply.spans})
    output.text(render_waterfall([msgspec.convert(span, SpanRecord) for span in reply.spans]))
    return 0
