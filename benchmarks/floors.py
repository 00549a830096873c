"""What moving bytes costs by itself: raw NIXL between the same two processes, and a plain copy."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.report import Report
from bus.data_plane.addressing import CopyPair
from bus.data_plane.agent import NixlAgent, TransferDirection, TransferState
from bus.data_plane.memory import huge_pages


class Invitation(NamedTuple):
    """What the writing side needs to know."""

    agent_metadata: bytes
    address: int


class FloorTarget:
    """Memory in the other process, with an agent of its own."""

    def __init__(self, num_bytes: int, on_huge_pages: bool) -> None:
        self._memory = _memory(num_bytes, on_huge_pages)
        self._agent = NixlAgent(f"floor-target-{on_huge_pages}")
        self._agent.register(self._memory.data_ptr(), num_bytes, "DRAM", 0)
        self.invitation = Invitation(self._agent.metadata(), self._memory.data_ptr())


class Floor:
    """One agent that writes there, in a loop: no messages, no waiting for anybody."""

    def __init__(self, invitation: Invitation, num_bytes: int, on_huge_pages: bool) -> None:
        self._memory = _memory(num_bytes, on_huge_pages)
        self._agent = NixlAgent(f"floor-initiator-{on_huge_pages}")
        self._agent.register(self._memory.data_ptr(), num_bytes, "DRAM", 0)
        self._peer = self._agent.load_peer(invitation.agent_metadata)
        self._address = invitation.address

    def write(self, size_bytes: int) -> None:
        """Move the bytes."""
        pair = CopyPair(self._memory.data_ptr(), self._address, size_bytes, 0, 0)
        handle = self._agent.create_transfer(TransferDirection.WRITE, [pair], self._peer)
        state = self._agent.post(handle)
        while state is not TransferState.DONE:
            time.sleep(30e-6)
            state = self._agent.check(handle)
        self._agent.release(handle)


def _memory(num_bytes: int, on_huge_pages: bool) -> torch.Tensor:
    storage = torch.frombuffer(huge_pages(num_bytes), dtype=torch.uint8) if on_huge_pages else None
    memory = torch.empty(num_bytes, dtype=torch.uint8) if storage is None else storage
    return memory.fill_(1)  # every page is there


def memcpy(report: Report, sizes: Sequence[int], repetitions: Callable[[int], int]) -> None:
    """A plain copy inside of this process."""
    source, target = torch.ones(max(sizes), dtype=torch.uint8), torch.zeros(max(sizes), dtype=torch.uint8)
    for size_bytes in sizes:
        durations = []
        started_s = time.perf_counter()
        for _ in range(repetitions(size_bytes)):
            before_s = time.perf_counter()
            target[:size_bytes].copy_(source[:size_bytes])
            durations.append(time.perf_counter() - before_s)
        report.row("write", "memcpy", size_bytes, 1, durations, time.perf_counter() - started_s)
