"""Checksums of an operation's bytes, where both sides want more than NIXL's DONE.

In: address ranges of host memory, in their order. Out: XXH3 with 128 bits. Computed in a thread: 64 MiB take some
10 ms, and xxhash lets the event loop run meanwhile. The memory is pinned until the thread is through with it.
"""

import asyncio
import ctypes
from collections.abc import Sequence

from bus.data_plane.addressing import AddressRange
from bus.data_plane.arena import Pinnable

_PIECE_BYTES = 4 << 20


async def checksum(ranges: Sequence[AddressRange], lease: Pinnable, storage: object) -> bytes:
    """16 bytes that stand for the memory's contents now. Cancelled, the thread keeps the memory until it is through."""
    lease.pin()
    return await asyncio.to_thread(_digest, ranges, lease, storage)


def _digest(ranges: Sequence[AddressRange], lease: Pinnable, storage: object) -> bytes:
    try:
        return _digest_of(ranges)
    finally:
        lease.unpin()


def _digest_of(ranges: Sequence[AddressRange]) -> bytes:
    import xxhash

    state = xxhash.xxh3_128()
    for part in ranges:
        for offset in range(0, part.length_bytes, _PIECE_BYTES):
            length = min(_PIECE_BYTES, part.length_bytes - offset)
            state.update((ctypes.c_char * length).from_address(part.address + offset))
    return bytes(state.digest())
