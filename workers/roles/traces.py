"""traces: a small trace store on the bus, for graphs that have no Jaeger beside them.

In: spans over OTLP/gRPC from every process of the graph. Out: one trace at a time to whoever asks on
`worker.traces.trace`; `nixlbus trace` does. Kept in memory, bounded, gone with the process.
"""

import contextlib
from typing import ClassVar

from bus import Bus, RequestRefused
from observability.receiver import OtlpReceiver
from observability.trace_store import TraceIncompleteError, TraceStore
from schemas.fault import FaultCode
from schemas.traces import TraceReply, TraceRequest
from workers.declaration import endpoint
from workers.roles.graph_worker import GraphWorker
from workers.settings import Settings

SETTLE_S = 5.0
"""How long a trace may take to become whole once it is asked for: exporters send every fraction of a second."""


class TracesWorker(GraphWorker):
    """Receives spans and answers for them."""

    role: ClassVar[str] = "traces"
    needs_data_plane: ClassVar[bool] = False

    def __init__(self, bus: Bus, settings: Settings) -> None:
        super().__init__(bus, settings)
        self.receiver = OtlpReceiver(settings.otlp_host, settings.otlp_port)

    @property
    def store(self) -> TraceStore:
        """The traces that came in."""
        return self.receiver.store

    async def start(self) -> None:
        """Listen for spans."""
        await self.receiver.__aenter__()

    async def stop(self) -> None:
        """Stop listening."""
        await self.receiver.__aexit__(None, None, None)

    @endpoint("trace", direct=True)
    async def trace(self, request: TraceRequest) -> TraceReply:
        """The spans of one trace, once no more of them are on their way."""
        trace_id = request.trace_id or self.store.last_trace_id()
        if not trace_id:
            raise RequestRefused(FaultCode.NOT_FOUND, "no trace has ended yet", remedy="send a request first")
        with contextlib.suppress(TraceIncompleteError):  # what came is shown, with its gaps
            await self.store.wait_for_complete(trace_id, SETTLE_S)
        spans = self.store.trace(trace_id)
        if not spans:
            raise RequestRefused(
                FaultCode.NOT_FOUND, f"no spans of trace {trace_id} are here", remedy="it may be older than the store"
            )
        return TraceReply(trace_id=trace_id, spans=[span.to_dict() for span in spans])
