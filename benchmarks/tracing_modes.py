"""Tracing off, sampled out, and at 100 %, switched within one process; and what the process used of the processor."""

import asyncio
import os
import time

import observability

_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG")


async def set_tracing(ratio: float | None, endpoint: str, name: str) -> dict[str, int]:
    """Trace `ratio` of the requests that begin here, or nothing (None). Returns what the mode before exported."""
    counts = await flushed()
    await asyncio.to_thread(observability.shutdown)
    for variable in _VARIABLES:
        os.environ.pop(variable, None)
    if ratio is not None:
        values = (endpoint, "parentbased_traceidratio", str(ratio))
        os.environ.update(dict(zip(_VARIABLES, values, strict=True)))
    observability.configure(name, instance_id=name, service_version="1")
    return counts


async def processor_seconds() -> float:
    """The processor time of this process so far, in seconds, what tracing has still to export included."""
    await flushed()
    return time.process_time()


async def flushed() -> dict[str, int]:
    """Wait until every span that has ended is exported, and count them."""
    await asyncio.to_thread(observability.flush, 30)
    counts = observability.export_counts()
    return {"ended": counts.ended, "exported": counts.exported} if counts else {"ended": 0, "exported": 0}
