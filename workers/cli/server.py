"""`nixlbus server`: nats-server with JetStream and a trace store on this machine until Ctrl-C, to develop against."""

import asyncio

from workers.cli.output import Output
from workers.local_graph import local_graph, state_key_file
from workers.process import stop_on_signals
from workers.settings import Settings


async def run(port: int, otlp_port: int | None, as_json: bool) -> int:
    """Run both; returns the exit status. Raises `ServerUnavailable`."""
    output = Output(as_json)
    stop = asyncio.Event()
    stop_on_signals(stop)
    settings = Settings.from_env(otlp_port=otlp_port)
    async with local_graph(settings, nats_port=port, key_file=state_key_file(), roles=()) as graph:
        output.result(
            {
                "nats_url": graph.nats_url,
                "monitoring_url": graph.monitoring_url,
                "otlp_endpoint": graph.otlp_endpoint,
                "key_file": graph.key_file,
            }
        )
        output.text(
            f"nats-server at {graph.nats_url}, spans at {graph.otlp_endpoint}; for workers in other terminals:\n"
            f"  export NIXLBUS_NATS_URL={graph.nats_url} NIXLBUS_KEY_FILE={graph.key_file} "
            f"OTEL_EXPORTER_OTLP_ENDPOINT={graph.otlp_endpoint}\n"
            "Ctrl-C stops it; what its streams hold is gone then."
        )
        await stop.wait()
    return 0
