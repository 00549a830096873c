"""Registered memory: the regions that peers may be let into, and descriptors of pieces of them.

In: torch tensors, arena slices, block lists. Out: `Descriptor`s that name registered bytes and keep their owner
alive. Regions are registered when the bus opens or when a pool is added, never on the hot path, and stay registered
while the process lives: deregistering is no fence against a peer's transfer under way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bus.data_plane.addressing import contiguous_extent
from bus.data_plane.agent import NixlAgent
from bus.data_plane.arena import Arena, ArenaSlice, Pinnable
from bus.errors import LocalProtocolError
from schemas.handshake import Region
from schemas.operations import MemoryExtent

if TYPE_CHECKING:
    import torch


class _Unpinned:
    """Stands for memory that its user keeps for the process's life."""

    def pin(self) -> None:
        """Nothing to count."""

    def unpin(self) -> None:
        """Nothing to count."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Local memory of one side of an operation: registered bytes in their order, and who owns them."""

    extents: Sequence[MemoryExtent]
    lease: Pinnable
    storage: object = None
    """Kept referenced for as long as the operation may touch the bytes."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it names."""
        return sum(extent.num_bytes for extent in self.extents)


class RegisteredMemory:
    """The regions of one agent. Not for use from several threads."""

    def __init__(self, agent: NixlAgent) -> None:
        self._agent = agent
        self._regions: dict[int, Region] = {}
        self._storages: dict[int, torch.Tensor] = {}
        self.num_registrations = 0

    @property
    def regions(self) -> dict[int, Region]:
        """Region number to region; what the handshake tells peers."""
        return self._regions

    def add(self, tensor: "torch.Tensor") -> Region:
        """Register the memory of a contiguous tensor, CPU or CUDA, for the life of the process.

        Raises `LocalProtocolError` if it isn't contiguous, `RegistrationError` if NIXL refuses it.
        """
        _check_contiguous(tensor)
        region = Region(
            region=len(self._regions),
            address=tensor.data_ptr(),
            length_bytes=tensor.nbytes,
            memory_type="VRAM" if tensor.is_cuda else "DRAM",
            device_id=max(tensor.get_device(), 0),
        )
        self._agent.register(region.address, region.length_bytes, region.memory_type, region.device_id)
        self.num_registrations += 1
        self._regions[region.region] = region
        self._storages[region.region] = tensor
        return region

    def add_arena(self, capacity_bytes: int) -> "TensorArena":
        """Allocate and register host memory and hand it out in slices."""
        import torch

        storage = torch.empty(capacity_bytes, dtype=torch.uint8)
        region = self.add(storage)
        return TensorArena(Arena(region.region, region.address, capacity_bytes), storage)

    def describe(self, tensor: "torch.Tensor") -> Descriptor:
        """Name the bytes of a contiguous tensor that lies in a registered region. Raises `LocalProtocolError`."""
        _check_contiguous(tensor)
        address, num_bytes = tensor.data_ptr(), tensor.nbytes
        for region in self._regions.values():
            offset = address - region.address
            if offset >= 0 and offset + num_bytes <= region.length_bytes:
                extent = contiguous_extent(region.region, 0, offset, num_bytes)
                return Descriptor([extent], _Unpinned(), tensor)
        raise LocalProtocolError(
            f"the tensor's {num_bytes:,} bytes lie in no registered region",
            remedy="allocate it from bus.arena, or register it once with bus.register",
            num_bytes=num_bytes,
        )


class TensorArena:
    """An arena whose slices are seen as tensors."""

    def __init__(self, arena: Arena, storage: "torch.Tensor") -> None:
        self.arena = arena
        self._storage = storage

    def allocate(self, shape: Sequence[int], dtype: "torch.dtype") -> "ArenaTensor":
        """An uninitialised tensor of `shape` in registered memory. Raises `PoolExhausted`."""
        num_bytes = dtype.itemsize
        for length in shape:
            num_bytes *= length
        lease = self.arena.allocate(num_bytes)
        view = self._storage[lease.offset_bytes : lease.offset_bytes + num_bytes].view(dtype).view(tuple(shape))
        return ArenaTensor(view, lease)


class ArenaTensor:
    """A tensor in an arena slice. Use as a context manager, or call `free`; an operation's pin outlasts both."""

    def __init__(self, tensor: "torch.Tensor", lease: ArenaSlice) -> None:
        self.tensor = tensor
        self._lease = lease

    @property
    def descriptor(self) -> Descriptor:
        """Its bytes, for an operation."""
        lease = self._lease
        extent = contiguous_extent(lease.region, lease.generation, lease.offset_bytes, lease.num_bytes)
        return Descriptor([extent], lease, self.tensor)

    def free(self) -> None:
        """Give the slice back, now or when the last operation lets go of it."""
        self._lease.free()

    def __enter__(self) -> "ArenaTensor":
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


def _check_contiguous(tensor: "torch.Tensor") -> None:
    if not tensor.is_contiguous():
        raise LocalProtocolError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous",
            remedy="pass tensor.contiguous() and keep it; nixlbus makes no hidden copies",
        )
