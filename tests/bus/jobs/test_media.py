"""Large messages: what goes into the object store comes out proved, or not at all."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client

from bus import Bus, DeadlineExceeded, MediaMismatch, MediaNotFound, PayloadTooLarge

BYTES = os.urandom(3_000_001)


async def pieces() -> AsyncIterator[bytes]:
    for start in range(0, len(BYTES), 70_000):
        yield BYTES[start : start + 70_000]


@pytest.mark.parametrize("kind", ["bytes", "memoryview", "path", "iterator"])
async def test_every_kind_of_source_comes_back_as_it_was(bus: Bus, caller: Bus, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_bytes(BYTES)
    source: Any = {"bytes": BYTES, "memoryview": memoryview(BYTES), "path": tmp_path / "file", "iterator": pieces()}[
        kind
    ]
    reference = await caller.media.put(None, source, content_type="video/mp4")
    assert (reference.num_bytes, reference.content_type) == (len(BYTES), "video/mp4")
    assert reference.digest == hashlib.sha256(BYTES).hexdigest()
    assert await bus.media.get(reference) == BYTES


@pytest.mark.parametrize("num_bytes", [0, 1, 128 << 10, (128 << 10) + 1])
async def test_any_number_of_bytes_comes_back(bus: Bus, num_bytes: int) -> None:
    reference = await bus.media.put(f"size-{num_bytes}", BYTES[:num_bytes])
    assert await bus.media.get(reference) == BYTES[:num_bytes]


async def test_nats_own_tools_read_what_we_put(bus: Bus, raw: Client) -> None:
    reference = await bus.media.put("a name/with *stars*", BYTES)
    store = await raw.jetstream().object_store(reference.bucket)
    assert (await store.get(reference.name)).data == BYTES


async def test_more_than_allowed_is_refused_before_it_is_read(bus: Bus) -> None:
    reference = await bus.media.put(None, BYTES)
    with pytest.raises(PayloadTooLarge, match="max_bytes"):
        await bus.media.get(reference, max_bytes=1000)


async def test_other_bytes_than_the_reference_s_are_never_returned(bus: Bus, raw: Client) -> None:
    reference = await bus.media.put("replaced", BYTES)
    with pytest.raises(MediaMismatch):
        await bus.media.get(msgspec.structs.replace(reference, digest="0" * 64))
    await bus.media.put("replaced", BYTES[::-1])
    with pytest.raises(MediaMismatch):
        await bus.media.get(reference)
    await bus.media.put("replaced", BYTES[:10])
    with pytest.raises(MediaMismatch, match="10 bytes"):
        await bus.media.get(reference)


async def test_an_object_that_is_replaced_or_deleted_leaves_no_chunks(bus: Bus) -> None:
    jetstream, stream = bus._durable._jetstream, bus._durable._streams.media

    async def num_messages() -> int:
        return int((await jetstream.api(f"STREAM.INFO.{stream.name}"))["state"]["messages"])

    await bus.media.put(None, b"the bucket is there now")
    before = await num_messages()
    await bus.media.put("once", BYTES)
    reference = await bus.media.put("once", BYTES)
    assert await num_messages() == before + 24
    await bus.media.delete(reference)
    assert await num_messages() == before
    with pytest.raises(MediaNotFound):
        await bus.media.get(reference)
    await bus.media.delete(reference)


async def test_a_put_that_fails_or_is_cancelled_leaves_no_chunks(bus: Bus) -> None:
    jetstream, stream = bus._durable._jetstream, bus._durable._streams.media
    await bus.media.put(None, b"the bucket is there now")
    before = (await jetstream.api(f"STREAM.INFO.{stream.name}"))["state"]["messages"]
    reached = asyncio.Event()

    async def breaks() -> AsyncIterator[bytes]:
        yield BYTES
        raise OSError("the disk is gone")

    async def stalls() -> AsyncIterator[bytes]:
        yield BYTES
        reached.set()
        await asyncio.Event().wait()

    with pytest.raises(OSError, match="the disk is gone"):
        await bus.media.put(None, breaks())
    with pytest.raises(DeadlineExceeded):
        await bus.media.put(None, stalls(), timeout_s=0.3)
    reached.clear()
    putting = asyncio.create_task(bus.media.put(None, stalls()))
    await reached.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert (await jetstream.api(f"STREAM.INFO.{stream.name}"))["state"]["messages"] == before


async def test_a_reference_to_another_bucket_is_not_followed(bus: Bus) -> None:
    reference = await bus.media.put(None, b"x")
    with pytest.raises(MediaNotFound, match="NIXLBUS_PREFIX"):
        await bus.media.get(msgspec.structs.replace(reference, bucket="SECRETS"))
