"""What each side sees of a fault, and what becomes of the memory; docs/reliability.md has a row for each test here.

The peer is a process of its own; the memory is poisoned before and looked at after.
"""

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bus import (
    Bus,
    BusConfig,
    ChecksumMismatch,
    DataPlaneError,
    DeadlineExceeded,
    EmbeddedServer,
    NoResponders,
    PeerLost,
    PoolExhausted,
    RemoteFault,
    StaleGrant,
    TransferCancelled,
    identity_of,
    server_binary,
)
from bus.data_plane import transfer_engine
from bus.operations import target as target_module
from bus.operations.lifecycle import MEMORY_FREE, GrantState
from schemas.operations import Initiator, RdmaMetadata
from tests.bus.operations.two_processes import is_written, peer_process, tell

PROMPTLY_S = 2.0
LARGE_BYTES = 24 << 20
"""24 chunks of the peer's: with 20 ms for each, half a second on the way."""
POISON = 0xAB

Peer = tuple["subprocess.Popen[str]", Initiator]


@pytest.fixture(scope="module")
def living() -> Iterator[tuple[ExitStack, list[Peer]]]:
    """The peer of the tests before, and what ends it."""
    with ExitStack() as stack:
        yield stack, []


@pytest.fixture
def peer(server: EmbeddedServer, key_file: str, living: tuple[ExitStack, list[Peer]]) -> Peer:
    """The peer of the test before, unless that has killed it."""
    stack, peers = living
    if not peers or peers[-1][0].poll() is not None or peers[-1][0].stdin.closed:  # type: ignore[union-attr]
        process, epoch = stack.enter_context(peer_process(server, key_file, "faulty"))
        peers.append((process, Initiator(worker_id="faulty", epoch=epoch)))
    return peers[-1]


@pytest.fixture
async def bus(server: EmbeddedServer, key_file: str) -> AsyncIterator[Bus]:
    config = BusConfig(worker_id="victim", nats_url=server.url, key_file=key_file, arena_bytes=128 << 20, checksum=True)
    async with Bus.open(config) as opened:
        yield opened


async def ask(bus: Bus, manner: Any, grant: Any = None, **more: Any) -> Any:
    return await tell(bus, manner, grant, peer="faulty", **more)


def begin(bus: Bus, manner: Any, grant: Any = None, **more: Any) -> "asyncio.Task[Any]":
    """Have the peer act beside the test; what it answers, if it can, is nobody's."""
    task = asyncio.create_task(ask(bus, manner, grant, **more))
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def poisoned(bus: Bus, num_bytes: int) -> Any:
    memory = bus.arena.allocate([num_bytes], torch.uint8)
    memory.tensor.fill_(POISON)
    return memory


def is_poisoned(memory: Any) -> bool:
    return bool((memory.tensor == POISON).all())


async def all_is_free(bus: Bus) -> None:
    await until(lambda: bus.stats()["arena_used_bytes"] == 0)
    stats = bus.stats()
    assert stats["grants_open"] == stats["grants_quarantined"] == stats["quarantined_bytes"] == 0
    assert stats["operations_under_way"] == 0


# The initiator dies


@pytest.mark.parametrize("named", [False, True])
async def test_the_initiator_is_killed_after_its_claim(bus: Bus, peer: Peer, named: bool) -> None:
    process, initiator = peer
    memory = poisoned(bus, 4096)
    operation = await bus.create_writable(memory, lease_s=30, initiator=initiator if named else None)
    await ask(bus, "claim only", operation.metadata)
    process.kill()
    started_s = time.monotonic()
    with pytest.raises(PeerLost, match="process is gone"):
        await operation
    assert time.monotonic() - started_s < PROMPTLY_S
    assert is_poisoned(memory)
    memory.free()
    await all_is_free(bus)


async def test_the_initiator_is_killed_in_the_middle_of_its_write(bus: Bus, peer: Peer) -> None:
    process, _ = peer
    memory = poisoned(bus, LARGE_BYTES)
    operation = await bus.create_writable(memory, lease_s=30)
    begin(bus, "write", operation.metadata, ms_per_chunk=20)
    await until(lambda: int(memory.tensor[1000]) != POISON)
    process.kill()
    started_s = time.monotonic()
    with pytest.raises(PeerLost):
        await operation
    assert time.monotonic() - started_s < PROMPTLY_S
    assert not is_written(memory.tensor)  # half of it is; nobody was told that it is all
    memory.free()
    await all_is_free(bus)


async def test_the_initiator_is_killed_after_done_and_before_its_ack(bus: Bus, peer: Peer) -> None:
    process, _ = peer
    memory = poisoned(bus, 4096)
    operation = await bus.create_writable(memory, lease_s=30)
    await ask(bus, "write", operation.metadata, acks="lost")
    process.kill()
    with pytest.raises(PeerLost):
        await operation  # the bytes are there, but nothing proves it
    memory.free()
    await all_is_free(bus)


async def test_the_initiator_is_killed_in_quarantine(bus: Bus, peer: Peer) -> None:
    process, _ = peer
    memory = poisoned(bus, 4096)
    operation = await bus.create_writable(memory, lease_s=30)
    await ask(bus, "claim only", operation.metadata)
    operation.cancel()
    memory.free()
    assert bus.stats()["quarantined_bytes"] == 4096
    process.kill()
    await all_is_free(bus)
    assert operation.state is GrantState.RELEASED


async def test_an_initiator_that_ends_well_ends_its_claims(bus: Bus, peer: Peer) -> None:
    process, _ = peer
    memory = poisoned(bus, 4096)
    operation = await bus.create_writable(memory, lease_s=30)
    await ask(bus, "claim only", operation.metadata)
    assert process.stdin is not None
    process.stdin.close()
    with pytest.raises(DataPlaneError):
        await operation
    memory.free()
    await all_is_free(bus)


async def test_a_supervisor_s_report_frees_what_a_pidfd_can_t_see(
    bus: Bus, peer: Peer, server: EmbeddedServer, key_file: str
) -> None:
    process, _ = peer
    identity = identity_of(process.pid)
    memory = poisoned(bus, 4096)
    operation = await bus.create_writable(memory, lease_s=30)
    await ask(bus, "claim only", operation.metadata)
    bus._lane()._watch.close()  # as if the peer ran on another machine
    process.kill()
    process.wait()
    await asyncio.sleep(0.5)
    assert operation.state is GrantState.CLAIMED
    config = BusConfig(worker_id="supervisor", nats_url=server.url, key_file=key_file)
    async with Bus.open(config, data_plane=False) as supervisor:
        await supervisor.report_reaped("another", identity)
        await supervisor.report_reaped("faulty", identity)
    with pytest.raises(PeerLost):
        await operation
    memory.free()
    await all_is_free(bus)


# The target dies


async def test_the_target_is_killed_before_the_claim(bus: Bus, peer: Peer) -> None:
    process, _ = peer
    grant = (await ask(bus, "grant", num_bytes=64)).grant
    process.kill()
    process.wait()
    with bus.arena.allocate([64], torch.uint8) as memory:
        started_s = time.monotonic()
        with pytest.raises(NoResponders):
            await bus.begin_read(grant, memory)
        assert time.monotonic() - started_s < PROMPTLY_S
    await all_is_free(bus)


async def test_the_target_is_killed_in_the_middle_of_our_read(bus: Bus, peer: Peer) -> None:
    process, _ = peer
    grant = (await ask(bus, "grant", num_bytes=LARGE_BYTES)).grant
    with bus.arena.allocate([LARGE_BYTES], torch.uint8) as memory:
        killed: list[int] = []

        def kill(num_bytes: int) -> None:
            if not killed:
                process.kill()
                killed.append(num_bytes)

        engine = bus._lane().engine
        engine._chunk_bytes = 1 << 20
        post = engine.agent.post

        def slow_post(handle: int) -> Any:
            time.sleep(0.02)
            return post(handle)

        engine.agent.post = slow_post  # type: ignore[method-assign]
        operation = await bus.begin_read(grant, memory, on_progress=kill)
        with pytest.raises((PeerLost, DataPlaneError)):
            await operation
        assert killed
    await all_is_free(bus)


async def test_a_peer_restarts_under_its_name(bus: Bus, server: EmbeddedServer, key_file: str) -> None:
    async def grant() -> RdmaMetadata:
        acted = await tell(bus, "grant", num_bytes=64, peer="again")
        assert acted.grant is not None
        return acted.grant

    with bus.arena.allocate([64], torch.uint8) as memory:
        with peer_process(server, key_file, "again") as (process, epoch):
            await (await bus.begin_read(await grant(), memory))
            before = Initiator(worker_id="again", epoch=epoch)
            await tell(bus, "write", (await bus.create_writable(memory)).metadata, peer="again")
            stale = await grant()
            named = await bus.create_writable(memory, lease_s=20, initiator=before)
            process.kill()
            process.wait()
        with peer_process(server, key_file, "again"):
            with pytest.raises(StaleGrant):
                await bus.begin_read(stale, memory)
            await (await bus.begin_read(await grant(), memory))
            assert bool((memory.tensor == 7).all())
            with pytest.raises(RemoteFault, match="another initiator"):
                await tell(bus, "write", named.metadata, peer="again")
            with pytest.raises(PeerLost):
                await named
    await all_is_free(bus)


# Somebody stops, and goes on later


async def stopped_past_the_lease(bus: Bus, process: "subprocess.Popen[str]", stack: AsyncExitStack) -> tuple[Any, Any]:
    """A write that is stopped in its middle until its lease is over; the memory is freed by its holder, and asked for
    again. Returns the operation and what was allocated then."""
    memory = poisoned(bus, LARGE_BYTES)
    operation = await bus.create_writable(memory, lease_s=1.5)
    begin(bus, "write", operation.metadata, ms_per_chunk=20)
    await until(lambda: int(memory.tensor[1000]) != POISON)
    process.send_signal(signal.SIGSTOP)
    stack.callback(process.send_signal, signal.SIGCONT)
    with pytest.raises(DeadlineExceeded):
        await operation
    memory.free()
    return operation, poisoned(bus, LARGE_BYTES)


async def test_a_stopped_initiator_s_late_write_lands_in_quarantine(bus: Bus, peer: Peer) -> None:
    process, _ = peer
    async with AsyncExitStack() as stack:
        operation, other = await stopped_past_the_lease(bus, process, stack)
        assert operation.state is GrantState.QUARANTINED
        assert bus.stats()["quarantined_bytes"] == LARGE_BYTES
        await asyncio.sleep(1.0)
        assert operation.state is GrantState.QUARANTINED  # silence proves nothing
    await until(lambda: operation.state is GrantState.RELEASED)  # its own word that it has drained
    assert is_poisoned(other)
    other.free()
    await all_is_free(bus)


async def test_without_quarantine_the_late_write_would_be_seen(
    bus: Bus, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: it can fail."""
    monkeypatch.setattr(target_module, "MEMORY_FREE", MEMORY_FREE | {GrantState.QUARANTINED})
    process, _ = peer
    async with AsyncExitStack() as stack:
        _, other = await stopped_past_the_lease(bus, process, stack)
    await until(lambda: not is_poisoned(other))
    other.free()


async def test_a_stopped_target_ends_a_claim_at_the_lease(bus: Bus, peer: Peer) -> None:
    process, _ = peer
    grant = (await ask(bus, "grant", num_bytes=64)).grant
    with bus.arena.allocate([64], torch.uint8) as memory:
        await (await bus.begin_read(grant, memory))
        grant = (await ask(bus, "grant", num_bytes=64)).grant
        shorter = msgspec.structs.replace(grant, lease_ms=800)
        process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineExceeded):
                await bus.begin_read(shorter, memory)
        finally:
            process.send_signal(signal.SIGCONT)
    await all_is_free(bus)


# Acks


async def test_a_lost_ack_is_asked_for(bus: Bus, peer: Peer) -> None:
    with poisoned(bus, 4096) as memory:
        operation = await bus.create_writable(memory, lease_s=4)
        await ask(bus, "write", operation.metadata, acks="lost")
        await operation
        assert operation.deadline.remaining_s > 1.0  # at half the lease
        assert is_written(memory.tensor)
    assert bus.stats()["acks_recovered"] == 1
    await all_is_free(bus)


async def test_an_ack_that_comes_twice_is_taken_once(bus: Bus, peer: Peer) -> None:
    with poisoned(bus, 4096) as memory:
        operation = await bus.create_writable(memory, checksum=False)  # or the second came while the first is verified
        await ask(bus, "write", operation.metadata, acks="twice")
        await operation
        assert is_written(memory.tensor)
    await until(lambda: bus.stats()["acks_dropped"] == 1)
    await all_is_free(bus)


async def test_an_ack_after_the_lease_frees_the_memory_and_changes_nothing_else(bus: Bus, peer: Peer) -> None:
    memory = poisoned(bus, 4096)
    operation = await bus.create_writable(memory, lease_s=0.5)
    bus._lane().grants.ask = lambda *_: None  # type: ignore[method-assign]  # or a query would be quicker
    await ask(bus, "write", operation.metadata, acks="late")
    with pytest.raises(DeadlineExceeded):
        await operation
    memory.free()
    await all_is_free(bus)
    with pytest.raises(DeadlineExceeded):
        await operation


async def test_an_ack_before_the_reply_completes_the_operation(bus: Bus, peer: Peer) -> None:
    with poisoned(bus, 4096) as memory:
        operation = await bus.create_writable(memory)
        await ask(bus, "write", operation.metadata)  # the peer answers after its ack
        await operation
        assert is_written(memory.tensor)


async def test_a_grant_that_is_delivered_twice_is_used_once(bus: Bus, peer: Peer) -> None:
    with poisoned(bus, 4096) as memory:
        operation = await bus.create_writable(memory, initiator=peer[1])
        await ask(bus, "write", operation.metadata)
        await operation
        memory.tensor.fill_(POISON)
        with pytest.raises(RemoteFault, match="used already"):
            await ask(bus, "write", operation.metadata)
        assert is_poisoned(memory)


async def test_a_grant_that_a_query_has_overtaken_is_refused(bus: Bus, peer: Peer) -> None:
    memory = poisoned(bus, 4096)
    operation = await bus.create_writable(memory, lease_s=1.0, initiator=peer[1])
    with pytest.raises(DataPlaneError, match="never posted"):
        await operation  # asked at half the lease
    memory.free()
    await all_is_free(bus)
    with pytest.raises(RemoteFault, match="will not be used"):
        await ask(bus, "write", operation.metadata)


# Cancellation, checksums, bounds


async def test_the_initiator_cancels_in_the_middle(bus: Bus, peer: Peer) -> None:
    memory = poisoned(bus, LARGE_BYTES)
    operation = await bus.create_writable(memory)
    with pytest.raises(RemoteFault, match="cancelled"):
        await ask(bus, "cancel", operation.metadata, ms_per_chunk=20)
    with pytest.raises(RemoteFault, match="cancelled"):
        await operation
    memory.free()
    await all_is_free(bus)


async def test_both_cancel_at_once(bus: Bus, peer: Peer) -> None:
    memory = poisoned(bus, LARGE_BYTES)
    operation = await bus.create_writable(memory)
    theirs = begin(bus, "cancel", operation.metadata, ms_per_chunk=20)
    await until(lambda: operation.state is GrantState.CLAIMED)
    operation.cancel()
    memory.free()
    with pytest.raises(StaleGrant):
        await operation
    await asyncio.wait([theirs])
    await all_is_free(bus)


async def test_our_own_read_is_cancelled_in_its_middle(bus: Bus, peer: Peer) -> None:
    grant = (await ask(bus, "grant", num_bytes=LARGE_BYTES)).grant
    memory = poisoned(bus, LARGE_BYTES)
    engine = bus._lane().engine
    engine._chunk_bytes = 1 << 20
    seen: list[int] = []
    operation = await bus.begin_read(grant, memory, on_progress=seen.append)
    operation.cancel()
    with pytest.raises(TransferCancelled):
        await operation
    memory.free()
    await all_is_free(bus)
    assert seen == sorted(seen)


async def test_bytes_that_are_not_those_that_were_sent_are_refused(bus: Bus, peer: Peer) -> None:
    with poisoned(bus, 4096) as memory:
        operation = await bus.create_writable(memory, checksum=True)
        await ask(bus, "write", operation.metadata, acks="of other bytes")
        with pytest.raises(ChecksumMismatch):
            await operation
        readable = await bus.create_readable(memory, checksum=True)
        memory.tensor[17] += 1  # after the grant
        with pytest.raises(RemoteFault, match="not those that were granted"):
            await ask(bus, "read", readable.metadata)
        with pytest.raises(RemoteFault, match="not those that were granted"):
            await readable
    await all_is_free(bus)


async def test_too_much_quarantine_stops_the_worker(server: EmbeddedServer, key_file: str, peer: Peer) -> None:
    config = BusConfig(worker_id="bounded", nats_url=server.url, key_file=key_file, quarantine_bytes=6000)
    async with Bus.open(config) as bus:
        for _ in range(2):
            operation = await bus.create_writable(poisoned(bus, 4096), lease_s=30)
            await ask(bus, "claim only", operation.metadata)
            assert bus.is_ready
            operation.cancel()
        assert not bus.is_ready
        assert "8,192 bytes of 2 operations are fenced" in await bus.overrun
        with pytest.raises(PoolExhausted, match="the bound is 6,000 bytes"):
            await bus.create_writable(poisoned(bus, 64))
        peer[0].kill()
        await until(lambda: bus.is_ready)


async def test_too_many_drains_stop_new_transfers(bus: Bus, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_engine, "MAX_DRAINING", 1)
    grants = [(await ask(bus, "grant", num_bytes=LARGE_BYTES)).grant for _ in range(3)]
    engine = bus._lane().engine
    post = engine.agent.post

    def slow_post(handle: int) -> Any:
        time.sleep(0.5)
        return post(handle)

    with bus.arena.allocate([LARGE_BYTES], torch.uint8) as memory:
        await (await bus.begin_read(grants[0], memory))  # the peer is known now
        engine.agent.post = slow_post  # type: ignore[method-assign]
        draining = await bus.begin_read(grants[1], memory)
        await until(lambda: draining._transfer.posted)
        draining.cancel()
        with pytest.raises(PoolExhausted, match="1 cancelled transfers have not drained"):
            await bus.begin_read(grants[2], memory)
        with pytest.raises(TransferCancelled):
            await draining
    await all_is_free(bus)


# NATS


@contextmanager
def nats_server(port: int) -> Iterator["subprocess.Popen[bytes]"]:
    command = [server_binary(), "-a", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_nats_is_killed_in_the_middle_and_comes_back(key_file: str, unused_tcp_port: int) -> None:
    url = f"nats://127.0.0.1:{unused_tcp_port}"
    config = BusConfig(worker_id="victim", nats_url=url, key_file=key_file, arena_bytes=64 << 20)
    async with AsyncExitStack() as stack:
        first = stack.enter_context(nats_server(unused_tcp_port))
        bus = await stack.enter_async_context(Bus.open(config))
        elsewhere = EmbeddedServer(url, "", first.pid)
        stack.enter_context(peer_process(elsewhere, key_file, "faulty"))
        memory = poisoned(bus, LARGE_BYTES)
        operation = await bus.create_writable(memory, lease_s=10)
        begin(bus, "write", operation.metadata, ms_per_chunk=20)
        await until(lambda: int(memory.tensor[1000]) != POISON)
        first.kill()
        first.wait()
        await asyncio.sleep(1.0)  # the write ends meanwhile, and its ack has nowhere to go
        stack.enter_context(nats_server(unused_tcp_port))
        await operation
        assert is_written(memory.tensor)
        memory.free()
        await all_is_free(bus)


def test_every_test_here_is_a_row_of_the_page() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reliability.md").read_text()
    rows = {word for line in page.splitlines() if line.startswith("| ") for word in line.replace("`", " ").split()}
    own = {name for name in globals() if name.startswith("test_") and "every_test_here" not in name}
    elsewhere = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert all(f"def {name}(" in elsewhere for name in OTHER_ROWS)
    assert own - rows == set()
    of_requests = {word for word in rows if word.startswith("test_")} - own - OTHER_ROWS
    folders = [Path(__file__).parents[1] / "control_plane", Path(__file__).parents[2] / "workers"]
    theirs = "".join(path.read_text() for folder in folders for path in folder.glob("test_*.py"))
    assert {name for name in of_requests if f"def {name}(" not in theirs} == set()


OTHER_ROWS = {
    "test_mutated_handshakes_change_nothing",
    "test_mutated_messages_change_nothing",
    "test_soak",
    "test_foreign_registrations_are_bounded_and_the_longest_idle_makes_room",
    "test_acks_are_remembered_up_to_a_bound",
    "test_a_serial_is_admitted_once_and_only_if_it_is_not_too_old",
    "test_nobody_listening_is_known_at_once",
    "test_a_request_in_flight_hears_at_once_that_the_server_is_gone",
    "test_a_denied_subject_is_known_at_once",
    "test_one_request_too_many_is_refused_at_once_and_the_others_are_served",
    "test_a_deadline_ends_the_handler_and_the_caller",
    "test_a_deadline_that_passes_in_the_queue_is_told_without_work",
    "test_a_cancellation_travels_down_three_hops",
    "test_a_killed_client_s_work_ends_within_seconds",
    "test_a_stream_that_is_closed_early_ends_its_handler",
    "test_a_gap_in_a_stream_is_an_error_and_never_a_silently_lost_frame",
    "test_a_worker_that_leaves_under_load_loses_no_request",
    "test_a_message_over_max_payload_is_refused_here_and_the_connection_lives",
}
"""In other files, those of the control plane among them."""
