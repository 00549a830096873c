"""What NIXL can do on this machine: two agents in a process of their own, one real write between them.

In: nothing (UCX's environment applies). Out: a `ProbeReport` with the transports that UCX chose, or why it failed.
A process of its own, because UCX tells its lanes only in its log, and because a broken installation may crash.
Run as a program it makes the write and prints one line of JSON.
"""

import json
import os
import subprocess
import sys
import time
from typing import NamedTuple

from bus.data_plane.addressing import CopyPair
from bus.data_plane.agent import NixlAgent, TransferDirection, TransferState, available_plugins
from bus.data_plane.ucx_log import chosen_lanes, log_environment, ucx_version
from bus.errors import RegistrationError

PROBE_BYTES = 16 << 20
TIMEOUT_S = 60.0


class ProbeReport(NamedTuple):
    """A write that worked. `lanes` is UCX's own wording; see `chosen_lanes`."""

    ucx_version: str
    lanes: str
    plugins: dict[str, list[str]]
    bytes_per_s: float


def probe_data_plane() -> ProbeReport:
    """Run the probe. Raises `RegistrationError` that says what failed."""
    try:
        finished = subprocess.run(  # our own interpreter and module
            [sys.executable, "-m", "bus.data_plane.probe"],
            env=log_environment(os.environ),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RegistrationError(f"a write between two NIXL agents was not done within {TIMEOUT_S:g} s") from None
    answers = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    if finished.returncode != 0 or not answers:
        lines = (finished.stderr or finished.stdout).strip().splitlines()
        raise RegistrationError(f"NIXL is not usable here: {lines[-1] if lines else f'status {finished.returncode}'}")
    log = finished.stdout + finished.stderr
    answer = json.loads(answers[-1])
    return ProbeReport(
        ucx_version(log) or "unknown",
        chosen_lanes(log) or "unknown",
        answer["plugins"],
        answer["bytes_per_s"],
    )


def _write_once() -> float:
    import torch

    writer, reader = NixlAgent("probe-writer"), NixlAgent("probe-reader")
    source, target = torch.ones(PROBE_BYTES, dtype=torch.uint8), torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    writer.register(source.data_ptr(), PROBE_BYTES, "DRAM", 0)
    reader.register(target.data_ptr(), PROBE_BYTES, "DRAM", 0)
    peer = writer.load_peer(reader.metadata())
    pair = CopyPair(source.data_ptr(), target.data_ptr(), PROBE_BYTES, 0, 0)
    seconds = min(_timed_write(writer, pair, peer) for _ in range(3))
    if not bool((target == 1).all()):
        raise RegistrationError("the bytes of a write between two NIXL agents did not arrive")
    return PROBE_BYTES / seconds


def _timed_write(writer: NixlAgent, pair: CopyPair, peer: str) -> float:
    started_s = time.perf_counter()
    handle = writer.create_transfer(TransferDirection.WRITE, [pair], peer)
    state = writer.post(handle)
    while state is not TransferState.DONE:
        state = writer.check(handle)
    seconds = time.perf_counter() - started_s
    writer.release(handle)
    return seconds


def main() -> None:
    """Make the write and print what was seen."""
    try:
        report = {"bytes_per_s": _write_once(), "plugins": available_plugins()}
    except RegistrationError as error:
        sys.exit(str(error))
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
