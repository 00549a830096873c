"""`nixlbus run module:Class`: a worker of one's own in this process, until SIGTERM or Ctrl-C."""

import asyncio

from bus import BusConfig
from workers.cli.output import Output
from workers.process import Progress, Signals, live
from workers.settings import ProcessSettings
from workers.target import load_worker


async def run(target: str, nats: str | None, worker_id: str | None, group: str | None, as_json: bool) -> int:
    """Run it; returns its exit status. Raises `UnknownTarget`."""
    output = Output(as_json)
    worker_type = load_worker(target)
    if group:
        worker_type.group = group
    config = BusConfig.from_env(worker_type.role, nats_url=nats, worker_id=worker_id)
    stop = asyncio.Event()
    signals = Signals(stop)

    def tell(progress: Progress) -> None:
        output.result({"role": worker_type.role, "step": progress.step, "detail": progress.detail})
        output.note(f"{worker_type.role} {progress.step} {progress.detail}".rstrip())

    return await live(worker_type, worker_type, config, ProcessSettings.from_env(), tell, stop, signals)
