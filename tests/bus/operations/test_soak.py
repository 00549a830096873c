"""Many operations in a row: nothing grows."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bus import Bus, BusConfig, EmbeddedServer
from tests.bus.operations.two_processes import is_written, peer_process, tell

AT_ONCE = 20
WARM_UP = 600
SIZES = (64, 4096, 100_000)


@pytest.fixture(scope="module")
def peer_pid(server: EmbeddedServer, key_file: str) -> Iterator[int]:
    with peer_process(server, key_file, "tireless") as (process, _):
        yield process.pid


def footprint(pid: int) -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "rss_kib": int(status["VmRSS"].split()[0]),
    }


@pytest.mark.parametrize("num_operations", [2000, pytest.param(20_000, marks=[pytest.mark.full])])
@pytest.mark.timeout(600)
async def test_soak(server: EmbeddedServer, key_file: str, peer_pid: int, num_operations: int) -> None:
    config = BusConfig(worker_id=f"soaked-{num_operations}", nats_url=server.url, key_file=key_file, checksum=True)
    async with Bus.open(config) as bus:

        async def operate(count: int) -> None:
            for number in range(count):
                with bus.arena.allocate([SIZES[number % len(SIZES)]], torch.uint8) as memory:
                    memory.tensor.zero_()
                    writable = await bus.create_writable(memory)
                    await tell(bus, "write", writable.metadata, peer="tireless")
                    await writable
                    assert is_written(memory.tensor)
                    often = number % 10 != 0
                    readable = await bus.create_readable(memory if often else bytearray(memory.tensor.numpy()))
                    await tell(bus, "read", readable.metadata, peer="tireless")
                    await readable

        async def together(count: int) -> None:
            await asyncio.gather(*(operate(count // AT_ONCE // 2) for _ in range(AT_ONCE)))

        await together(WARM_UP)
        before = [footprint(pid) for pid in (os.getpid(), peer_pid)]
        counters = bus.stats()
        await together(num_operations)
        after = [footprint(pid) for pid in (os.getpid(), peer_pid)]
        stats = bus.stats()
    for earlier, later in zip(before, after, strict=True):
        assert later["descriptors"] <= earlier["descriptors"] + 2  # the library's own, not one each
        assert later["threads"] <= earlier["threads"] + 2  # the pool that checksums run in may grow to its bound
        assert later["rss_kib"] <= earlier["rss_kib"] * 1.1 + 20_000
    assert stats["registrations_foreign"] <= 1
    assert stats["arena_used_bytes"] == stats["grants_open"] == stats["operations_under_way"] == 0
    assert stats["processes_watched"] == counters["processes_watched"]
