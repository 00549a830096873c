"""What commands print is what they were given: no markup, no emoji, nothing folded where nobody's terminal is."""

import asyncio
import io
import re
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from bus import Bus, BusConfig, BusError, EmbeddedServer, JobQueueConfig, Message, RequestRefused
from schemas.fault import FaultCode
from tests.bus.control_plane.guarded_server import guarded_server
from tests.graph_fixture import run_cli
from workers.cli.output import Output

TRICKY = "[bold]:X: :smile:[/bold] [/nothing]\t1.0 'a' \\[x] " + "long " * 60 + "end"


def table() -> Table:
    made = Table(box=None, pad_edge=False)
    made.add_column("text")
    made.add_row(TRICKY.replace("\t", " "))
    return made


def on_a_terminal(output: Output, width: int) -> io.StringIO:
    written = io.StringIO()
    output.console = Console(
        file=written, force_terminal=True, width=width, highlight=False, markup=False, emoji=False, color_system=None
    )
    return written


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=False)
    output.verbatim(TRICKY)
    output.text(TRICKY.replace("\t", " "))
    output.note(TRICKY.replace("\t", " "))
    output.error(BusError(TRICKY.replace("\t", " ")))
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [TRICKY, TRICKY.replace("\t", " ")]
    note, error = shown.err.splitlines()
    assert note == TRICKY.replace("\t", " ")
    assert error.startswith(f"error: {note}")


def test_a_table_is_whole_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=False)
    output.table(table())
    heading, line = capsys.readouterr().out.splitlines()
    assert (heading.strip(), line.strip()) == ("text", TRICKY.replace("\t", " "))


def test_a_table_is_folded_in_a_narrow_terminal_and_nothing_of_it_is_lost() -> None:
    output = Output(as_json=False)
    written = on_a_terminal(output, 40)
    output.table(table())
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert " ".join(" ".join(lines[1:]).split()) == TRICKY.replace("\t", " ")
    assert output.console.width == 40


class Note(Message, frozen=True, kw_only=True, tag="note.job"):
    text: str


async def test_a_dead_letter_is_shown_to_the_character(nats: EmbeddedServer) -> None:
    queue = JobQueueConfig(graph="shown", queue="notes", message_type=Note)

    async def refuse(note: Note) -> None:
        raise RequestRefused(FaultCode.INVALID_PROMPT, "no :X: [red]here[/red]")

    async with Bus.open(BusConfig(worker_id="noter", nats_url=nats.url), data_plane=False) as bus:
        await bus.submit(queue, Note(text=TRICKY), job_id="noted")
        await bus.work(queue, refuse)
        async with asyncio.timeout(20):
            while True:
                if letters := await bus.dead_letters.list(graph="shown", queue="notes"):
                    break
                await asyncio.sleep(0.05)
        number = str(letters[0].sequence)
        shown = await asyncio.to_thread(run_cli, "dlq", "show", number, "--nats", nats.url, COLUMNS="40")
        listed = await asyncio.to_thread(
            run_cli, "dlq", "ls", "--queue", "shown.notes", "--nats", nats.url, COLUMNS="40"
        )
        await bus.dead_letters.drop(letters[0].sequence)
    assert f"bytes: { ({'type': 'note.job', 'text': TRICKY})!r}\n" in shown.stdout, shown.stdout
    assert "reason       no :X: [red]here[/red]\n" in shown.stdout
    _heading, line = listed.stdout.splitlines()
    assert re.search(r"shown\.notes +noted +invalid_prompt: no :X: \[red\]here\[/red\] +1 +noter", line)


async def test_who_looks_after_a_graph_does_so_with_the_operator_s_key_alone(tmp_path: Path) -> None:
    async with guarded_server(tmp_path) as guarded, Bus.open(guarded.config("processor"), data_plane=False) as bus:
        await bus.announce("nixlbus-vlm-processor", "1.0.0", {"role": "processor"})
        seed, url = guarded.files.users["operator"].nkey, guarded.url

        def as_operator(*command: str) -> "subprocess.CompletedProcess[str]":
            return run_cli(*command, NIXLBUS_NATS_NKEY=seed, NIXLBUS_NATS_URL=url)

        for command in (["ps"], ["asyncapi", "--live"], ["dlq", "ls"]):
            finished = await asyncio.to_thread(as_operator, *command)
            assert finished.returncode == 0, (command, finished.stderr)
            if command == ["ps"]:
                assert bus.worker_id in finished.stdout
        looked = await asyncio.to_thread(as_operator, "trace")
        assert "no trace store answers" in looked.stderr  # asked, and not denied
