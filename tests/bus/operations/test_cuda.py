"""Device memory, where there is some. Not run by `make test`."""

import pytest
import torch

from bus import Bus, BusConfig, Descriptor, Device, EmbeddedServer, LocalProtocolError
from tests.bus.operations.two_processes import is_written, peer_process, tell

pytestmark = pytest.mark.gpu


async def test_a_peer_writes_and_reads_device_memory(server: EmbeddedServer, key_file: str) -> None:
    config = BusConfig(worker_id="device", nats_url=server.url, key_file=key_file)
    with peer_process(server, key_file, "peer"):
        async with Bus.open(config) as bus:
            memory = torch.zeros(5 << 20, dtype=torch.uint8, device="cuda:0")
            assert Descriptor(memory).device == Device("cuda:0")
            writable = await bus.create_writable(memory)
            await tell(bus, "write", writable.metadata)
            await writable
            assert is_written(memory.cpu())
            readable = await bus.create_readable(memory)
            acted = await tell(bus, "read", readable.metadata)
            await readable
            assert acted.total == int(memory.sum(dtype=torch.int64))


async def test_a_transfer_comes_after_what_its_stream_was_asked_before(server: EmbeddedServer, key_file: str) -> None:
    config = BusConfig(worker_id="device", nats_url=server.url, key_file=key_file)
    other = BusConfig(worker_id="target", nats_url=server.url, key_file=key_file)
    async with Bus.open(config) as bus, Bus.open(other) as target:
        received = torch.zeros(1 << 20, dtype=torch.uint8)
        source = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda:0")
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # tenths of a second, then the value
        source.fill_(7)
        writable = await target.create_writable(received)
        await (await bus.begin_write(writable.metadata, source))
        await writable
        assert bool((received == 7).all())


async def test_checksums_are_for_host_memory(server: EmbeddedServer, key_file: str) -> None:
    async with Bus.open(BusConfig(worker_id="device", nats_url=server.url, key_file=key_file)) as bus:
        with pytest.raises(LocalProtocolError, match="host memory"):
            await bus.create_writable(torch.zeros(64, device="cuda:0"), checksum=True)
