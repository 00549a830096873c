"""Both directions with the real `dynamo.nixl_connect`, in a process and an environment of its own."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bus import AuthenticationError, Bus, BusConfig, EmbeddedServer, LocalProtocolError, WrongLength, WrongPairing
from schemas.codec import InvalidMessage
from schemas.dynamo import MAX_AGENT_METADATA_BYTES, DynamoMetadata, packed_agent_metadata
from schemas.operations import RdmaMetadata
from tests.bus.operations.two_processes import is_written

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".venv-dynamo" / "bin" / "python"


class DynamoPeer:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        self.tell(**command)
        return self.answer()


@pytest.fixture(scope="module")
def dynamo() -> Iterator[DynamoPeer]:
    assert PYTHON.exists(), "make test sets up the environment of ai-dynamo-runtime"
    command = [str(PYTHON), str(HERE / "dynamo_peer.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield DynamoPeer(process)
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(20)
        finally:
            process.kill()


@pytest.fixture
async def bus(server: EmbeddedServer, key_file: str) -> AsyncIterator[Bus]:
    config = BusConfig(worker_id="ours", nats_url=server.url, key_file=key_file, arena_bytes=64 << 20)
    async with Bus.open(config) as opened:
        yield opened


@pytest.mark.parametrize("num_bytes", [1, 4096, (20 << 20) + 3])
async def test_we_write_and_read_the_memory_of_a_dynamo_target(bus: Bus, dynamo: DynamoPeer, num_bytes: int) -> None:
    with bus.arena.allocate([num_bytes], torch.uint8) as memory:
        memory.tensor.copy_(torch.arange(num_bytes) % 251)
        target = dynamo.ask(do="create_writable", num_bytes=num_bytes)
        remote = RdmaMetadata.from_dynamo(target["metadata"])
        report = await (await bus.begin_write(remote, memory, allow_unauthenticated=True))
        assert report.transfer.num_bytes == num_bytes
        assert dynamo.ask(do="wait", operation=target["operation"], timeout_s=20)["is_arange"]
        memory.tensor.zero_()
        target = dynamo.ask(do="create_readable", num_bytes=num_bytes, value=None)
        remote = RdmaMetadata.from_dynamo(target["metadata"])
        await (await bus.begin_read(remote, memory, allow_unauthenticated=True))
        assert is_written(memory.tensor)
        dynamo.ask(do="wait", operation=target["operation"], timeout_s=20)


@pytest.mark.parametrize("num_bytes", [1, 4096, (20 << 20) + 3])
async def test_a_dynamo_initiator_writes_and_reads_our_memory(bus: Bus, dynamo: DynamoPeer, num_bytes: int) -> None:
    with bus.arena.allocate([num_bytes], torch.uint8) as memory:
        memory.tensor.zero_()
        writable = await bus.create_writable(memory, allow_unauthenticated=True, lease_s=20)
        dynamo.tell(do="begin_write", metadata=writable.to_dynamo(), fill="arange")
        await writable
        assert is_written(memory.tensor)
        dynamo.answer()
        readable = await bus.create_readable(memory, allow_unauthenticated=True, lease_s=20)
        dynamo.tell(do="begin_read", metadata=readable.to_dynamo())
        await readable
        assert dynamo.answer()["is_arange"]
    assert bus.stats()["arena_used_bytes"] == bus.stats()["grants_open"] == 0


async def test_without_leave_nothing_of_dynamo_s_is_taken_or_told(bus: Bus, dynamo: DynamoPeer) -> None:
    with bus.arena.allocate([64], torch.uint8) as memory:
        target = dynamo.ask(do="create_writable", num_bytes=64)
        remote = RdmaMetadata.from_dynamo(target["metadata"])
        with pytest.raises(AuthenticationError, match="allow_unauthenticated"):
            await bus.begin_write(remote, memory)
        with pytest.raises(WrongPairing):
            await bus.begin_read(remote, memory, allow_unauthenticated=True)
        with pytest.raises(WrongLength), bus.arena.allocate([65], torch.uint8) as longer:
            await bus.begin_write(remote, longer, allow_unauthenticated=True)
        async with await bus.create_writable(memory) as writable:
            with pytest.raises(LocalProtocolError, match="allow_unauthenticated"):
                writable.to_dynamo()
        await (await bus.begin_write(remote, memory, allow_unauthenticated=True))
        dynamo.ask(do="wait", operation=target["operation"], timeout_s=20)


async def test_memory_told_to_dynamo_stays_fenced_after_a_cancel_until_it_is_notified(
    bus: Bus, dynamo: DynamoPeer
) -> None:
    memory = bus.arena.allocate([64], torch.uint8)
    writable = await bus.create_writable(memory, allow_unauthenticated=True)
    writable.cancel()
    memory.free()
    assert bus.stats()["grants_quarantined"] == 1
    assert bus.stats()["arena_used_bytes"] > 0
    dynamo.ask(do="begin_write", metadata=writable.to_dynamo(), fill="arange")
    async with asyncio.timeout(5):
        while bus.stats()["grants_quarantined"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert bus.stats()["arena_used_bytes"] == bus.stats()["grants_quarantined"] == 0


def test_metadata_that_is_not_dynamo_s_or_bursts_is_refused() -> None:
    good = DynamoMetadata([], packed_agent_metadata(b"agent"), "key", 2)
    assert good.agent_metadata() == b"agent"
    bomb = DynamoMetadata([], packed_agent_metadata(bytes(MAX_AGENT_METADATA_BYTES * 50)), "key", 2)
    with pytest.raises(InvalidMessage, match="over"):
        bomb.agent_metadata()
    for text in ("", "{}", "[" * 100_000, '{"descriptors": []}', good.to_json()):
        with pytest.raises(InvalidMessage):
            RdmaMetadata.from_dynamo(text)
    for packed in ("b64:!", "zz", "b64:", "00"):
        with pytest.raises(InvalidMessage):
            DynamoMetadata([], packed, "key", 2).agent_metadata()
