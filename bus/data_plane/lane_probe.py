"""Which lanes UCX takes to a live peer: a process of its own that writes the peer's granted memory once.

In: a `LaneProbe`. Out: UCX's own wording of the lanes. A process of its own, because UCX tells its lanes only in its
log, at a level that is set when it is loaded; the same environment and machine let it choose as this worker did.
Run as a program it takes the probe on stdin, since agent metadata is a capability and has no place among arguments or
variables, and prints one line of JSON. Once `write_apart` has returned, the process is gone and writes no more; it dies
with its parent's thread as well.
"""

import ctypes
import json
import mmap
import os
import secrets
import signal
import subprocess
import sys

import msgspec

from bus.data_plane.addressing import AddressRange, pair
from bus.data_plane.agent import NixlAgent, TransferDirection, TransferState
from bus.data_plane.ucx_log import chosen_lanes, log_environment
from bus.errors import DataPlaneError, DeadlineExceeded, TransferError

_PR_SET_PDEATHSIG = 1


class LaneProbe(msgspec.Struct, frozen=True):
    """The memory to write, and what its owner's agent told of it."""

    agent_name: str
    agent_metadata: bytes
    memory_type: str
    ranges: list[AddressRange]
    parent_pid: int
    """Whoever asks: the process writes nothing for one that has ended."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are written."""
        return sum(part.length_bytes for part in self.ranges)


def write_apart(probe: LaneProbe, timeout_s: float) -> str:
    """Write zeros into the memory from another process; returns the lanes, "" if UCX does not say.

    Blocks until that process is gone. Raises `TransferError`, and `DeadlineExceeded` after `timeout_s`.
    """
    try:
        finished = subprocess.run(  # our own interpreter and module
            [sys.executable, "-m", "bus.data_plane.lane_probe"],
            env=log_environment(os.environ),
            input=msgspec.msgpack.encode(probe),
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"a write to the peer from another process was not done in {timeout_s:.0f} s") from None
    except OSError as error:
        raise TransferError(f"no other process could be started: {error}") from None
    answers = [line for line in finished.stdout.splitlines() if line.startswith(b"{")]
    answer = json.loads(answers[-1]) if answers else {"error": f"it ended with status {finished.returncode}"}
    if "error" in answer:
        raise TransferError(f"a write to the peer from another process failed: {answer['error']}")
    return chosen_lanes(finished.stderr.decode(errors="replace"))


def main() -> None:
    """Write, and say how it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _write(msgspec.msgpack.decode(sys.stdin.buffer.read(), type=LaneProbe))
        answer = {}
    except DataPlaneError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)  # noqa: T201
    os._exit(0)  # NIXL's threads and the peer's connection need no farewell


def _write(probe: LaneProbe) -> None:
    if os.getppid() != probe.parent_pid:
        raise TransferError("the worker that asked for the write has ended")
    agent = NixlAgent(f"lane-probe-{secrets.token_hex(4)}")
    zeros = mmap.mmap(-1, probe.num_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(zeros))
    agent.register(address, probe.num_bytes, "DRAM", 0)
    if agent.load_peer(probe.agent_metadata) != probe.agent_name:
        raise TransferError("the peer's metadata names another agent than its description")
    pairs = pair([AddressRange(address, probe.num_bytes, 0)], probe.ranges)
    handle = agent.create_transfer(TransferDirection.WRITE, pairs, probe.agent_name, ("DRAM", probe.memory_type))
    state = agent.post(handle)
    while state is not TransferState.DONE:
        state = agent.check(handle)


if __name__ == "__main__":
    main()
