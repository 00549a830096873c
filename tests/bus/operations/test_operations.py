import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch

from bus import (
    BlockLayout,
    BlockPool,
    Bus,
    BusConfig,
    DataPlaneError,
    DeadlineExceeded,
    EmbeddedServer,
    NoResponders,
    NotContiguous,
    PoolExhausted,
    ReadOnlyMemory,
    RemoteFault,
    StaleGrant,
    write_key_file,
)
from bus.operations.lifecycle import GrantState
from schemas.operations import Initiator, RdmaMetadata
from tests.bus.operations.peer_process import Acted
from tests.bus.operations.two_processes import is_written, peer_process, tell

PROMPTLY_S = 1.0


@pytest.fixture(scope="module")
def peer_epoch(server: EmbeddedServer, key_file: str) -> Iterator[str]:
    with peer_process(server, key_file, "peer") as (_, epoch):
        yield epoch


@pytest.fixture
async def target(server: EmbeddedServer, key_file: str, peer_epoch: str) -> AsyncIterator[Bus]:
    config = BusConfig(worker_id="target", nats_url=server.url, key_file=key_file, arena_bytes=64 << 20)
    async with Bus.open(config) as bus:
        yield bus


@pytest.mark.parametrize("num_bytes", [1, 4096, 65_536, (1 << 20) + 3, 20 << 20])
async def test_a_write_and_a_read_move_exactly_the_bytes(target: Bus, num_bytes: int) -> None:
    with target.arena.allocate([num_bytes], torch.uint8) as memory:
        memory.tensor.fill_(255)
        writable = await target.create_writable(memory.descriptor)
        acted = await tell(target, "write", writable.metadata)
        ack = await writable
        assert acted.num_bytes == ack.num_bytes == num_bytes
        assert is_written(memory.tensor)
        readable = await target.create_readable(memory.descriptor)
        acted = await tell(target, "read", readable.metadata)
        await readable
        assert acted.total == int(memory.tensor.sum(dtype=torch.int64))
    assert target.stats()["arena_used_bytes"] == 0
    assert target.stats()["grants_open"] == 0


async def test_we_read_a_peer_s_memory(target: Bus) -> None:
    grant = (await tell(target, "grant", num_bytes=5000)).grant
    assert grant is not None
    with target.arena.allocate([5000], torch.uint8) as memory:
        report = await (await target.begin_read(grant, memory.descriptor))
        assert report.transfer.num_bytes == 5000
        assert bool((memory.tensor == 7).all())


async def test_scattered_blocks_are_written_in_the_order_of_their_tokens(target: Bus) -> None:
    layout = BlockLayout(3, 32, 16, 2, 16, torch.float32)
    pool = BlockPool(target.memory, layout)
    spoilers = [pool.allocate(16) for _ in range(8)]
    for spoiler in spoilers[::2]:
        spoiler.free()
    blocks = pool.allocate(5 * 16 + 7)
    assert blocks.block_ids == [0, 2, 4, 6, 8, 9]
    pool.storage.fill_(-1)
    writable = await target.create_writable(blocks.descriptor)
    acted = await tell(target, "write", writable.metadata)
    await writable
    assert acted.num_bytes == 3 * 2 * 87 * 2 * 16 * 4
    assert is_written(blocks.gather())
    untouched = [block for block in range(32) if block not in blocks.block_ids]
    assert bool((pool.storage[:, :, untouched] == -1).all())
    assert bool((pool.storage[:, :, 9, 7:] == -1).all())
    blocks.free()
    assert pool.num_free_blocks == 32 - 4
    with pytest.raises(PoolExhausted, match="29 KV blocks; 28 of 32 are free"):
        pool.allocate(29 * 16)


async def test_a_named_grant_needs_no_claim_and_is_for_its_initiator_alone(target: Bus, peer_epoch: str) -> None:
    with target.arena.allocate([4096], torch.uint8) as memory:
        named = await target.create_writable(memory.descriptor, initiator=Initiator(worker_id="peer", epoch=peer_epoch))
        await tell(target, "write", named.metadata)
        await named
        assert is_written(memory.tensor)
        other = await target.create_writable(memory.descriptor, initiator=Initiator(worker_id="peer", epoch="before"))
        with pytest.raises(RemoteFault, match="names another initiator"):
            await tell(target, "write", other.metadata)
        other.cancel()


async def test_what_does_not_pair_is_refused_and_nothing_is_posted(target: Bus) -> None:
    with target.arena.allocate([4096], torch.uint8) as memory:
        memory.tensor.fill_(1)
        readable = await target.create_readable(memory.descriptor)
        with pytest.raises(RemoteFault, match="does not pair"):
            await tell(target, "write", readable.metadata)
        writable = await target.create_writable(memory.descriptor)
        with pytest.raises(RemoteFault, match=r"4,097 bytes and the grant 4,096"):
            await tell(target, "wrong length", writable.metadata)
        readable.cancel()
        writable.cancel()
        assert bool((memory.tensor == 1).all())


async def test_only_contiguous_and_writable_memory_can_be_granted(target: Bus) -> None:
    with pytest.raises(ReadOnlyMemory):
        await target.create_writable(b"written by nobody")
    with target.arena.allocate([64, 64], torch.float32) as memory:
        with pytest.raises(NotContiguous, match="not contiguous"):
            await target.create_writable(memory.tensor.t())
        row = await target.create_writable(memory.tensor[3])
        assert row.metadata.num_bytes == 256
        row.cancel()
    foreign = torch.zeros(1000)
    target.register(foreign)
    (await target.create_writable(foreign)).cancel()


async def test_a_grant_that_ended_was_never_made_or_is_of_another_epoch_is_stale(target: Bus) -> None:
    import msgspec

    with target.arena.allocate([64], torch.uint8) as memory:
        operation = await target.create_writable(memory.descriptor)
        grant = operation.metadata
        never = msgspec.structs.replace(grant, operation_id="f" * 16)
        with pytest.raises(RemoteFault) as caught:
            await tell(target, "claim only", never)
        assert caught.value.fault.code == "stale_grant"
        old = msgspec.structs.replace(grant, epoch="0" * 16)
        with pytest.raises(RemoteFault, match="restarted since"):
            await tell(target, "claim only", old)
        await tell(target, "claim and release", grant)
        with pytest.raises(DataPlaneError, match="never_posted"):
            await operation
        with pytest.raises(RemoteFault, match="used already"):
            await tell(target, "claim only", grant)


async def test_a_grant_is_claimed_once(target: Bus) -> None:
    with target.arena.allocate([64], torch.uint8) as memory:
        operation = await target.create_writable(memory.descriptor, lease_s=5)
        answers = await asyncio.gather(
            *(tell(target, "claim only", operation.metadata) for _ in range(8)), return_exceptions=True
        )
        assert sum(isinstance(answer, Acted) for answer in answers) == 1
        assert sum(isinstance(answer, RemoteFault) for answer in answers) == 7
        operation.cancel()


async def test_forged_acks_are_dropped_and_the_grant_still_works(target: Bus) -> None:
    with target.arena.allocate([64], torch.uint8) as memory:
        operation = await target.create_writable(memory.descriptor)
        await tell(target, "forge an ack", operation.metadata)
        await asyncio.sleep(0.1)
        assert operation.state is GrantState.GRANTED
        assert target.stats()["acks_dropped"] == 2
        await tell(target, "write", operation.metadata)
        await operation


async def test_the_initiator_s_failure_wakes_the_target_at_once(target: Bus) -> None:
    with target.arena.allocate([64], torch.uint8) as memory:
        operation = await target.create_writable(memory.descriptor, lease_s=30)
        started_s = time.monotonic()
        await tell(target, "fail", operation.metadata)
        with pytest.raises(RemoteFault) as caught:
            await operation
        assert time.monotonic() - started_s < PROMPTLY_S
        assert "trouble" not in str(caught.value)  # an unexpected error tells nothing of the peer's inside
    assert target.stats()["arena_used_bytes"] == 0


async def test_an_unclaimed_grant_is_revoked_and_its_memory_is_free_at_once(target: Bus) -> None:
    memory = target.arena.allocate([64], torch.uint8)
    async with await target.create_writable(memory.descriptor) as operation:
        pass
    memory.free()
    assert operation.state is GrantState.REVOKED
    assert target.stats()["arena_used_bytes"] == 0
    with pytest.raises(StaleGrant):
        await operation


async def test_claimed_memory_stays_fenced_whatever_the_waiter_is_told(target: Bus) -> None:
    memory = target.arena.allocate([64], torch.uint8)
    operation = await target.create_writable(memory.descriptor, lease_s=20)
    await tell(target, "claim only", operation.metadata)
    operation.cancel()
    with pytest.raises(StaleGrant):
        await operation
    memory.free()
    assert operation.state is GrantState.QUARANTINED
    assert target.stats()["grants_quarantined"] == 1
    assert target.stats()["arena_used_bytes"] > 0


async def test_a_claim_that_is_never_used_goes_back_at_the_end_of_its_lease(target: Bus) -> None:
    memory = target.arena.allocate([64], torch.uint8)
    operation = await target.create_writable(memory.descriptor, lease_s=0.4)
    await tell(target, "claim only", operation.metadata)
    with pytest.raises((DeadlineExceeded, DataPlaneError)):
        await operation
    memory.free()
    async with asyncio.timeout(2):
        while target.stats()["arena_used_bytes"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_cancelled_wait_cancels_the_operation(target: Bus) -> None:
    with target.arena.allocate([64], torch.uint8) as memory:
        operation = await target.create_writable(memory.descriptor)
        waiting = asyncio.create_task(operation.wait())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert operation.state is GrantState.REVOKED


async def test_nothing_is_registered_or_introduced_on_the_hot_path(target: Bus) -> None:
    async def write() -> None:
        with target.arena.allocate([4096], torch.uint8) as memory:
            operation = await target.create_writable(memory.descriptor)
            await tell(target, "write", operation.metadata)
            await operation

    await write()
    before = target.stats()
    await asyncio.gather(*(write() for _ in range(200)))
    after = target.stats()
    assert after["registrations"] == before["registrations"] == 1
    assert after["handshakes"] == before["handshakes"]
    assert after["grants_open"] == after["arena_used_bytes"] == 0


async def test_many_at_once_share_one_handshake_and_small_transfers_go_inline(
    server: EmbeddedServer, key_file: str, peer_epoch: str
) -> None:
    async with Bus.open(BusConfig(worker_id="reader", nats_url=server.url, key_file=key_file)) as bus:
        grants = [(await tell(bus, "grant", num_bytes=512)).grant for _ in range(50)]

        async def read(grant: RdmaMetadata | None) -> int:
            assert grant is not None
            with bus.arena.allocate([512], torch.uint8) as memory:
                await (await bus.begin_read(grant, memory.descriptor))
                return int(memory.tensor.sum())

        assert await asyncio.gather(*(read(grant) for grant in grants)) == [7 * 512] * 50
        assert bus.stats()["handshakes"] == 1
        again = (await tell(bus, "grant", num_bytes=512)).grant
        inline = bus.stats()["transfers_posted_inline"]
        await read(again)
        assert bus.stats()["transfers_posted_inline"] == inline + 1


async def test_an_idle_worker_burns_no_processor(target: Bus) -> None:
    with target.arena.allocate([64], torch.uint8) as memory:
        operation = await target.create_writable(memory.descriptor, lease_s=30)
        before_s = time.process_time()
        await asyncio.sleep(1.0)
        assert time.process_time() - before_s < 0.2  # a polling progress thread alone takes 0.8 s
        operation.cancel()


async def test_a_worker_with_another_key_is_not_believed(
    server: EmbeddedServer, peer_epoch: str, tmp_path: Path
) -> None:
    write_key_file(tmp_path / "other")
    config = BusConfig(worker_id="stranger", nats_url=server.url, key_file=str(tmp_path / "other"))
    async with Bus.open(config) as bus:
        grant = (await tell(bus, "grant", num_bytes=64)).grant
        assert grant is not None
        with bus.arena.allocate([64], torch.uint8) as memory, pytest.raises(RemoteFault, match="no valid proof"):
            await bus.begin_read(grant, memory.descriptor)
        again = (await tell(bus, "grant", num_bytes=64)).grant
        assert again is not None
        with bus.arena.allocate([64], torch.uint8) as memory, pytest.raises(RemoteFault, match="no valid proof"):
            await bus.begin_read(again, memory.descriptor)
        assert bus.stats()["handshakes"] == 2  # the failed one was forgotten, not served again


async def test_a_killed_peer_is_told_promptly_and_costs_nothing_else(server: EmbeddedServer, key_file: str) -> None:
    own = BusConfig(worker_id="survivor", nats_url=server.url, key_file=key_file)
    with peer_process(server, key_file, "victim") as (process, _):
        async with Bus.open(own) as bus:
            grants = [(await tell(bus, "grant", num_bytes=64, peer="victim")).grant for _ in range(2)]
            assert grants[0] is not None
            assert grants[1] is not None
            with bus.arena.allocate([64], torch.uint8) as memory:
                await (await bus.begin_read(grants[0], memory.descriptor))
                process.kill()
                process.wait(10)
                started_s = time.monotonic()
                with pytest.raises((NoResponders, DataPlaneError, RemoteFault)):
                    await (await bus.begin_read(grants[1], memory.descriptor))
                assert time.monotonic() - started_s < PROMPTLY_S
            assert bus.stats()["arena_used_bytes"] == 0
            assert bus.stats()["operations_under_way"] == 0


async def test_a_claim_that_is_cancelled_midway_is_given_back(
    target: Bus, server: EmbeddedServer, key_file: str
) -> None:
    states = []
    async with Bus.open(BusConfig(worker_id="hasty", nats_url=server.url, key_file=key_file)) as hasty:
        with target.arena.allocate([64], torch.uint8) as memory:
            for step in range(40):
                operation = await target.create_writable(memory.descriptor, lease_s=20)
                claiming = asyncio.create_task(hasty.claim(operation.metadata))
                await asyncio.sleep(step * 0.00005)
                claiming.cancel()
                await asyncio.wait([claiming])
                if not claiming.cancelled():
                    claiming.result().release()
                async with asyncio.timeout(5):
                    while hasty.stats()["operations_under_way"] or operation.state is GrantState.CLAIMED:  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                states.append(operation.state)
                operation.cancel()
    assert GrantState.FAILED in states  # some were granted, and given back
    assert set(states) <= {GrantState.GRANTED, GrantState.FAILED}
    assert target.stats()["arena_used_bytes"] == target.stats()["grants_quarantined"] == 0
