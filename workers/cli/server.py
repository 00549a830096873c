"""`nixlbus server`: nats-server with JetStream and a trace store on this machine until Ctrl-C, to develop against."""

import asyncio
import os
from pathlib import Path
from urllib.parse import urlsplit

from bus import ConfigError, write_key_file
from workers.cli.output import Output
from workers.local_graph import first_of, local_graph, state_key_file
from workers.process import stop_on_signals
from workers.settings import Settings

DEFAULT_PORT = 4222


async def run(port: int | None, otlp_port: int | None, as_json: bool) -> int:
    """Run both; returns the exit status. Raises `ServerUnavailable`, also when nats-server ends by itself, and
    `ConfigError`.

    `port` None is the one where this environment's workers and commands look. The key's file is made if it isn't there.
    """
    output = Output(as_json)
    stop = asyncio.Event()
    stop_on_signals(stop)
    settings = Settings.from_env(otlp_port=otlp_port)
    nats_port = _port_of_clients() if port is None else port
    key_file = state_key_file()
    write_key_file(Path(key_file))
    async with local_graph(settings, nats_port=nats_port, key_file=key_file, roles=()) as graph:
        output.result(
            {
                "nats_url": graph.nats_url,
                "monitoring_url": graph.monitoring_url,
                "otlp_endpoint": graph.otlp_endpoint,
                "key_file": graph.key_file,
            }
        )
        exports = {
            "NIXLBUS_NATS_URL": graph.nats_url,
            "NIXLBUS_KEY_FILE": graph.key_file,
            "OTEL_EXPORTER_OTLP_ENDPOINT": graph.otlp_endpoint,
        }
        for line in (
            f"nats-server at {graph.nats_url}, spans at {graph.otlp_endpoint}; for workers in other terminals:",
            *(f"  export {name}={value}" for name, value in exports.items()),
            "Ctrl-C stops it; what its streams hold is gone then.",
        ):
            output.text(line, wrap=False)  # whole: it is copied
        await first_of(stop.wait(), graph.server_ended())
    return 0


def _port_of_clients() -> int:
    url = os.environ.get("NIXLBUS_NATS_URL", "").partition(",")[0].strip()
    try:
        return urlsplit(url if "://" in url else f"nats://{url}").port or DEFAULT_PORT
    except ValueError:
        shown = "(not shown: it may hold a password)"
        raise ConfigError("NIXLBUS_NATS_URL", shown, "a URL such as nats://127.0.0.1:4222") from None
