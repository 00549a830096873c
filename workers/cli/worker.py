"""`nixlbus worker ROLE`: one worker in this process, for deployments and for adding to a running graph."""

import asyncio
import os

import typer

from bus import BusConfig
from schemas.traces import TRACE_STORE_ID
from workers.cli.output import Output
from workers.process import Progress, Signals, WorkerSpec, run_worker
from workers.roles import role_names
from workers.settings import Settings


async def run(
    role: str, nats: str | None, worker_id: str | None, model: str | None, graph: str | None, as_json: bool
) -> int:
    """Run the worker; returns its exit status."""
    output = Output(as_json)
    if role not in role_names():
        raise typer.BadParameter(f"{role!r} is no role; there are {', '.join(role_names())}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if role == "traces":
        worker_id = worker_id or os.environ.get("NIXLBUS_WORKER_ID") or TRACE_STORE_ID
    config = BusConfig.from_env(role, nats_url=nats, worker_id=worker_id)
    spec = WorkerSpec(role, config, Settings.from_env(model=model, graph=graph))
    stop = asyncio.Event()
    signals = Signals(stop)
    return await run_worker(spec, lambda progress: _tell(output, role, progress), stop, signals)


def _tell(output: Output, role: str, progress: Progress) -> None:
    output.result({"role": role, "step": progress.step, "detail": progress.detail})
    output.note(f"{role} {progress.step} {progress.detail}")
