"""Large messages: bytes over max_payload, kept in JetStream's object store and sent as a reference.

In: bytes, a file or an iterator. Out: a `MediaReference` for any message; with it, the bytes again.
Invariants: `get` returns bytes only if their SHA-256 is the reference's, and never more than `max_bytes`; a `put` that
fails or is cancelled leaves nothing behind but what the bucket's age takes.
The objects are those of ADR-20, so `nats object` lists and reads them. For tensors use the data plane.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bus.control_plane.jetstream import JetStream, JetStreamError, NoStream
from bus.deadline import Deadline
from bus.errors import BusError, DeadlineExceeded, LocalProtocolError, MediaMismatch, MediaNotFound, PayloadTooLarge
from bus.jobs.streams import Streams, ensure_stream
from schemas.media import MediaReference

Source = bytes | bytearray | memoryview | str | Path | AsyncIterator[bytes]
"""Bytes, the path of a file, or pieces of any size."""

DEFAULT_MAX_BYTES = 64 << 20
_CHUNK_BYTES = 128 << 10
"""ADR-20's default. Smaller where max_payload is."""
_IN_FLIGHT = 8
"""Chunks on their way at once: 1 MiB."""
_PURGE_TIMEOUT_S = 2.0


class MediaStore:
    """The object store of one bus."""

    def __init__(self, jetstream: JetStream, streams: Streams) -> None:
        self._jetstream = jetstream
        self._stream = streams.media
        self.bucket = streams.media_bucket

    async def put(
        self, name: str | None, source: Source, *, content_type: str = "", timeout_s: float = 60.0
    ) -> MediaReference:
        """Store `source` under `name` (None: a random one) and return the reference to send.

        A second object of the same name replaces the first, whose references don't fit any more.
        Raises `DurableWorkUnavailable` (no JetStream, no space), `ConnectionLost`, `PermissionDenied`,
        `DeadlineExceeded`, `OSError` for a file that can't be read.
        """
        name = secrets.token_hex(16) if name is None else name
        if not name or len(name) > 512:
            raise LocalProtocolError("an object's name has 1 to 512 characters")
        object_id = secrets.token_hex(16)
        try:
            async with asyncio.timeout(Deadline.after(timeout_s).remaining_s):
                return await self._store(name, object_id, source, content_type)
        except TimeoutError:
            await self._forget(object_id)
            raise DeadlineExceeded(f"the object {name} was not stored within {timeout_s:g} s") from None
        except BaseException:
            await self._forget(object_id)
            raise

    async def get(
        self, reference: MediaReference, max_bytes: int = DEFAULT_MAX_BYTES, *, timeout_s: float = 60.0
    ) -> bytes:
        """The bytes of a reference, proved.

        Raises `PayloadTooLarge` (over `max_bytes`; nothing was read), `MediaNotFound`, `MediaMismatch`, and what `put`
        raises of the connection.
        """
        self._check_bucket(reference)
        if reference.num_bytes > max_bytes:
            raise PayloadTooLarge(
                f"the object {reference.name} has {reference.num_bytes:,} bytes, more than the {max_bytes:,} allowed",
                num_bytes=reference.num_bytes,
                remedy="pass a larger max_bytes",
            )
        try:
            async with asyncio.timeout(Deadline.after(timeout_s).remaining_s):
                return await self._load(reference)
        except TimeoutError:
            raise DeadlineExceeded(f"the object {reference.name} was not read within {timeout_s:g} s") from None

    async def delete(self, reference: MediaReference) -> None:
        """Take an object out of the store; one that isn't there is no error."""
        self._check_bucket(reference)
        with contextlib.suppress(MediaNotFound):
            await self._forget_all(f"C.{(await self._info(reference.name))['nuid']}")
        await self._forget_all(f"M.{_encoded(reference.name)}")

    async def _store(self, name: str, object_id: str, source: Source, content_type: str) -> MediaReference:
        await ensure_stream(self._jetstream, self._stream)
        replaced = ""
        with contextlib.suppress(MediaNotFound):
            replaced = str((await self._info(name))["nuid"])
        digest, num_bytes, num_chunks = hashlib.sha256(), 0, 0
        chunk_bytes = min(_CHUNK_BYTES, self._jetstream.connection.max_payload_bytes // 2)
        async with _Window(_IN_FLIGHT) as window:
            async for chunk in _chunks(source, chunk_bytes):
                digest.update(chunk)
                num_bytes += len(chunk)
                num_chunks += 1
                await window.start(self._jetstream.publish(self._subject(f"C.{object_id}"), chunk))
        info = {
            "name": name,
            "bucket": self.bucket,
            "nuid": object_id,
            "size": num_bytes,
            "chunks": num_chunks,
            "mtime": datetime.now(UTC).isoformat(),
            "digest": f"SHA-256={base64.urlsafe_b64encode(digest.digest()).decode()}",
            "options": {"max_chunk_size": chunk_bytes},
        }
        if content_type:
            info["headers"] = {"Content-Type": [content_type]}
        headers = {"Nats-Rollup": "sub"}
        await self._jetstream.publish(self._subject(f"M.{_encoded(name)}"), json.dumps(info).encode(), headers)
        if replaced:
            await self._forget(replaced)
        return MediaReference(
            bucket=self.bucket,
            name=name,
            digest=digest.hexdigest(),
            num_bytes=num_bytes,
            content_type=content_type,
        )

    async def _load(self, reference: MediaReference) -> bytes:
        info = await self._info(reference.name)
        if info.get("size") != reference.num_bytes:
            raise MediaMismatch(
                f"the object {reference.name} has {info.get('size')} bytes, its reference says {reference.num_bytes}"
            )
        subject = self._subject(f"C.{info['nuid']}")
        content, sequence = bytearray(), 1
        while len(content) < reference.num_bytes:
            chunk = await self._jetstream.next_message(self._stream.name, subject, sequence)
            if chunk is None:
                raise MediaMismatch(f"the object {reference.name} ends after {len(content):,} bytes")
            content += chunk.payload
            sequence = chunk.sequence + 1
        if len(content) != reference.num_bytes or hashlib.sha256(content).hexdigest() != reference.digest:
            raise MediaMismatch(f"the bytes of the object {reference.name} are not those of its reference")
        return bytes(content)

    async def _info(self, name: str) -> dict[str, Any]:
        try:
            stored = await self._jetstream.last_message(self._stream.name, self._subject(f"M.{_encoded(name)}"))
        except NoStream:
            await self._jetstream.check()
            stored = None
        try:
            info = json.loads(stored.payload) if stored else {}
        except ValueError:
            info = {}
        if not isinstance(info, dict) or not info.get("nuid") or info.get("deleted"):
            raise MediaNotFound(f"there is no object {name} in {self.bucket}")
        return info

    async def _forget(self, object_id: str) -> None:
        """Remove an object's chunks, if that can be done now; their age will otherwise."""
        with contextlib.suppress(BusError, TimeoutError):
            await self._forget_all(f"C.{object_id}")

    async def _forget_all(self, what: str) -> None:
        with contextlib.suppress(JetStreamError):
            await self._jetstream.api(
                f"STREAM.PURGE.{self._stream.name}", {"filter": self._subject(what)}, timeout_s=_PURGE_TIMEOUT_S
            )

    def _subject(self, what: str) -> str:
        return f"$O.{self.bucket}.{what}"

    def _check_bucket(self, reference: MediaReference) -> None:
        if reference.bucket != self.bucket:
            raise MediaNotFound(
                f"the reference names the bucket {reference.bucket[:80]!r}, this bus has {self.bucket}",
                remedy="open both buses with the same NIXLBUS_PREFIX",
            )


class _Window:
    """A few publishes on their way at once; the first that fails fails the whole."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> "_Window":
        return self

    async def start(self, work: Any) -> None:
        if len(self._tasks) >= self._size:
            await self._wait(asyncio.FIRST_COMPLETED)
        self._tasks.add(asyncio.ensure_future(work))

    async def _wait(self, until: str) -> None:
        done, self._tasks = await asyncio.wait(self._tasks, return_when=until)
        for task in done:
            task.result()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._tasks:
                await self._wait(asyncio.ALL_COMPLETED)
        finally:  # what is on its way arrives, and a purge that overtook it would leave it
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=_PURGE_TIMEOUT_S)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


async def _chunks(source: Source, chunk_bytes: int) -> AsyncIterator[bytes]:
    """`source` in pieces of `chunk_bytes`, the last one shorter."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        whole = memoryview(source).cast("B")
        for start in range(0, len(whole), chunk_bytes):
            yield bytes(whole[start : start + chunk_bytes])
    elif isinstance(source, (str, Path)):
        file = await asyncio.to_thread(open, source, "rb")
        try:
            while chunk := await asyncio.to_thread(file.read, chunk_bytes):
                yield chunk
        finally:
            file.close()
    else:
        kept = bytearray()
        async for piece in source:
            kept += piece
            while len(kept) >= chunk_bytes:
                yield bytes(kept[:chunk_bytes])
                del kept[:chunk_bytes]
        if kept:
            yield bytes(kept)


def _encoded(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()
