from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.data_plane.addressing import AddressRange, Cutter, contiguous_extent, pair, resolve, total_bytes
from bus.errors import LocalProtocolError, RemoteProtocolError
from schemas.handshake import Region
from schemas.operations import MemoryExtent, Run

REGION_BYTES = 4096
REGIONS = {
    1: Region(region=1, address=1_000_000, length_bytes=REGION_BYTES, memory_type="DRAM"),
    2: Region(region=2, address=9_000_000, length_bytes=REGION_BYTES, memory_type="VRAM", device_id=3),
}


@st.composite
def cut(draw: st.DrawFn, num_bytes: int, base: int) -> list[AddressRange]:
    """Ranges that hold `num_bytes` between them, here and there in memory, never overlapping."""
    points = sorted(draw(st.sets(st.integers(1, num_bytes - 1), max_size=8))) if num_bytes > 1 else []
    lengths = [end - start for start, end in pairwise([0, *points, num_bytes])]
    gaps = [draw(st.integers(0, 3)) for _ in lengths]
    ranges, address = [], base
    for length, gap in zip(lengths, gaps, strict=True):
        address += gap
        ranges.append(AddressRange(address, length, 0))
        address += length
    return draw(st.permutations(ranges))


def byte_addresses(ranges: list[AddressRange]) -> list[int]:
    return [part.address + i for part in ranges for i in range(part.length_bytes)]


@given(data=st.data(), num_bytes=st.integers(1, 200), chunk_bytes=st.integers(1, 64))
def test_pairs_and_chunks_copy_each_byte_to_its_place_once(
    data: st.DataObject, num_bytes: int, chunk_bytes: int
) -> None:
    local, remote = data.draw(cut(num_bytes, 10_000)), data.draw(cut(num_bytes, 50_000))
    expected = list(zip(byte_addresses(local), byte_addresses(remote), strict=True))
    pairs = pair(local, remote)
    assert [(p.local_address + i, p.remote_address + i) for p in pairs for i in range(p.length_bytes)] == expected
    cutter, posts = Cutter(pairs), []
    while not cutter.is_empty:
        posts.append(cutter.take(chunk_bytes))
    flat = [p for post in posts for p in post]
    assert [(p.local_address + i, p.remote_address + i) for p in flat for i in range(p.length_bytes)] == expected
    sizes = [sum(p.length_bytes for p in post) for post in posts]
    assert all(size == chunk_bytes for size in sizes[:-1])
    assert 0 < sizes[-1] <= chunk_bytes


def test_neighbours_are_merged() -> None:
    local = [AddressRange(0x1000, 64, 0), AddressRange(0x1040, 64, 0)]
    remote = [AddressRange(0x9000, 32, 0), AddressRange(0x9020, 96, 0)]
    assert len(pair(local, remote)) == 1


def test_unequal_sides_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="128 bytes and the grant 64"):
        pair([AddressRange(0, 128, 0)], [AddressRange(0, 64, 0)])


def test_repetitions_are_laid_out_one_after_the_other() -> None:
    extent = MemoryExtent(
        region=2,
        generation=0,
        runs=[Run(offset_bytes=64, length_bytes=16), Run(offset_bytes=0, length_bytes=8)],
        count=3,
        stride_bytes=100,
    )
    ranges = resolve([extent], REGIONS)
    assert ranges == [
        AddressRange(9_000_000 + base + offset, length, 3)
        for base in (0, 100, 200)
        for offset, length in ((64, 16), (0, 8))
    ]
    assert total_bytes(ranges) == extent.num_bytes == 72


@pytest.mark.parametrize(
    ("extent", "what"),
    [
        (contiguous_extent(7, 0, 0, 1), "region 7"),
        (contiguous_extent(1, 0, REGION_BYTES, 1), "memory up to byte"),
        (contiguous_extent(1, 0, 0, REGION_BYTES + 1), "memory up to byte"),
        (contiguous_extent(1, 0, 2**62, 2**62), "memory up to byte"),
        (
            MemoryExtent(region=1, generation=0, runs=[Run(offset_bytes=0, length_bytes=64)], count=3, stride_bytes=63),
            "overlap",
        ),
        (
            MemoryExtent(
                region=1, generation=0, runs=[Run(offset_bytes=0, length_bytes=64)], count=65, stride_bytes=64
            ),
            "memory up to byte",
        ),
        (
            MemoryExtent(
                region=1, generation=0, runs=[Run(offset_bytes=0, length_bytes=1)], count=2**40, stride_bytes=1
            ),
            "address ranges",
        ),
    ],
)
def test_memory_outside_its_region_is_refused_to_a_peer_and_to_ourselves(extent: MemoryExtent, what: str) -> None:
    with pytest.raises(RemoteProtocolError, match=what):
        resolve([extent], REGIONS, peer="somebody")
    with pytest.raises(LocalProtocolError, match=what):
        resolve([extent], REGIONS)
