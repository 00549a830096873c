"""Trace ids for the SDK: random ones, or the one that a span was just decided on by.

In: a trace id that `tracing` drew to ask the sampler. Out: the same id for the root span that the SDK makes next in
this thread, so that both decide alike.
Leaves out: the decision (`sampling`). Imports the SDK: `tracing` imports this when there is an endpoint.
"""

import threading

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator


class TraceIds(RandomIdGenerator):
    """The SDK's random ids, but for a trace id that was drawn before."""

    def __init__(self) -> None:
        self._drawn = threading.local()

    def use(self, trace_id: int) -> None:
        """Make it the next trace id of this thread."""
        self._drawn.trace_id = trace_id

    def generate_trace_id(self) -> int:
        """The drawn one, once; else a random one."""
        drawn: int | None = self._drawn.__dict__.pop("trace_id", None)
        return super().generate_trace_id() if drawn is None else drawn
