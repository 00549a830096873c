"""Mutated bytes against live workers: faults and counters, and then everything works as before."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
import torch
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import (
    ArenaTensor,
    AuthenticationError,
    Bus,
    BusConfig,
    BusError,
    DeadlineExceeded,
    EmbeddedServer,
    RemoteFault,
)
from bus.handshake import statements
from bus.handshake.authentication import KeyRing
from bus.handshake.process_identity import identity_of
from schemas.codec import InvalidMessage, decode, encode
from schemas.handshake import AgentDescription, AgentMetadataReply, AgentMetadataRequest
from schemas.operations import (
    AckOutcome,
    ClaimReply,
    ClaimRequest,
    CompletionAck,
    EpochDrained,
    Initiator,
    MemoryExtent,
    OperationKind,
    OperationState,
    OperationStatusReply,
    OperationStatusRequest,
    ProcessReaped,
    RdmaMetadata,
    Run,
)
from schemas.subjects import Subjects
from tests.bus.operations.two_processes import is_written, peer_process, tell

SUBJECTS = Subjects()


@pytest.fixture(scope="module")
def peer_pid(server: EmbeddedServer, key_file: str) -> Iterator[int]:
    with peer_process(server, key_file, "living") as (process, _):
        yield process.pid


@pytest.fixture
async def bus(server: EmbeddedServer, key_file: str, peer_pid: int) -> AsyncIterator[Bus]:
    async with Bus.open(BusConfig(worker_id="asking", nats_url=server.url, key_file=key_file)) as opened:
        yield opened


def mutated(payload: bytes, chance: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, cut off, or something put in."""
    data = bytearray(payload)
    at = chance.randrange(len(data))
    match chance.randrange(4):
        case 0:
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            data[at : at + 8] = chance.randbytes(8)
        case 2:
            del data[at:]
        case _:
            data[at:at] = chance.randbytes(chance.randrange(1, 20))
    return bytes(data)


async def still_works(bus: Bus) -> None:
    with bus.arena.allocate([4096], torch.uint8) as memory:
        memory.tensor.zero_()
        writable = await bus.create_writable(memory, checksum=True)
        await tell(bus, "write", writable.metadata, peer="living")
        await writable
        assert is_written(memory.tensor)


async def test_mutated_handshakes_change_nothing(bus: Bus, raw: Client, key_file: str) -> None:
    """A worker that answers the handshake with bytes that were changed on the way, 200 times."""
    keys, chance = KeyRing.load(key_file), random.Random(7)
    description = AgentDescription(
        worker_id="liar",
        epoch="e1",
        agent_name="liar-e1",
        agent_metadata=bus._lane().engine.agent.metadata(),  # real, so that NIXL would look at it
        regions=list(bus.memory.regions.values()),
    )
    num_asked = 0

    async def lie(message: Msg) -> None:
        nonlocal num_asked
        num_asked += 1
        request = decode(message.data, AgentMetadataRequest)
        reply = statements.answer(keys, request, description)
        if num_asked % 2:
            changed = encode(msgspec.structs.replace(reply, description=mutated(reply.description, chance)))
        else:
            changed = mutated(encode(reply), chance)
        await raw.publish(message.reply, changed)

    await raw.subscribe(SUBJECTS.worker("liar", "agent_metadata").name, cb=lie)
    await raw.flush()
    await raw.flush()
    loaded: list[bytes] = []
    bus._lane().engine.agent.load_peer = lambda metadata: loaded.append(metadata) or ""  # type: ignore[method-assign,func-returns-value]
    for number in range(200):
        grant = RdmaMetadata(
            operation_id=f"{number:016x}",
            kind=OperationKind.WRITABLE,
            worker_id="liar",
            epoch="e1",
            memory=[MemoryExtent(region=0, generation=0, runs=[Run(offset_bytes=0, length_bytes=64)])],
            lease_ms=10_000,
        )
        with pytest.raises(BusError):
            await bus.begin_write(grant, bytes(64))
    assert num_asked == 200
    assert loaded == []
    del bus._lane().engine.agent.load_peer
    await still_works(bus)


async def test_mutated_messages_change_nothing(bus: Bus, raw: Client, key_file: str, peer_pid: int) -> None:
    keys, chance = KeyRing.load(key_file), random.Random(11)
    await still_works(bus)
    held = bus.arena.allocate([64], torch.uint8)
    open_grant = await bus.create_writable(held)
    claimed = await bus.create_writable(held)
    await tell(bus, "claim only", claimed.metadata, peer="living")
    stranger = Initiator(worker_id="stranger", epoch="e1")
    process = identity_of(peer_pid)
    messages = []
    for worker, operation in (("living", "f" * 16), ("asking", open_grant.metadata.operation_id)):
        claim = ClaimRequest(operation_id="e" * 16, epoch=bus.epoch, initiator=stranger)
        status = OperationStatusRequest(operation_id=operation, worker_id="asking", epoch=bus.epoch, initiator=stranger)
        question = statements.question(keys, stranger, process, worker, [])
        ack = CompletionAck(
            operation_id=operation, outcome=AckOutcome.COMPLETE, initiator=stranger, token=bytes(16), num_bytes=64
        )
        messages += [
            (SUBJECTS.worker(worker, "claim"), claim),
            (SUBJECTS.worker(worker, "operation_status"), status),
            (SUBJECTS.worker(worker, "agent_metadata"), question),
            (SUBJECTS.ack(worker, operation), ack),
        ]
    proof: dict[str, Any] = {"key_id": "k", "mac": bytes(32)}
    messages += [
        (SUBJECTS.event("living", "drained"), EpochDrained(worker_id="living", epoch="e1", **proof)),
        (SUBJECTS.event("living", "reaped"), ProcessReaped(worker_id="living", process=process, **proof)),
    ]
    for number in range(2000):
        subject, message = messages[number % len(messages)]
        payload = encode(message) if number < len(messages) else mutated(encode(message), chance)
        await raw.publish(subject.name, payload, reply="_INBOX.nobody")
    await raw.flush()
    await asyncio.sleep(0.3)
    await still_works(bus)
    assert open_grant.state.value == "granted"
    assert claimed.state.value == "claimed"
    assert bus.stats()["grants_open"] == 2
    open_grant.cancel()
    claimed.cancel()


async def test_a_grant_or_a_claim_that_no_member_made_is_refused(
    bus: Bus, server: EmbeddedServer, key_file: str
) -> None:
    async with Bus.open(BusConfig(worker_id="acting", nats_url=server.url, key_file=key_file)) as acting:
        mine = Initiator(worker_id="acting", epoch=acting.epoch)
        with bus.arena.allocate([64], torch.uint8) as memory, bus.arena.allocate([64], torch.uint8) as other:
            other.tensor.fill_(1)
            named = await bus.create_writable(memory, initiator=mine)
            elsewhere = msgspec.structs.replace(named.metadata, memory=list(other.descriptor.extents))
            without = msgspec.structs.replace(named.metadata, token=bytes(16))
            for forged in (elsewhere, without, msgspec.structs.replace(named.metadata, serial=9)):
                with pytest.raises(AuthenticationError, match="no valid proof"):
                    await acting.begin_write(forged, bytes(64))
            await (await acting.begin_write(named.metadata, bytes(64)))
            await named
            assert bool((other.tensor == 1).all())
            open_grant = await bus.create_writable(memory)
            claim = ClaimRequest(operation_id=open_grant.metadata.operation_id, epoch=bus.epoch, initiator=mine)
            with pytest.raises(RemoteFault, match="no valid proof"):
                await acting._caller.ask_peer(SUBJECTS.worker("asking", "claim"), claim, ClaimReply, timeout_s=5)
            changed = msgspec.structs.replace(open_grant.metadata, memory=list(other.descriptor.extents))
            with pytest.raises(RemoteFault, match="no valid proof"):
                await acting.begin_write(changed, bytes(64))
            await open_grant_is_still_good(bus, acting, memory)
            open_grant.cancel()
            assert bool((other.tensor == 1).all())


async def open_grant_is_still_good(bus: Bus, acting: Bus, memory: ArenaTensor) -> None:
    writable = await bus.create_writable(memory)
    await (await acting.begin_write(writable.metadata, bytes(64)))
    await writable


async def test_a_status_query_that_no_member_made_uses_no_serial_up(
    bus: Bus, server: EmbeddedServer, key_file: str
) -> None:
    async with Bus.open(BusConfig(worker_id="acting", nats_url=server.url, key_file=key_file)) as acting:
        mine = Initiator(worker_id="acting", epoch=acting.epoch)
        forged = OperationStatusRequest(
            operation_id="f" * 16, worker_id="asking", epoch=bus.epoch, initiator=mine, serial=2**63 - 1
        )
        with pytest.raises(RemoteFault, match="no valid proof"):
            await bus._caller.ask_peer(
                SUBJECTS.worker("acting", "operation_status"), forged, OperationStatusReply, timeout_s=5
            )
        with bus.arena.allocate([64], torch.uint8) as memory:
            named = await bus.create_writable(memory, initiator=mine)
            await (await acting.begin_write(named.metadata, bytes(64)))
            await named


async def test_a_status_that_no_member_told_ends_nothing(bus: Bus, raw: Client) -> None:
    """A stranger answers status queries in the name of a worker that holds a named grant."""
    asked = asyncio.Event()

    async def lie(message: Msg) -> None:
        request = decode(message.data, OperationStatusRequest)
        answer = OperationStatusReply(
            operation_id=request.operation_id, initiator=request.initiator, state=OperationState.REFUSED
        )
        await raw.publish(message.reply, encode(answer))
        asked.set()

    await raw.subscribe(SUBJECTS.worker("absent", "operation_status").name, cb=lie)
    await raw.flush()
    await raw.flush()
    memory = bus.arena.allocate([64], torch.uint8)
    named = await bus.create_writable(memory, lease_s=0.6, initiator=Initiator(worker_id="absent", epoch="e1"))
    await asyncio.wait_for(asked.wait(), 5)
    with pytest.raises(DeadlineExceeded):
        await named
    memory.free()
    assert bus.stats()["quarantined_bytes"] == 64
    assert bus.stats()["arena_used_bytes"] > 0


@pytest.mark.parametrize("identifier", ["f" * 16 + "\n", "\n" + "f" * 16, "f" * 15, "F" * 16])
def test_an_identifier_with_anything_around_it_is_none(identifier: str) -> None:
    claim = ClaimRequest(operation_id=identifier, epoch="e", initiator=Initiator(worker_id="w", epoch="e"))
    with pytest.raises(InvalidMessage):
        decode(encode(claim), ClaimRequest)
    nobody = ClaimRequest(operation_id="f" * 16, epoch="e", initiator=Initiator(worker_id="w\n", epoch="e"))
    with pytest.raises(InvalidMessage):
        decode(encode(nobody), ClaimRequest)


async def test_an_answer_to_one_question_is_no_answer_to_another(bus: Bus, raw: Client, key_file: str) -> None:
    """A recorded handshake, played again."""
    answers: list[bytes] = []

    async def record(message: Msg) -> None:
        if b"handshake.reply" in message.data:
            answers.append(message.data)

    await raw.subscribe("_INBOX.>", cb=record)
    await raw.flush()
    await raw.flush()
    await still_works(bus)
    keys = KeyRing.load(key_file)
    asking = Initiator(worker_id="living", epoch="any")
    request = statements.question(keys, asking, identity_of(1), "asking", [])
    for recorded in answers:
        with pytest.raises(BusError, match="no valid proof"):
            statements.proved_description(keys, request, decode(recorded, AgentMetadataReply), "asking")
    assert answers
