"""The two versions, and processes of them: `peer.py` under the PYTHONPATH of the one or the other."""

import asyncio
import os
import sys
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from bus import Bus
from tests.upgrade.peer import Command, Report

HERE = Path(__file__).parent
(WHEEL_BEFORE,) = HERE.glob("nixlbus-*.whl")
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 20


@dataclass(frozen=True)
class Version:
    """A version of nixlbus: its number, and the folder that its packages are in."""

    number: str
    folder: Path

    def environment(self) -> dict[str, str]:
        """Of a process of this version: without what would configure it, and without its working folder's modules."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NIXLBUS_", "OTEL_", "UCX_", "PYTHON"))}
        return {**inherited, "PYTHONPATH": str(self.folder), "PYTHONSAFEPATH": "1"}


THIS = Version("99.0.0", HERE.parent.parent)
"""This tree; what it will be called doesn't matter here."""


@dataclass(frozen=True)
class PeerProcess:
    """A running worker."""

    worker_id: str
    version: Version
    process: asyncio.subprocess.Process

    async def drain(self) -> None:
        """End it as a supervisor does; it must end well."""
        await drained(self.process)

    async def told(self, driver: Bus, command: Command) -> Report:
        """Have it do something; returns what came of it."""
        subject = driver.subjects.worker(self.worker_id, "command")
        return await driver.request(subject, command, Report, timeout_s=60)


def unpacked(folder: Path) -> Version:
    """The version before, from its wheel: a wheel is a zip of packages."""
    with zipfile.ZipFile(WHEEL_BEFORE) as wheel:
        wheel.extractall(folder)
    return Version(WHEEL_BEFORE.name.split("-")[1], folder)


@asynccontextmanager
async def running(
    version: Version, *arguments: str, is_ready: Callable[[str], bool], **variables: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process of `version`, from the line that says it is ready. Drained afterwards, where it hasn't ended."""
    with TemporaryFile("w+") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            env={**version.environment(), **variables},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
        try:
            assert process.stdout is not None
            line, said = "\n", ""
            async with asyncio.timeout(START_TIMEOUT_S):
                while line and not is_ready(line):
                    line = (await process.stdout.readline()).decode()
                    said += line
            errors.seek(0)
            assert line, f"{arguments} did not start with {version}: {said}{errors.read()}"
            yield process
            if process.returncode is None:
                await drained(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def drained(process: asyncio.subprocess.Process) -> None:
    """End a worker as a supervisor does; it must end well."""
    process.terminate()
    async with asyncio.timeout(STOP_TIMEOUT_S):
        assert await process.wait() == 0


@asynccontextmanager
async def worker(version: Version, worker_id: str, nats_url: str, key_file: str = "") -> AsyncIterator[PeerProcess]:
    """A worker of `version` that serves. It is told to end afterwards, where it hasn't ended yet."""
    arguments = (str(HERE / "peer.py"), version.number, worker_id, nats_url, key_file)
    async with running(version, *arguments, is_ready=lambda line: line.strip() == str(version.folder)) as process:
        yield PeerProcess(worker_id, version, process)
