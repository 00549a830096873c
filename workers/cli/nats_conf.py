"""`nixlbus nats-conf`: what a deployment's init step writes, a nats-server configuration and the workers' shared key.

The configuration sets max_payload, monitoring and JetStream. Users and permissions are the operator's to add.
"""

from pathlib import Path

from bus import server_configuration, write_key_file
from workers.cli.output import Output


async def run(out: Path, host: str, store_dir: str, as_json: bool) -> int:
    """Write both files; an existing key is kept. Returns the exit status."""
    output = Output(as_json)
    files = write(out, host, store_dir)
    output.result({name: str(path) for name, path in files.items()})
    output.text(f"wrote {files['configuration']} and {files['key']}")
    return 0


def write(out: Path, host: str, store_dir: str) -> dict[str, Path]:
    """Write both files into `out` and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    configuration, key = out / "nats-server.conf", out / "nixlbus.key"
    configuration.write_text(server_configuration(host=host, store_dir=store_dir))
    write_key_file(key)
    return {"configuration": configuration, "key": key}
