"""Memory that is handed out and taken back: leases with pins, and the arena that slices one registered region.

In: a region of bytes. Out: `ArenaSlice`s, aligned, each with a generation of its own. A slice that is freed while an
operation still has it pinned goes back only when the last pin is gone: so memory that a stranger may still write is
never handed out again, whoever forgets what. The region itself is registered once and stays for the process's life.
Safe to use from any thread.
"""

import threading
from abc import ABC, abstractmethod
from bisect import insort
from typing import Protocol

from bus.errors import LocalProtocolError, PoolExhausted

ALIGNMENT_BYTES = 256
"""CUDA's own allocation alignment, and a multiple of every cache line."""

_LOCK = threading.RLock()
"""Of every lease and arena: each holds it for a microsecond."""


class Pinnable(Protocol):
    """Memory that an operation can hold."""

    def pin(self) -> None:
        """Keep the memory from being handed out again."""

    def unpin(self) -> None:
        """Give up one pin."""


class MemoryLease(ABC):
    """Memory on loan: freed by its holder once, returned to its pool when no operation has it pinned."""

    def __init__(self) -> None:
        self._num_pins = 0
        self._freed = False

    def pin(self) -> None:
        """Hold the memory for an operation. Raises `LocalProtocolError` after `free`."""
        with _LOCK:
            if self._freed:
                raise LocalProtocolError("the memory was freed already")
            self._num_pins += 1

    def unpin(self) -> None:
        """Give up one pin; the last one of a freed lease returns it."""
        with _LOCK:
            self._num_pins -= 1
            self._return_if_done()

    def free(self) -> None:
        """Say that the holder is done; calling it again does nothing."""
        with _LOCK:
            if not self._freed:
                self._freed = True
                self._return_if_done()

    @property
    def is_pinned(self) -> bool:
        """Whether an operation holds the memory."""
        return self._num_pins > 0

    def _return_if_done(self) -> None:
        if self._freed and self._num_pins == 0:
            self._return()

    @abstractmethod
    def _return(self) -> None:
        """Give the memory back to its pool."""


class ArenaSlice(MemoryLease):
    """Bytes of an arena: `offset_bytes` into its region, `num_bytes` long, valid in one `generation`."""

    def __init__(self, arena: "Arena", offset_bytes: int, num_bytes: int, generation: int) -> None:
        super().__init__()
        self.offset_bytes = offset_bytes
        self.num_bytes = num_bytes
        self.generation = generation
        self._arena = arena

    @property
    def region(self) -> int:
        """The region that the arena slices."""
        return self._arena.region

    @property
    def address(self) -> int:
        """Address of the first byte in this process."""
        return self._arena.address + self.offset_bytes

    def _return(self) -> None:
        self._arena._take_back(self)


class Arena:
    """First-fit slices of one region, neighbours merged when they come back."""

    def __init__(self, region: int, address: int, capacity_bytes: int) -> None:
        self.region = region
        self.address = address
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._generation = 0
        self._free: list[tuple[int, int]] = [(0, capacity_bytes)]

    def allocate(self, num_bytes: int) -> ArenaSlice:
        """A slice of at least `num_bytes`. Raises `PoolExhausted` with the numbers."""
        if num_bytes <= 0:
            raise LocalProtocolError(f"{num_bytes} bytes can't be allocated")
        rounded = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        with _LOCK:
            for index, (offset, length) in enumerate(self._free):
                if length >= rounded:
                    self._free[index : index + 1] = [(offset + rounded, length - rounded)] if length > rounded else []
                    self.used_bytes += rounded
                    self._generation += 1
                    return ArenaSlice(self, offset, num_bytes, self._generation)
        raise PoolExhausted(
            f"no {num_bytes:,} bytes free in one piece: {self.used_bytes:,} of {self.capacity_bytes:,} are in use",
            num_bytes=num_bytes,
        )

    def _take_back(self, taken: ArenaSlice) -> None:
        rounded = -(-taken.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.used_bytes -= rounded
        insort(self._free, (taken.offset_bytes, rounded))
        self._free = _merged(self._free)


def _merged(holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for offset, length in holes:
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((offset, length))
    return merged
