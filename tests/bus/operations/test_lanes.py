import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bus import (
    Bus,
    BusConfig,
    EmbeddedServer,
    LocalProtocolError,
    OperationStatus,
    RemoteFault,
    StaleGrant,
    TransferError,
    WrongPairing,
    write_key_file,
)


class Pair(NamedTuple):
    target: Bus
    initiator: Bus


@pytest.fixture
async def pair(server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Pair]:
    key = tmp_path / "key"
    write_key_file(key)
    target, initiator = (
        Bus.open(BusConfig(worker_id=name, nats_url=server.url, key_file=str(key), arena_bytes=4 << 20))
        for name in ("lanes-target", "lanes-initiator")
    )
    async with target as opened_target, initiator as opened_initiator:
        yield Pair(opened_target, opened_initiator)


async def test_the_lanes_are_ucx_s_and_the_reserved_memory_is_zeroed(pair: Pair) -> None:
    with pair.target.arena.allocate([4096], torch.uint8) as memory:
        memory.tensor.fill_(7)
        async with await pair.target.create_writable(memory.descriptor) as writable:
            lanes = await pair.initiator.lanes_to(writable.metadata)
            ack = await writable
        assert ack.num_bytes == 4096
        assert not memory.tensor.any()
    assert lanes.startswith("intra-node ")
    assert "tcp/" in lanes or "cma/" in lanes
    assert pair.initiator.stats()["operations_under_way"] == 0
    assert pair.target.stats()["arena_used_bytes"] == 0


async def test_a_probe_that_fails_says_why_and_frees_the_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair.target.arena.allocate([4096], torch.uint8) as memory:
        async with await pair.target.create_writable(memory.descriptor) as writable:
            monkeypatch.setenv("UCX_TLS", "nothing")
            with pytest.raises(TransferError, match="no usable transport with UCX_TLS=nothing"):
                await pair.initiator.lanes_to(writable.metadata)
            with pytest.raises(RemoteFault, match="from another process failed"):
                await writable
    assert pair.target.stats()["arena_used_bytes"] == 0


async def test_a_cancelled_wait_lets_the_write_end_and_the_target_hear_of_it(pair: Pair) -> None:
    with pair.target.arena.allocate([4096], torch.uint8) as memory:
        async with await pair.target.create_writable(memory.descriptor) as writable:
            waiting = asyncio.create_task(pair.initiator.lanes_to(writable.metadata))
            while not pair.initiator._lane().lanes.conclusions.num_open:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (await writable).num_bytes == 4096


async def test_what_can_not_be_probed_is_refused_before_anything_is_claimed(pair: Pair) -> None:
    with pair.target.arena.allocate([2 << 20], torch.uint8) as memory:
        async with await pair.target.create_readable(memory.descriptor) as readable:
            with pytest.raises(WrongPairing):
                await pair.initiator.lanes_to(readable.metadata)
        async with await pair.target.create_writable(memory.descriptor) as writable:
            with pytest.raises(LocalProtocolError, match="1,048,576 bytes"):
                await pair.initiator.lanes_to(writable.metadata)
            assert writable.status is OperationStatus.INITIALIZED


async def test_a_revoked_grant_is_stale(pair: Pair) -> None:
    with pair.target.arena.allocate([4096], torch.uint8) as memory:
        async with await pair.target.create_writable(memory.descriptor) as writable:
            pass
        with pytest.raises(StaleGrant):
            await pair.initiator.lanes_to(writable.metadata)
