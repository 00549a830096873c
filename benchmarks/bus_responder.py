"""The responder process of `benchmarks.bus`: every system answers the record it is sent, on a subject of its own.

python -m benchmarks.bus_responder NATS_URL
"""

import sys
from typing import Any

import nats
import nats.micro
from nats.aio.msg import Msg
from nats.micro.request import Request

from benchmarks.job_queues import OurJobs, RawJobs
from benchmarks.participant import obey, run
from benchmarks.record import Record
from benchmarks.tracing_modes import processor_seconds, set_tracing
from bus import Bus, BusConfig, EndpointConfig
from schemas.codec import decode, encode

RAW, RAW_TYPED, MICRO = "bench.raw", "bench.raw.typed", "bench.micro"
OURS = "echo"
GROUP = "bench"


async def respond() -> None:
    """Serve every system, then obey."""
    url = sys.argv[1]
    raw = await nats.connect(url)

    async def echo(message: Msg) -> None:
        await message.respond(message.data)

    async def echo_typed(message: Msg) -> None:
        await message.respond(encode(decode(message.data, Record)))

    async def echo_micro(request: Request) -> None:
        await request.respond(request.data)

    async def echo_ours(request: Record) -> Record:
        return request

    await raw.subscribe(RAW, cb=echo)
    await raw.subscribe(RAW_TYPED, cb=echo_typed)
    service = await nats.micro.add_service(raw, name="bench", version="1.0.0")
    await service.add_endpoint(name="echo", subject=MICRO, handler=echo_micro)
    async with Bus.open(BusConfig(worker_id="responder", nats_url=url), data_plane=False) as bus:
        subject = bus.subjects.graph(GROUP, OURS)
        # As many slots as requests at once; the others here have no bound at all, or answer one after the other.
        await bus.serve(EndpointConfig(OURS, subject, Record, queue_group="q", concurrency=32), echo_ours)
        await raw.flush()
        jobs = RawJobs(raw)

        orders: dict[str, Any] = {
            "tracing": set_tracing,
            "processor_seconds": processor_seconds,
            "work_raw": jobs.work,
            **{f"work_{name}": OurJobs(bus, name).work for name in ("default", "claimed", "idempotent")},
        }
        await obey(orders)
    await raw.close()


if __name__ == "__main__":
    run(respond)
