"""The other worker of the operations' tests: a process of its own with its own NIXL agent, that does as it is told.

    python peer_process.py WORKER_ID NATS_URL KEY_FILE

Its endpoint takes a grant and a manner of acting on it.
"""

import asyncio
import os
import sys
import time
from typing import Any, Literal

import msgspec
import torch
import uvloop

from bus import Bus, BusConfig, EndpointConfig, WriteOperation
from schemas.codec import decode, encode
from schemas.message import Message
from schemas.operations import AckOutcome, CompletionAck, Initiator, RdmaMetadata
from schemas.subjects import Subject

Manner = Literal[
    "write", "read", "claim only", "claim and release", "wrong length", "forge an ack", "fail", "die", "grant", "cancel"
]
Acks = Literal["", "lost", "twice", "late", "of other bytes"]
LATE_S = 1.0


class Act(Message, frozen=True, kw_only=True, tag="test.act"):
    """Act on `grant` in a manner."""

    manner: Manner
    grant: RdmaMetadata | None = None
    value: int = 7
    num_bytes: int = 0
    acks: Acks = ""
    """What becomes of the acks of this process from now on."""
    ms_per_chunk: int = 0
    """How long each post takes from now on, so that a transfer can be met on its way."""


class Acted(Message, frozen=True, kw_only=True, tag="test.acted"):
    """What was done: bytes that NIXL counted, and the sum of bytes that were read."""

    num_bytes: int = 0
    total: int = 0
    grant: RdmaMetadata | None = None
    stats: dict[str, int] = msgspec.field(default_factory=dict)


def subject(worker_id: str) -> Subject:
    return Subject(f"test.{worker_id}", "test.peer")


def meddle(bus: Bus, request: Act) -> None:
    """Install the faults that a request asks for, below everything that is tested."""
    connection, agent = bus._connection, bus._lane().engine.agent
    publish, post = type(connection).publish_now, type(agent).post

    def publish_now(subject: object, payload: bytes, **more: Any) -> None:
        if ".ack." not in str(subject) or not request.acks:
            publish(connection, str(subject), payload, **more)
        elif request.acks == "late":
            asyncio.get_running_loop().call_later(LATE_S, lambda: publish(connection, str(subject), payload, **more))
        elif request.acks == "of other bytes":
            ack = decode(payload, CompletionAck)
            publish(connection, str(subject), encode(msgspec.structs.replace(ack, checksum=bytes(16))), **more)
        elif request.acks == "twice":
            publish(connection, str(subject), payload, **more)
            publish(connection, str(subject), payload, **more)

    def slow_post(handle: int) -> object:
        time.sleep(request.ms_per_chunk / 1000)
        return post(agent, handle)

    connection.publish_now = publish_now  # type: ignore[method-assign]
    agent.post = slow_post  # type: ignore[method-assign,assignment]


async def act(bus: Bus, request: Act) -> Acted:
    meddle(bus, request)
    if request.manner == "grant":
        target = bus.arena.allocate([request.num_bytes], torch.uint8)
        target.tensor.fill_(request.value)
        return Acted(grant=(await bus.create_readable(target.descriptor)).metadata)
    grant = request.grant
    assert grant is not None
    if request.manner == "die":
        os._exit(9)
    if request.manner == "forge an ack":
        await forge(bus, grant)
        return Acted()
    if request.manner.startswith("claim"):
        claim = await bus.claim(grant)
        if request.manner == "claim and release":
            claim.release()
        return Acted()
    extra = 1 if request.manner == "wrong length" else 0
    with bus.arena.allocate([grant.num_bytes + extra], torch.uint8) as local:
        if request.manner == "read":
            report = await (await bus.begin_read(grant, local.descriptor))
            return Acted(num_bytes=report.transfer.num_bytes, total=int(local.tensor.sum(dtype=torch.int64)))
        local.tensor.copy_(torch.arange(grant.num_bytes + extra) % 251)
        claim = await bus.claim(grant)
        if request.manner == "fail":
            claim.spend()
            claim.acknowledge(AckOutcome.FAILED, error=ValueError("the peer's own trouble"))
            return Acted()
        begun: list[WriteOperation] = []

        def cancel(num_bytes: int) -> None:
            if request.manner == "cancel":
                begun[0].cancel()

        operation = await bus.begin_write(claim, local.descriptor, on_progress=cancel)
        begun.append(operation)
        report = await operation
        return Acted(num_bytes=report.transfer.num_bytes, stats=bus.stats())


async def forge(bus: Bus, grant: RdmaMetadata) -> None:
    """Acks of somebody who holds no claim."""
    for token in (bytes(16), b"x" * 16):
        ack = CompletionAck(
            operation_id=grant.operation_id,
            outcome=AckOutcome.COMPLETE,
            initiator=Initiator(worker_id=bus.worker_id, epoch=bus.epoch),
            token=token,
            num_bytes=grant.num_bytes,
        )
        await bus.publish(bus.subjects.ack(grant.worker_id, grant.operation_id), ack)


async def main(worker_id: str, nats_url: str, key_file: str) -> None:
    config = BusConfig(
        worker_id=worker_id, nats_url=nats_url, key_file=key_file, arena_bytes=96 << 20, chunk_bytes=1 << 20
    )
    async with Bus.open(config) as bus:
        await bus.serve(
            EndpointConfig("act", subject(worker_id), Act, concurrency=64), lambda request: act(bus, request)
        )
        print(bus.epoch, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
