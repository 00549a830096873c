"""`nixlbus ps`: the live workers, as they answer NATS service discovery right now.

With a worker's id it tells of that one alone, and fails when it doesn't answer: a health check. With `--endpoints` it
has a line for each of their endpoints. `--json` has all of it either way.
"""

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from workers.cli.client import OPERATOR, open_client
from workers.cli.output import Output


async def run(nats: str | None, worker_id: str | None, endpoints: bool, as_json: bool) -> int:
    """List them; returns the exit status, 1 if `worker_id` is given and not among them."""
    output = Output(as_json)
    async with open_client(OPERATOR, nats) as bus:
        services = [service for service in await bus.services() if worker_id in (None, service["id"])]
    output.result({"workers": services})
    if worker_id and not services:
        output.note(f"{worker_id} does not answer on {bus.server}")
        return 1
    if services:
        output.table(endpoint_table(services) if endpoints else worker_table(services))
    else:
        output.text(f"no workers on {bus.server}; start some with 'nixlbus up' or 'nixlbus worker ROLE'")
    return 0


def worker_table(services: Iterable[dict[str, Any]]) -> Table:
    """A line for each worker."""
    table = _table(
        ("worker", "role", "graph", "model", "version", "started"),
        ("active", "queued", "requests", "errors", "mean ms"),
    )
    for service in services:
        metadata, endpoints = service["metadata"], service["endpoints"]
        table.add_row(
            service["id"],
            metadata.get("role", ""),
            metadata.get("graph", ""),
            metadata.get("model", ""),
            service.get("version", ""),
            service["started"][:19].replace("T", " "),
            str(sum(_load(endpoint, "active") for endpoint in endpoints)),
            str(sum(_load(endpoint, "queued") for endpoint in endpoints)),
            *_counted(endpoints),
        )
    return table


def endpoint_table(services: Iterable[dict[str, Any]]) -> Table:
    """A line for each endpoint of each worker."""
    table = _table(
        ("worker", "subject", "queue group", "kind", "request", "reply"),
        ("active", "queued", "requests", "errors", "mean ms"),
    )
    for service in services:
        for endpoint in service["endpoints"]:
            metadata = endpoint.get("metadata") or {}
            table.add_row(
                service["id"],
                endpoint.get("subject", ""),
                endpoint.get("queue_group", ""),
                metadata.get("kind", ""),
                metadata.get("request", "").replace(",", "\n"),
                metadata.get("reply", "").replace(",", "\n"),
                str(_load(endpoint, "active")),
                str(_load(endpoint, "queued")),
                *_counted([endpoint]),
            )
    return table


def _table(texts: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in texts:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _counted(endpoints: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Requests, errors and milliseconds of a request, for a table."""
    requests = sum(endpoint.get("num_requests", 0) for endpoint in endpoints)
    errors = sum(endpoint.get("num_errors", 0) for endpoint in endpoints)
    spent_ns = sum(endpoint.get("processing_time", 0) for endpoint in endpoints)
    return str(requests), str(errors), f"{spent_ns / requests / 1e6:.1f}" if requests else ""


def _load(endpoint: dict[str, Any], name: str) -> int:
    """A number of `EndpointLoad`; 0 from a worker of a version that doesn't tell."""
    return int((endpoint.get("data") or {}).get(name, 0))
