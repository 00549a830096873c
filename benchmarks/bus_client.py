"""The client process of `benchmarks.bus`: calls every system that `bus_responder` serves.

python -m benchmarks.bus_client NATS_URL
"""

import sys
from collections.abc import Awaitable, Callable
from typing import Any

import nats

from benchmarks.bus_responder import GROUP, MICRO, OURS, RAW, RAW_TYPED
from benchmarks.job_queues import OurJobs, RawJobs
from benchmarks.participant import obey, run, timed
from benchmarks.record import Record, example
from benchmarks.tracing_modes import flushed, processor_seconds, set_tracing
from bus import Bus, BusConfig
from schemas.codec import decode, encode

TIMEOUT_S = 10


async def call() -> None:
    """Connect, then obey."""
    url = sys.argv[1]
    raw = await nats.connect(url)
    record, payload = example(), encode(example())
    jobs = RawJobs(raw)
    async with Bus.open(BusConfig(worker_id="client", nats_url=url), data_plane=False) as bus:
        subject = bus.subjects.graph(GROUP, OURS)
        ours = {name: OurJobs(bus, name) for name in ("default", "claimed", "idempotent")}

        async def request_raw() -> None:
            await raw.request(RAW, payload, timeout=TIMEOUT_S)

        async def request_raw_typed() -> None:
            decode((await raw.request(RAW_TYPED, encode(record), timeout=TIMEOUT_S)).data, Record)

        async def request_micro() -> None:
            await raw.request(MICRO, payload, timeout=TIMEOUT_S)

        async def request_ours() -> None:
            await bus.request(subject, record, Record, timeout_s=TIMEOUT_S)

        async def submit_raw() -> None:
            await jobs.submit(payload)

        def submit(name: str) -> Callable[[], Awaitable[None]]:
            return lambda: ours[name].submit(record)

        calls: dict[str, Callable[[], Awaitable[None]]] = {
            "raw_nats": request_raw,
            "raw_nats_typed": request_raw_typed,
            "nats_micro": request_micro,
            "nixlbus": request_ours,
            "submit_raw": submit_raw,
            **{f"submit_{name}": submit(name) for name in ours},
        }

        async def many(system: str, count: int, concurrency: int) -> dict[str, Any]:
            taken = await timed(calls[system], count, concurrency)
            taken["spans"] = await flushed()
            return taken

        async def burst(count: int) -> dict[str, int]:
            import observability

            for _ in range(count):
                observability.start_span("one of many", attributes={"nixl.bytes": count}).end()
            return await flushed()

        async def create_jobs() -> None:
            await jobs.create()

        orders: dict[str, Any] = {
            "many": many,
            "tracing": set_tracing,
            "processor_seconds": processor_seconds,
            "burst": burst,
            "create_jobs": create_jobs,
        }
        await obey(orders)
    await raw.close()


if __name__ == "__main__":
    run(call)
