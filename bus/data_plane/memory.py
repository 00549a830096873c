"""Registered memory: the regions that peers may be let into, and the pieces of them that operations work on.

In: descriptors, tensors, arena slices, block lists. Out: `LocalMemory`, which names registered bytes and keeps their
owner alive. Arenas and pools are registered once, never on the hot path, and stay registered while the process lives:
deregistering is no fence against a peer's transfer under way. Memory from anywhere else is registered when it is first
used (`registration`). Safe to use from any thread.
"""

import contextlib
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bus.data_plane.addressing import contiguous_extent
from bus.data_plane.agent import NixlAgent
from bus.data_plane.arena import Arena, ArenaSlice, Pinnable
from bus.data_plane.descriptor import HOST, Descriptor, Device, layout_of
from bus.data_plane.registration import ForeignMemory
from bus.errors import LocalProtocolError
from schemas.handshake import Region
from schemas.operations import MemoryExtent, TensorLayout

if TYPE_CHECKING:
    import torch


class _Unpinned:
    """Stands for memory that its user keeps for the process's life."""

    def pin(self) -> None:
        """Nothing to count."""

    def unpin(self) -> None:
        """Nothing to count."""


_UNPINNED = _Unpinned()


class _Together:
    """Several memories' leases as one."""

    def __init__(self, parts: "Sequence[LocalMemory]") -> None:
        self._parts = parts

    def pin(self) -> None:
        for part in self._parts:
            part.lease.pin()

    def unpin(self) -> None:
        for part in self._parts:
            part.lease.unpin()


class LocalMemory(NamedTuple):
    """Local memory of one side of an operation: registered bytes in their order, and who owns them."""

    extents: Sequence[MemoryExtent]
    num_bytes: int
    lease: Pinnable
    storage: object = None
    """Kept referenced for as long as the operation may touch the bytes."""
    layout: TensorLayout | None = None
    device: Device = HOST
    is_writable: bool = True


class RegisteredMemory:
    """The regions of one agent. `max_foreign` bounds the registrations made on demand."""

    def __init__(self, agent: NixlAgent, max_foreign: int = 256) -> None:
        self._agent = agent
        self._regions: dict[int, Region] = {}
        self._storages: dict[int, object] = {}
        self.foreign = ForeignMemory(agent, self._regions, max_foreign)

    @property
    def regions(self) -> dict[int, Region]:
        """Region number to region; what the handshake tells peers."""
        return self._regions

    @property
    def num_registrations(self) -> int:
        """Registrations made so far, ended ones included."""
        return len(self._storages) + self.foreign.num_registrations

    def add(self, data: Any) -> Region:
        """Register contiguous memory for the life of the process.

        Raises `NotContiguous`, `InvalidDescriptor`, and `RegistrationError` if NIXL refuses it.
        """
        descriptor = data if isinstance(data, Descriptor) else Descriptor(data)
        region = self.foreign.register(descriptor.address, descriptor.num_bytes, descriptor.device).region
        self._storages[region.region] = descriptor
        return region

    def add_arena(self, capacity_bytes: int) -> "TensorArena":
        """Allocate and register host memory and hand it out in slices."""
        import torch

        storage = torch.frombuffer(huge_pages(capacity_bytes), dtype=torch.uint8)
        region = self.add(storage)
        return TensorArena(Arena(region.region, region.address, capacity_bytes), storage)

    def hold(self, local: Any) -> LocalMemory:
        """Name the bytes of whatever a caller hands over, registering them if nobody did, and pin them.

        Takes `LocalMemory`, `ArenaTensor`, `KvBlocks`, a `Descriptor`, what a `Descriptor` is made of, or a list of
        these, whose bytes follow each other. Raises what `Descriptor` raises, `RegistrationError`, `PoolExhausted`;
        nothing is pinned then. The caller owes one `lease.unpin()`.
        """
        if isinstance(local, ArenaTensor):
            local = local.descriptor
        elif isinstance(local, list):
            return self._hold_list(local)
        elif not isinstance(local, LocalMemory):
            if not hasattr(local, "descriptor"):
                return self._hold_one(local if isinstance(local, Descriptor) else Descriptor(local))
            local = local.descriptor
        described: LocalMemory = local
        described.lease.pin()
        return described

    def _hold_list(self, pieces: list[Any]) -> LocalMemory:
        if not pieces:
            raise LocalProtocolError("an operation needs at least one descriptor")
        parts: list[LocalMemory] = []
        together = _Together(parts)
        try:
            for piece in pieces:
                parts.append(self.hold(piece))  # noqa: PERF401  # those before a failure are to be let go
            if len({part.device for part in parts}) > 1:
                raise LocalProtocolError("one operation can't mix devices on one side; use an operation for each")
        except BaseException:
            together.unpin()
            raise
        return LocalMemory(
            [extent for part in parts for extent in part.extents],
            sum(part.num_bytes for part in parts),
            together,
            parts,
            None,
            parts[0].device,
            all(part.is_writable for part in parts),
        )

    def _hold_one(self, descriptor: Descriptor) -> LocalMemory:
        address, num_bytes, device = descriptor.address, descriptor.num_bytes, descriptor.device
        region = self._static_region(address, num_bytes, device)
        lease: Pinnable = _UNPINNED
        if region is None:
            held = self.foreign.hold(descriptor)
            region, lease = held.region, held
        extent = contiguous_extent(region.region, 0, address - region.address, num_bytes)
        return LocalMemory([extent], num_bytes, lease, descriptor, descriptor.layout, device, descriptor.is_writable)

    def _static_region(self, address: int, num_bytes: int, device: Device) -> Region | None:
        for number in tuple(self._storages):
            region = self._regions[number]
            inside = region.address <= address and address + num_bytes <= region.address + region.length_bytes
            if inside and (region.memory_type, region.device_id) == (device.memory_type, device.id):
                return region
        return None


def huge_pages(num_bytes: int) -> mmap.mmap:
    """Anonymous memory on huge pages, where the kernel has them: there is less to look up for a copy between processes,
    which takes a quarter less time with 64 MiB.
    """
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class TensorArena:
    """An arena whose slices are seen as tensors. Safe to use from any thread."""

    def __init__(self, arena: Arena, storage: "torch.Tensor") -> None:
        self.arena = arena
        self._storage = storage

    def allocate(self, shape: Sequence[int], dtype: "torch.dtype") -> "ArenaTensor":
        """An uninitialised tensor of `shape` in registered memory. Raises `PoolExhausted`."""
        num_bytes = dtype.itemsize
        for length in shape:
            num_bytes *= length
        return ArenaTensor(self._storage, self.arena.allocate(num_bytes), tuple(shape), dtype)


class ArenaTensor:
    """A tensor in an arena slice. Use as a context manager, or call `free`; an operation's pin outlasts both."""

    __slots__ = ("_described", "_dtype", "_lease", "_shape", "_storage", "_tensor")

    def __init__(
        self, storage: "torch.Tensor", lease: ArenaSlice, shape: tuple[int, ...], dtype: "torch.dtype"
    ) -> None:
        self._storage = storage
        self._lease = lease
        self._shape = shape
        self._dtype = dtype
        self._tensor: torch.Tensor | None = None
        self._described: LocalMemory | None = None

    @property
    def tensor(self) -> "torch.Tensor":
        """The tensor, a view of the arena."""
        if self._tensor is None:
            lease = self._lease
            piece = self._storage[lease.offset_bytes : lease.offset_bytes + lease.num_bytes]
            self._tensor = piece.view(self._dtype).view(self._shape)
        return self._tensor

    @property
    def descriptor(self) -> LocalMemory:
        """Its bytes, for an operation."""
        if self._described is None:
            lease = self._lease
            extent = contiguous_extent(lease.region, lease.generation, lease.offset_bytes, lease.num_bytes)
            layout = layout_of(self._dtype, self._shape)
            self._described = LocalMemory([extent], lease.num_bytes, lease, self._storage, layout)
        return self._described

    def free(self) -> None:
        """Give the slice back, now or when the last operation lets go of it."""
        self._lease.free()

    def __enter__(self) -> "ArenaTensor":
        return self

    def __exit__(self, *_: object) -> None:
        self.free()
