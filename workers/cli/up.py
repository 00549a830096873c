"""`nixlbus up`: a graph that stays up on this machine until Ctrl-C, or until one of its processes ends."""

import asyncio
import os

from workers.cli.output import Output
from workers.launcher import WorkerFailed, WorkerProcess
from workers.local_graph import LocalGraph, local_graph, state_key_file
from workers.process import stop_on_signals
from workers.settings import Settings


async def run(nats_port: int, http_port: int | None, otlp_port: int | None, model: str | None, as_json: bool) -> int:
    """Run the graph; returns the exit status. Raises `WorkerFailed` when a worker ends by itself."""
    output = Output(as_json)
    settings = Settings.from_env(http_port=http_port, otlp_port=otlp_port, model=model)
    elsewhere = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None
    output.note("starting nats-server and five workers")
    stop = asyncio.Event()
    stop_on_signals(stop)
    async with local_graph(
        settings, nats_port=nats_port, key_file=state_key_file(), otlp_endpoint=elsewhere, on_progress=output.progress
    ) as graph:
        _tell(graph, settings.graph, output)
        await _until_stopped(graph.workers, stop)
        output.note("draining")
    return 0


def _tell(graph: LocalGraph, graph_name: str, output: Output) -> None:
    output.text(
        f"\nup: {graph_name} on {graph.nats_url}\n"
        f"  ask        nixlbus request --nats {graph.nats_url} --prompt 'What digit is this?' --image FILE\n"
        f"  HTTP       {graph.http_url}/v1/chat/completions\n"
        f"  spans      {graph.otlp_endpoint}\n"
        f"  more       NIXLBUS_KEY_FILE={graph.key_file} nixlbus worker decode --nats {graph.nats_url}\n"
        "Ctrl-C drains and stops it.",
    )
    output.result(
        {
            "nats_url": graph.nats_url,
            "monitoring_url": graph.monitoring_url,
            "http_url": graph.http_url,
            "otlp_endpoint": graph.otlp_endpoint,
            "key_file": graph.key_file,
            "workers": [{"role": worker.spec.role, "pid": worker.pid} for worker in graph.workers],
        }
    )


async def _until_stopped(workers: list[WorkerProcess], stop: asyncio.Event) -> None:
    stopping = asyncio.create_task(stop.wait())
    endings = {asyncio.create_task(worker.ended()): worker for worker in workers}
    try:
        done, _ = await asyncio.wait({stopping, *endings}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            worker = endings[task]
            raise WorkerFailed(worker.spec.role, f"it ended with status {task.result()}")
    finally:
        for task in (stopping, *endings):
            task.cancel()
