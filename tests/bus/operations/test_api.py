"""What an operation can be given, and where it can be awaited; the other side is always a process of its own."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bus import (
    Bus,
    BusConfig,
    Deadline,
    DeadlineExceeded,
    Descriptor,
    Device,
    DeviceKind,
    Draining,
    EmbeddedServer,
    ForeignGrant,
    IncompleteOperation,
    InvalidDescriptor,
    LeaseExpired,
    LocalProtocolError,
    NotContiguous,
    OperationReport,
    OperationStatus,
    PoolExhausted,
    ReadOnlyMemory,
    StaleGrant,
    WrongLayout,
    WrongLength,
    WrongPairing,
)
from bus.deadline import working_under
from bus.operations.lifecycle import GrantState
from schemas.operations import Initiator
from tests.bus.operations.two_processes import peer_process, tell


@pytest.fixture(scope="module")
def peers(server: EmbeddedServer, key_file: str) -> Iterator[list[str]]:
    with peer_process(server, key_file, "peer"), peer_process(server, key_file, "second"):
        yield ["peer", "second"]


@pytest.fixture
async def bus(server: EmbeddedServer, key_file: str, peers: list[str]) -> AsyncIterator[Bus]:
    config = BusConfig(
        worker_id="target", nats_url=server.url, key_file=key_file, checksum=True, max_foreign_registrations=4
    )
    async with Bus.open(config) as opened:
        yield opened


def counted(num_bytes: int) -> bytes:
    return bytes(index % 251 for index in range(num_bytes))


def status_of(operation: Any) -> OperationStatus:
    status: OperationStatus = operation.status
    return status


MEMORIES: dict[str, Any] = {
    "torch": lambda: torch.zeros(1000, dtype=torch.uint8),
    "torch of another dtype": lambda: torch.zeros(5, 50, dtype=torch.float32),
    "a slice of a torch tensor": lambda: torch.zeros(7, 1000, dtype=torch.uint8)[3],
    "numpy": lambda: np.zeros((10, 100), dtype=np.uint8),
    "a slice of an array": lambda: np.zeros((10, 500), dtype=np.int16)[4],
    "bytearray": lambda: bytearray(1000),
    "memoryview": lambda: memoryview(bytearray(3000))[1000:2000],
    "list": lambda: [torch.zeros(10, 10, dtype=torch.uint8), bytearray(850), np.zeros(50, dtype=np.uint8)],
}


def contents(memory: Any) -> bytes:
    if isinstance(memory, list):
        return b"".join(contents(piece) for piece in memory)
    if isinstance(memory, torch.Tensor):
        return bytes(memory.flatten().view(torch.uint8).numpy())
    return bytes(memory) if not isinstance(memory, np.ndarray) else memory.tobytes()


@pytest.mark.parametrize("kind", MEMORIES)
async def test_any_contiguous_memory_can_be_written_and_read(bus: Bus, kind: str) -> None:
    memory = MEMORIES[kind]()
    writable = await bus.create_writable(memory)
    assert (await tell(bus, "write", writable.metadata)).num_bytes == 1000
    await writable
    assert contents(memory) == counted(1000)
    readable = await bus.create_readable(memory)
    assert (await tell(bus, "read", readable.metadata)).total == sum(counted(1000))
    await readable
    assert bus.stats()["grants_open"] == 0


async def test_an_address_with_its_owner_and_read_only_bytes_as_a_source(bus: Bus) -> None:
    owner = np.zeros(64, dtype=np.uint8)
    writable = await bus.create_writable(Descriptor((owner.ctypes.data, 64), owner=owner))
    await tell(bus, "write", writable.metadata)
    await writable
    assert owner.tobytes() == counted(64)
    readable = await bus.create_readable(b"read-only bytes")
    assert (await tell(bus, "read", readable.metadata)).total == sum(b"read-only bytes")
    await readable


async def test_a_descriptor_can_be_used_again_and_is_registered_once(bus: Bus) -> None:
    descriptor = Descriptor(torch.zeros(4096, dtype=torch.uint8))
    before = bus.stats()["registrations"]
    for _ in range(5):
        writable = await bus.create_writable(descriptor)
        await tell(bus, "write", writable.metadata)
        await writable
    assert bus.stats()["registrations"] == before + 1


async def test_foreign_memory_is_deregistered_when_its_owner_lets_go_and_not_before(bus: Bus) -> None:
    storage = torch.zeros(8, 512, dtype=torch.uint8)
    first = await bus.create_writable(storage[0])
    second = await bus.create_writable(storage[5])
    assert bus.stats()["registrations_foreign"] == 1  # the whole allocation
    await tell(bus, "claim only", first.metadata)
    first.cancel()
    second.cancel()
    del storage, second
    gc.collect()
    assert bus.stats()["registrations_foreign"] == 1  # fenced: a peer may still write it
    await tell(bus, "claim and release", (await bus.create_writable(bytearray(8))).metadata)
    lane = bus._lane()
    lane.grants.initiator_gone(first.outcomes[0].initiator or Initiator(worker_id="", epoch=""))
    assert first.state is GrantState.RELEASED
    del first
    gc.collect()
    assert bus.stats()["registrations_foreign"] == 0


async def test_foreign_registrations_are_bounded_and_the_longest_idle_makes_room(bus: Bus) -> None:
    kept = [torch.zeros(64, dtype=torch.uint8) for _ in range(5)]
    operations = [await bus.create_writable(tensor) for tensor in kept[:4]]
    with pytest.raises(PoolExhausted, match="4 registrations"):
        await bus.create_writable(kept[4])
    operations[1].cancel()
    (await bus.create_writable(kept[4])).cancel()
    assert bus.stats()["registrations_foreign"] == 4
    assert bus.stats()["deregistrations"] == 1
    for operation in operations:
        operation.cancel()


async def test_memory_that_can_t_be_described_is_refused_before_anything_else(bus: Bus) -> None:
    bad: Any
    for bad in (torch.zeros(4, 4).t(), np.zeros((4, 4))[:, 1], [torch.zeros(4), torch.zeros(4, 4)[:, 0]]):
        with pytest.raises(NotContiguous, match="not contiguous"):
            await bus.create_readable(bad)
    for bad in (torch.zeros(0), b"", 7, "text", (1, 2, 3), (4096, 0), (4096, 64), object()):
        with pytest.raises(InvalidDescriptor):
            await bus.create_readable(bad)
    with pytest.raises(LocalProtocolError, match="at least one"):
        await bus.create_readable([])
    with pytest.raises(ReadOnlyMemory):
        await bus.create_writable([bytearray(4), b"read-only"])
    for name in ("gpu", "cpu:1", "cuda:x", "cuda:-1", ""):
        with pytest.raises(InvalidDescriptor):
            Device(name)
    assert (Device("cuda:3").kind, Device("cuda:3").id) == (DeviceKind.CUDA, 3)
    assert Device("cpu") == Device("cpu") != Device("cuda")
    assert bus.stats()["grants_open"] == 0


async def test_each_mismatch_has_an_error_of_its_own_and_posts_nothing(bus: Bus) -> None:
    grant = (await tell(bus, "grant", num_bytes=64)).grant
    assert grant is not None
    posted = bus.stats()["transfers_posted_inline"] + bus.stats()["transfers_posted_by_thread"]
    with pytest.raises(WrongPairing):
        await bus.begin_write(grant, bytearray(64))
    with pytest.raises(WrongLength, match="65 bytes and the grant 64"):
        await bus.begin_read(grant, bytearray(65))
    with pytest.raises(ReadOnlyMemory):
        await bus.begin_read(grant, bytes(64))
    own = await bus.create_readable(torch.zeros(4, 4))
    with pytest.raises(WrongLayout, match=r"float32 \[2, 8\] and the grant float32 \[4, 4\]"):
        await bus.begin_read(own.metadata, torch.zeros(2, 8))
    with pytest.raises(WrongLayout, match="int32"):
        await bus.begin_read(own.metadata, torch.zeros(4, 4, dtype=torch.int32))
    own.cancel()
    foreign = await bus.create_readable(bytes(64), initiator=Initiator(worker_id="another", epoch="e"))
    with pytest.raises(ForeignGrant):
        await bus.begin_read(foreign.metadata, bytearray(64))
    foreign.cancel()
    own = await bus.create_readable(b"to ourselves")  # a member of a queue group may meet itself
    into = bytearray(12)
    await (await bus.begin_read(own.metadata, into))
    await own
    assert into == b"to ourselves"
    posted += 1
    short = await bus.create_readable(bytes(64), lease_s=0.03)
    with pytest.raises(LeaseExpired):
        await bus.begin_read(short.metadata, bytearray(64))
    await asyncio.sleep(0.05)
    with pytest.raises(LeaseExpired, match="is over"):
        await bus.begin_read(short.metadata, bytearray(64))
    assert posted == bus.stats()["transfers_posted_inline"] + bus.stats()["transfers_posted_by_thread"]


async def test_one_memory_is_read_by_several(bus: Bus, peers: list[str]) -> None:
    readable = await bus.create_readable(b"for two", max_claims=2)
    totals = await asyncio.gather(*(tell(bus, "read", readable.metadata, peer=peer) for peer in peers))
    assert [acted.total for acted in totals] == [sum(b"for two")] * 2
    await readable
    assert {outcome.initiator.worker_id for outcome in readable.outcomes if outcome.initiator} == set(peers)
    assert all(outcome.state is GrantState.COMPLETE for outcome in readable.outcomes)


async def test_of_several_readers_the_missing_are_revoked_at_the_lease_and_told(bus: Bus, peers: list[str]) -> None:
    readable = await bus.create_readable(b"for three", max_claims=3, lease_s=1.0)
    for peer in peers:
        await tell(bus, "read", readable.metadata, peer=peer)
    with pytest.raises(IncompleteOperation, match="2 of 3 peers"):
        await readable
    assert [outcome.ack is not None for outcome in readable.outcomes] == [True, True, False]
    assert bus.stats()["grants_open"] == 0
    with pytest.raises(LocalProtocolError, match="several claims"):
        await bus.create_readable(b"x", max_claims=2, initiator=Initiator(worker_id="peer", epoch="e"))
    with pytest.raises(LocalProtocolError, match="max_claims"):
        await bus.create_readable(b"x", max_claims=0)


async def test_one_memory_is_written_to_several_with_an_outcome_for_each(
    bus: Bus, server: EmbeddedServer, key_file: str
) -> None:
    async with Bus.open(BusConfig(worker_id="other", nats_url=server.url, key_file=key_file)) as other:
        targets = [torch.zeros(100, dtype=torch.uint8) for _ in range(3)]
        writables = [await other.create_writable(target, checksum=True) for target in targets]
        writables[1].cancel()
        outcomes = await bus.write_to_all([writable.metadata for writable in writables], counted(100))
        assert [isinstance(outcome, OperationReport) for outcome in outcomes] == [True, False, True]
        assert isinstance(outcomes[1], StaleGrant)
        await writables[0]
        await writables[2]
        assert [contents(target) == counted(100) for target in targets] == [True, False, True]


async def test_progress_is_told_and_ends_at_the_whole(bus: Bus) -> None:
    num_bytes = 20 << 20
    grant = (await tell(bus, "grant", num_bytes=num_bytes)).grant
    assert grant is not None
    seen: list[int] = []
    with bus.arena.allocate([num_bytes], torch.uint8) as memory:
        operation = await bus.begin_read(grant, memory, on_progress=seen.append)
        assert status_of(operation) is OperationStatus.IN_PROGRESS
        report = await operation
        assert status_of(operation) is OperationStatus.COMPLETE
        assert report.transfer.num_chunks == len(seen) == 3
        assert seen == sorted(set(seen))
        assert seen[-1] == num_bytes
        assert bool((memory.tensor == 7).all())


async def test_the_status_says_where_an_operation_is(bus: Bus) -> None:
    writable = await bus.create_writable(bytearray(8), lease_s=20)
    assert status_of(writable) is OperationStatus.INITIALIZED
    await tell(bus, "claim only", writable.metadata)
    assert status_of(writable) is OperationStatus.IN_PROGRESS
    writable.cancel()
    assert status_of(writable) is OperationStatus.CANCELLED
    overdue = await bus.create_writable(bytearray(8), lease_s=0.4)
    await asyncio.sleep(0.6)
    assert status_of(overdue) is OperationStatus.ERRORED


async def test_operations_of_several_threads_and_loops_do_not_meet(bus: Bus) -> None:
    failures: list[BaseException] = []

    async def operate(number: int) -> None:
        for size in (64, 5000, 3 << 20):
            with bus.arena.allocate([size], torch.uint8) as memory:
                memory.tensor.fill_(number)
                readable = await bus.create_readable(memory)
                asking = asyncio.run_coroutine_threadsafe(tell(bus, "read", readable.metadata), home)
                await readable
                acted = await asyncio.wrap_future(asking)
                assert acted.total == size * number
                answer = asyncio.run_coroutine_threadsafe(tell(bus, "grant", num_bytes=size), home)
                grant = (await asyncio.wrap_future(answer)).grant
                assert grant is not None
                operation = await bus.begin_read(grant, memory)
                await operation
                assert bool((memory.tensor == 7).all())

    def thread(number: int) -> None:
        try:
            asyncio.run(several(number))
        except BaseException as error:
            failures.append(error)

    async def several(number: int) -> None:
        await asyncio.gather(*(operate(number + step) for step in range(4)))

    home = asyncio.get_running_loop()
    threads = [threading.Thread(target=thread, args=(number * 8 + 1,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        await asyncio.to_thread(each.join, 60)
    assert failures == []
    stats = bus.stats()
    assert stats["arena_used_bytes"] == stats["grants_open"] == stats["operations_under_way"] == 0


async def test_what_an_operation_asks_later_is_not_bound_by_the_request_that_made_it(bus: Bus) -> None:
    with working_under(Deadline.after(0.2)):
        writable = await bus.create_writable(bytearray(64), lease_s=0.2)
    grants = bus._lane().grants
    ask, grants.ask = grants.ask, lambda *_: None  # type: ignore[method-assign]
    await tell(bus, "write", writable.metadata, acks="lost")
    with pytest.raises(DeadlineExceeded):
        await writable
    grants.ask = ask  # type: ignore[method-assign]
    async with asyncio.timeout(5):
        while bus.stats()["grants_quarantined"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert writable.state is GrantState.RELEASED
    assert bus.stats()["acks_recovered"] == 1


async def test_a_bus_that_closes_begins_nothing_more(server: EmbeddedServer, key_file: str, bus: Bus) -> None:
    async with Bus.open(BusConfig(worker_id="closing", nats_url=server.url, key_file=key_file)) as closing:
        lane = closing._lane()
        readable = await bus.create_readable(b"too late")
        await lane.close(5)
        with pytest.raises(Draining):
            await closing.begin_read(readable.metadata, bytearray(8))
    readable.cancel()


async def test_leases_end_when_they_end(bus: Bus) -> None:
    async def late_s(lease_s: float) -> float:
        with bus.arena.allocate([8], torch.uint8) as memory:
            writable = await bus.create_writable(memory, lease_s=lease_s)
            started_s = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await writable
            return time.monotonic() - started_s - lease_s

    lateness = await asyncio.gather(*(late_s(0.02 + number * 0.0007) for number in range(100)))
    assert sorted(lateness)[50] < 0.4  # not half a second, the pause between two questions


async def test_two_operations_on_one_bytearray_outlive_each_other(bus: Bus) -> None:
    shared = bytearray(5000)
    first = await bus.create_writable(shared)
    second = await bus.create_writable(memoryview(shared)[1000:2000])
    await tell(bus, "write", first.metadata)
    await first
    del first
    gc.collect()
    await tell(bus, "write", second.metadata)
    await second
    assert bytes(shared[1000:2000]) == counted(1000)


async def test_a_list_longer_than_the_cache_is_refused_whole(bus: Bus) -> None:
    pieces = [torch.zeros(64, dtype=torch.uint8) for _ in range(6)]
    with pytest.raises(PoolExhausted):
        await bus.create_writable(pieces)
    writable = await bus.create_writable(pieces[:4])
    await tell(bus, "write", writable.metadata)
    await writable
    assert contents(pieces[:4]) == counted(256)


async def test_hundreds_in_flight_do_not_meet(bus: Bus) -> None:
    async def write(number: int) -> None:
        with bus.arena.allocate([256 + number], torch.uint8) as memory:
            memory.tensor.zero_()
            writable = await bus.create_writable(memory)
            await tell(bus, "write", writable.metadata)
            await writable
            assert contents(memory.tensor) == counted(256 + number)

    await asyncio.gather(*(write(number) for number in range(250)))
    assert bus.stats()["arena_used_bytes"] == 0
