"""`nixlbus ps`: the live workers, as they answer NATS service discovery right now.

With a worker's id it tells of that one alone, and fails when it doesn't answer: a health check. With `--endpoints` it
has a line for each of their endpoints; a terminal that is too narrow for the lines has a paragraph for each. `--json`
has all of it either way.
"""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from workers.cli.client import OPERATOR, open_client
from workers.cli.output import Output

_FIGURES = ("active", "queued", "requests", "errors", "mean ms")
_WIDEST = 10_000
"""Characters; wider than any table."""


class Listed(NamedTuple):
    """What is told: rows of texts and then of `_FIGURES`."""

    headings: tuple[str, ...]
    """Of the texts."""
    num_titles: int
    """Texts that say, from the left, what a row is about."""
    rows: list[tuple[str, ...]]


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
        _show(output, listed_endpoints(services) if endpoints else listed_workers(services))
    else:
        output.text(f"no workers on {bus.server}; start some with 'nixlbus up' or 'nixlbus worker ROLE'")
    return 0


def listed_workers(services: Iterable[dict[str, Any]]) -> Listed:
    """A row for each worker."""
    rows = []
    for service in services:
        metadata, endpoints = service["metadata"], service["endpoints"]
        texts = (
            service["id"],
            metadata.get("role", ""),
            metadata.get("graph", ""),
            metadata.get("model", ""),
            service["version"],
            service["started"][:19].replace("T", " "),
        )
        rows.append((*texts, *_figures(endpoints)))
    return Listed(("worker", "role", "graph", "model", "version", "started"), 1, rows)


def listed_endpoints(services: Iterable[dict[str, Any]]) -> Listed:
    """A row for each endpoint of each worker."""
    rows = []
    for service in services:
        for endpoint in service["endpoints"]:
            metadata = endpoint["metadata"]
            texts = (
                service["id"],
                endpoint["subject"],
                endpoint["queue_group"],
                metadata.get("kind", ""),
                metadata.get("request", ""),
                metadata.get("reply", ""),
            )
            rows.append((*texts, *_figures([endpoint])))
    return Listed(("worker", "subject", "queue group", "kind", "request", "reply"), 2, rows)


def table(listed: Listed) -> Table:
    """A line for each row."""
    made = Table(box=None, pad_edge=False)
    for heading in listed.headings:
        made.add_column(heading)
    for heading in _FIGURES:
        made.add_column(heading, justify="right")
    for row in listed.rows:
        made.add_row(*(Text(_printable(value).replace(",", "\n")) for value in row))
    return made


def paragraphs(listed: Listed, width: int) -> str:
    """A paragraph for each row, in lines of at most `width` characters where words allow."""
    num_titles, num_texts = listed.num_titles, len(listed.headings)
    lines: list[str] = []
    above: tuple[str, ...] = ()
    for row in listed.rows:
        titles = row[:num_titles]
        for depth, title in enumerate(titles):
            if depth == num_titles - 1 or titles[: depth + 1] != above[: depth + 1]:
                lines.append("  " * depth + _printable(title))
        above = titles
        lines += _pairs(listed.headings[num_titles:], row[num_titles:num_texts], num_titles, width)
        lines += _pairs(_FIGURES, row[num_texts:], num_titles, width)
    return "\n".join(lines)


def _show(output: Output, listed: Listed) -> None:
    lines = table(listed)
    console = output.console
    needed = console.measure(lines, options=console.options.update(width=_WIDEST)).maximum
    if console.is_terminal and needed > console.width:
        output.text(Text(paragraphs(listed, console.width)), wrap=False)
    else:
        output.table(lines)


def _pairs(headings: Sequence[str], values: Sequence[str], depth: int, width: int) -> list[str]:
    told = [
        f"{heading} {_printable(value).replace(',', ', ')}" for heading, value in zip(headings, values, strict=True)
    ]
    text = "   ".join(pair.replace(" ", "\0") for pair, value in zip(told, values, strict=True) if value)
    indent = "  " * depth
    wrapped = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace("\0", " ") for line in wrapped]


def _printable(value: str) -> str:
    """What came over the bus, without what a terminal would take for a command."""
    return "".join(character if character.isprintable() else "?" for character in value)


def _figures(endpoints: list[dict[str, Any]]) -> tuple[str, ...]:
    """What `_FIGURES` are of the endpoints together."""
    requests = _sum(endpoints, "num_requests")
    return (
        str(sum(_load(endpoint, "active") for endpoint in endpoints)),
        str(sum(_load(endpoint, "queued") for endpoint in endpoints)),
        str(requests),
        str(_sum(endpoints, "num_errors")),
        f"{_sum(endpoints, 'processing_time') / requests / 1e6:.1f}" if requests else "",
    )


def _sum(endpoints: list[dict[str, Any]], name: str) -> int:
    return sum(endpoint.get(name, 0) for endpoint in endpoints)


def _load(endpoint: dict[str, Any], name: str) -> int:
    """A number of `EndpointLoad`; 0 from a worker of a version that doesn't tell."""
    return int(endpoint.get("data", {}).get(name, 0))
