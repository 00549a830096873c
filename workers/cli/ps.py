"""`nixlbus ps`: the live workers, as they answer NATS service discovery right now.

With a worker's id it tells of that one alone, and fails when it doesn't answer: a health check.
"""

from typing import Any

from rich.table import Table

from workers.cli.client import OPERATOR, open_client
from workers.cli.output import Output


async def run(nats: str | None, worker_id: str | None, as_json: bool) -> int:
    """List them; returns the exit status, 1 if `worker_id` is given and not among them."""
    output = Output(as_json)
    async with open_client(OPERATOR, nats) as bus:
        services = [service for service in await bus.services() if worker_id in (None, service["id"])]
    output.result({"workers": services})
    if worker_id and not services:
        output.note(f"{worker_id} does not answer on {bus.server}")
        return 1
    if services:
        output.text(_table(services))
    else:
        output.text(f"no workers on {bus.server}; start some with 'nixlbus up' or 'nixlbus worker ROLE'")
    return 0


def _table(services: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("worker", no_wrap=True)  # whole: other commands take it as an argument
    for heading in ("role", "graph", "model", "started"):
        table.add_column(heading)
    for heading in ("requests", "errors", "mean ms"):
        table.add_column(heading, justify="right")
    for service in services:
        metadata, endpoints = service["metadata"], service["endpoints"]
        requests = sum(endpoint.get("num_requests", 0) for endpoint in endpoints)
        spent_ns = sum(endpoint.get("processing_time", 0) for endpoint in endpoints)
        table.add_row(
            service["id"],
            metadata.get("role", ""),
            metadata.get("graph", ""),
            metadata.get("model", ""),
            service["started"][:19].replace("T", " "),
            str(requests),
            str(sum(endpoint.get("num_errors", 0) for endpoint in endpoints)),
            f"{spent_ns / requests / 1e6:.1f}" if requests else "",
        )
    return table
