"""`nixlbus up`: a graph that stays up on this machine until Ctrl-C, or until one of its processes ends."""

import asyncio
import os
from typing import NoReturn

from workers.cli.output import Output
from workers.launcher import WorkerFailed, WorkerProcess
from workers.local_graph import LocalGraph, first_of, local_graph, state_key_file
from workers.process import stop_on_signals
from workers.settings import Settings


async def run(nats_port: int, http_port: int | None, otlp_port: int | None, model: str | None, as_json: bool) -> int:
    """Run the graph; returns the exit status.

    Raises `WorkerFailed` when a worker ends by itself, `ServerUnavailable` when nats-server does.
    """
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
        await first_of(stop.wait(), graph.server_ended(), *map(_failed, graph.workers))
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


async def _failed(worker: WorkerProcess) -> NoReturn:
    status = await worker.ended()
    raise WorkerFailed(worker.spec.role, f"it ended with status {status}")
