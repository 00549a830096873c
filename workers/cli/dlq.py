"""`nixlbus dlq ls|show|replay|drop`: the jobs that were given up, why, and what shall become of them.

In: numbers of dead letters, or `--all` (of one queue with `--queue`). Out: what was found or done. A number that
isn't there (any more) is told, and makes the exit status 1; the others are done all the same. So is one that can't be
replayed, because its payload had no room.
"""

import base64
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import typer
from rich.table import Table

from bus import Bus, DeadLetter, DeadLetterNotFound, LocalProtocolError
from workers.cli.client import OPERATOR, open_client
from workers.cli.output import Output

MOST = 10_000


async def list_letters(nats: str | None, queue: str, limit: int, as_json: bool) -> int:
    """Print the oldest dead letters; returns the exit status."""
    output = Output(as_json)
    async with open_client(OPERATOR, nats) as bus:
        letters = await _letters(bus, queue, limit)
    output.result({"dead_letters": [_fields(letter) for letter in letters]})
    if letters:
        output.table(_table(letters))
    else:
        output.text("no dead letters")
    return 0


async def show(nats: str | None, sequence: int, as_json: bool) -> int:
    """Print one dead letter with its headers and payload; returns the exit status."""
    output = Output(as_json)
    async with open_client(OPERATOR, nats) as bus:
        letter = await bus.dead_letters.show(sequence)
    payload = base64.b64encode(letter.payload).decode()
    output.result({**_fields(letter), "headers": letter.headers, "payload": payload, "message": _message(letter)})
    for name, value in _fields(letter).items():
        output.verbatim(_escaped(f"{name:<12} {value}"))
    for name, value in letter.headers.items():
        output.verbatim(_escaped(f"header       {name}: {value}"))
    output.verbatim(f"payload      {len(letter.payload):,} bytes: {_message(letter) or letter.payload!r}")
    return 0


async def settle(
    verb: str, nats: str | None, sequences: list[int] | None, every: bool, queue: str, limit: int, as_json: bool
) -> int:
    """Replay or drop dead letters; returns the exit status, 1 if one of the numbers isn't there."""
    if bool(sequences) == every:
        raise typer.BadParameter(f"say which to {verb}: their numbers, or --all")
    output = Output(as_json)
    settled: list[int] = []
    missing: list[int] = []
    refused: dict[int, str] = {}
    async with open_client(OPERATOR, nats) as bus:
        settle_one: Callable[[int], Awaitable[Any]] = (
            bus.dead_letters.replay if verb == "replay" else bus.dead_letters.drop
        )
        numbers = sequences or [letter.sequence for letter in await _letters(bus, queue, limit)]
        for number in numbers:
            try:
                await settle_one(number)
            except DeadLetterNotFound:
                missing.append(number)
            except LocalProtocolError as error:
                refused[number] = str(error)
            else:
                settled.append(number)
    done = "replayed" if verb == "replay" else "dropped"
    output.result({done: settled, "not_found": missing, **({"refused": refused} if refused else {})})
    output.text(f"{done} {len(settled)}")
    if missing:
        output.note(f"not there: {', '.join(map(str, missing))}")
    for reason in refused.values():
        output.note(reason)
    return 1 if refused or (missing and not every) else 0


async def _letters(bus: Bus, queue: str, limit: int) -> list[DeadLetter]:
    graph, dot, name = queue.rpartition(".")
    return await bus.dead_letters.list(graph=graph if dot else "*", queue=name or "*", limit=limit)


def _fields(letter: DeadLetter) -> dict[str, Any]:
    return {
        "sequence": letter.sequence,
        "queue": f"{letter.graph}.{letter.queue}",
        "job_id": letter.job_id,
        "code": letter.code,
        "reason": letter.message,
        "remedy": letter.remedy,
        "deliveries": letter.deliveries,
        "worker_id": letter.worker_id,
        "dead_at": letter.dead_at,
        "trace_id": letter.trace_id,
        "left_out": letter.left_out,
    }


def _table(letters: list[DeadLetter]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("number", justify="right")
    for heading in ("queue", "job", "reason", "tries", "worker", "when"):
        table.add_column(heading)
    for letter in letters:
        table.add_row(
            str(letter.sequence),
            f"{letter.graph}.{letter.queue}",
            _escaped(letter.job_id),
            _escaped(f"{letter.code}: {letter.message}"[:200]),
            str(letter.deliveries),
            _escaped(letter.worker_id[:80]),
            _escaped(letter.dead_at[:19].replace("T", " ")),
        )
    return table


def _message(letter: DeadLetter) -> Any:
    """The payload for people, as far as it is msgpack."""
    try:
        return _plain(msgpack.unpackb(letter.payload, strict_map_key=False))
    except Exception:  # whatever it is: it is there as bytes
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _escaped(text: str) -> str:
    """As it is written, without what would move the terminal's cursor."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
