"""The other process of a test, and how to talk to it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bus import Bus, EmbeddedServer
from schemas.operations import RdmaMetadata
from tests.bus.operations.peer_process import Act, Acted, Manner, subject


@contextmanager
def peer_process(server: EmbeddedServer, key_file: str, worker_id: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A peer that does as it is told, and its epoch; it must end well, unless somebody killed it."""
    command = [sys.executable, str(Path(__file__).with_name("peer_process.py")), worker_id, server.url, key_file]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            epoch = process.stdout.readline().strip()
            assert epoch, "the peer did not start"
            yield process, epoch
            if process.poll() is None:
                process.communicate(timeout=30)
                assert process.returncode == 0
        finally:
            process.kill()


async def tell(
    bus: Bus, manner: Manner, grant: RdmaMetadata | None = None, num_bytes: int = 0, peer: str = "peer", **more: Any
) -> Acted:
    """Have a peer act, and wait until it has."""
    act = Act(manner=manner, grant=grant, num_bytes=num_bytes, **more)
    return await bus.request(subject(peer), act, Acted, timeout_s=20)


def is_written(tensor: torch.Tensor) -> bool:
    """Whether a peer has written it whole."""
    expected = (torch.arange(tensor.nbytes) % 251).to(torch.uint8)
    return torch.equal(tensor.flatten().view(torch.uint8), expected)
