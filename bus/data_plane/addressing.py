"""Address arithmetic: from the extents of a grant to the pairs of address ranges that NIXL copies.

In: `MemoryExtent`s (region, offsets) and the regions they name. Out: `AddressRange`s, and `CopyPair`s for a local and
a remote side whose pieces needn't be cut alike. Pure integers: no memory is touched here, and nothing that a peer
sent is trusted: a range outside its region is an error before anything is posted.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from bus.errors import BusError, LocalProtocolError, RemoteProtocolError, WrongLength
from schemas.handshake import Region
from schemas.operations import MemoryExtent, Run

MAX_RANGES = 1 << 20
"""Address ranges of one operation after expansion; more is a mistake or an attack."""


class AddressRange(NamedTuple):
    """Consecutive bytes in one process's memory."""

    address: int
    length_bytes: int
    device_id: int


class CopyPair(NamedTuple):
    """One piece of a transfer: as many bytes on either side."""

    local_address: int
    remote_address: int
    length_bytes: int
    local_device_id: int
    remote_device_id: int


def contiguous_extent(region: int, generation: int, offset_bytes: int, length_bytes: int) -> MemoryExtent:
    """One run of bytes."""
    return MemoryExtent(
        region=region, generation=generation, runs=[Run(offset_bytes=offset_bytes, length_bytes=length_bytes)]
    )


def resolve(extents: Sequence[MemoryExtent], regions: Mapping[int, Region], *, peer: str = "") -> list[AddressRange]:
    """The address ranges of `extents`, in the order of their bytes.

    Raises `RemoteProtocolError` for a peer's extents, `LocalProtocolError` for our own (`peer` empty): an unknown
    region, a range outside its region, a repetition that overlaps itself, too many ranges.
    """
    if len(extents) == 1 and extents[0].count == 1 and len(extents[0].runs) == 1:
        return [_single(extents[0], regions, peer)]
    if sum(extent.count * len(extent.runs) for extent in extents) > MAX_RANGES:
        raise _violation(f"an operation of more than {MAX_RANGES} address ranges", peer)
    ranges: list[AddressRange] = []
    for extent in extents:
        region = _region(extent, regions, peer)
        _check_bounds(extent, region, peer)
        ranges.extend(_expand(extent, region))
    return ranges


def pair(local: Sequence[AddressRange], remote: Sequence[AddressRange]) -> list[CopyPair]:
    """Cut both sides at the union of their boundaries and merge neighbours that continue each other.

    Raises `WrongLength` if the two sides don't hold the same number of bytes.
    """
    if len(local) == len(remote) == 1 and local[0].length_bytes == remote[0].length_bytes:
        here, there = local[0], remote[0]
        return [CopyPair(here.address, there.address, here.length_bytes, here.device_id, there.device_id)]
    local_bytes, remote_bytes = total_bytes(local), total_bytes(remote)
    if local_bytes != remote_bytes:
        raise WrongLength(
            f"the local memory holds {local_bytes:,} bytes and the grant {remote_bytes:,}",
            num_bytes=local_bytes,
        )
    return list(_merged(_cut(local, remote)))


class Cutter:
    """Takes pieces of a chosen size off the front of a list of pairs."""

    def __init__(self, pairs: Sequence[CopyPair]) -> None:
        self._rest = deque(pairs)

    @property
    def is_empty(self) -> bool:
        """Whether everything was taken."""
        return not self._rest

    def take(self, room: int) -> list[CopyPair]:
        """The next pairs, of at most `room` bytes together; the last of them is cut to fit."""
        chunk: list[CopyPair] = []
        while self._rest and room > 0:
            whole = self._rest.popleft()
            if whole.length_bytes > room:
                chunk.append(whole._replace(length_bytes=room))
                self._rest.appendleft(_advance(whole, room))
                return chunk
            chunk.append(whole)
            room -= whole.length_bytes
        return chunk


def total_bytes(ranges: Iterable[AddressRange]) -> int:
    """Bytes that the ranges hold together."""
    return sum(part.length_bytes for part in ranges)


def _region(extent: MemoryExtent, regions: Mapping[int, Region], peer: str) -> Region:
    region = regions.get(extent.region)
    if region is None:
        raise _violation(f"region {extent.region}, which is not registered", peer)
    return region


def _single(extent: MemoryExtent, regions: Mapping[int, Region], peer: str) -> AddressRange:
    """What most operations are: one run. The same checks, without loops."""
    region, run = _region(extent, regions, peer), extent.runs[0]
    if run.offset_bytes + run.length_bytes > region.length_bytes:
        _check_bounds(extent, region, peer)
    return AddressRange(region.address + run.offset_bytes, run.length_bytes, region.device_id)


def _check_bounds(extent: MemoryExtent, region: Region, peer: str) -> None:
    end = max(run.offset_bytes + run.length_bytes for run in extent.runs)
    start = min(run.offset_bytes for run in extent.runs)
    if extent.count > 1 and extent.stride_bytes < end - start:
        raise _violation(f"repetitions every {extent.stride_bytes} bytes overlap runs that span {end - start}", peer)
    last = end + (extent.count - 1) * extent.stride_bytes
    if last > region.length_bytes:
        raise _violation(
            f"memory up to byte {last:,} of region {region.region}, which has {region.length_bytes:,}", peer
        )


def _expand(extent: MemoryExtent, region: Region) -> Iterator[AddressRange]:
    for repetition in range(extent.count):
        base = region.address + repetition * extent.stride_bytes
        for run in extent.runs:
            yield AddressRange(base + run.offset_bytes, run.length_bytes, region.device_id)


def _cut(local: Sequence[AddressRange], remote: Sequence[AddressRange]) -> Iterator[CopyPair]:
    sources, targets = iter(local), iter(remote)
    here, there = next(sources, None), next(targets, None)
    while here is not None and there is not None:
        length = min(here.length_bytes, there.length_bytes)
        yield CopyPair(here.address, there.address, length, here.device_id, there.device_id)
        here = _rest(here, length) or next(sources, None)
        there = _rest(there, length) or next(targets, None)


def _rest(part: AddressRange, taken: int) -> AddressRange | None:
    if part.length_bytes == taken:
        return None
    return AddressRange(part.address + taken, part.length_bytes - taken, part.device_id)


def _merged(pairs: Iterable[CopyPair]) -> Iterator[CopyPair]:
    previous: CopyPair | None = None
    for current in pairs:
        if previous is not None and _advance(previous, previous.length_bytes) == current._replace(length_bytes=0):
            previous = previous._replace(length_bytes=previous.length_bytes + current.length_bytes)
            continue
        if previous is not None:
            yield previous
        previous = current
    if previous is not None:
        yield previous


def _advance(part: CopyPair, num_bytes: int) -> CopyPair:
    return part._replace(
        local_address=part.local_address + num_bytes,
        remote_address=part.remote_address + num_bytes,
        length_bytes=part.length_bytes - num_bytes,
    )


def _violation(what: str, peer: str) -> BusError:
    return RemoteProtocolError(f"the peer named {what}", peer=peer) if peer else LocalProtocolError(what)
