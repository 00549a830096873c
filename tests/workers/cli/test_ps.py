"""`nixlbus ps --id` as a health check, and `nixlbus ps` in a narrow terminal."""

import asyncio
import os
import pty
import subprocess
from typing import Any

from bus import Bus, BusConfig, EmbeddedServer
from tests.graph_fixture import NIXLBUS, RunningGraph, environment, json_of, run_cli
from workers.cli.ps import listed_endpoints, listed_workers, paragraphs

SERVICES: list[dict[str, Any]] = [
    {
        "id": "encode-0123456789ab",
        "metadata": {"role": "encode", "graph": "vlm", "model": "digits-vlm"},
        "version": "0.3.0",
        "started": "2026-11-21T16:00:00.123Z",
        "endpoints": [
            {
                "subject": "nixlbus.v1.graph.vlm.encode",
                "queue_group": "encode",
                "metadata": {"kind": "unary", "request": "encode.request", "reply": "encode.reply,fault"},
                "num_requests": 4,
                "num_errors": 1,
                "processing_time": 6_000_000,
                "data": {"active": 2, "queued": 3},
            },
            {"subject": "nixlbus.v1.worker.encode-0123456789ab.perf", "queue_group": "", "metadata": {"kind": "unary"}},
        ],
    }
]


def in_a_terminal(*arguments: str, columns: int) -> str:
    """What a command shows on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [NIXLBUS, *arguments], env=environment(COLUMNS=str(columns), TERM="xterm", NO_COLOR="1"), stdout=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:
        pass  # Linux says so when the other side is closed
    finally:
        os.close(ours)
    assert process.wait(20) == 0
    return shown.decode().replace("\r\n", "\n")


def test_a_worker_is_a_paragraph_of_whole_pairs() -> None:
    assert paragraphs(listed_workers(SERVICES), 60) == (
        "encode-0123456789ab\n"
        "  role encode   graph vlm   model digits-vlm   version 0.3.0\n"
        "  started 2026-11-21 16:00:00\n"
        "  active 2   queued 3   requests 4   errors 1   mean ms 1.5"
    )


def test_an_endpoint_is_a_paragraph_below_its_worker() -> None:
    assert paragraphs(listed_endpoints(SERVICES), 80) == (
        "encode-0123456789ab\n"
        "  nixlbus.v1.graph.vlm.encode\n"
        "    queue group encode   kind unary   request encode.request\n"
        "    reply encode.reply, fault\n"
        "    active 2   queued 3   requests 4   errors 1   mean ms 1.5\n"
        "  nixlbus.v1.worker.encode-0123456789ab.perf\n"
        "    kind unary\n"
        "    active 0   queued 0   requests 0   errors 0"
    )


async def test_a_narrow_terminal_gets_no_broken_lines_and_a_wide_one_a_table(nats: EmbeddedServer) -> None:
    name = "somebody-with-a-long-name-0123456789ab"
    async with Bus.open(BusConfig(worker_id=name, nats_url=nats.url), data_plane=False) as bus:
        metadata = {"role": "[/somebody]", "graph": "somewhere\x1b[2J", "model": "some-model-of-a-long-name"}
        await bus.announce("narrow", "1.2.3", metadata)
        for arguments in (("ps", "--id", name), ("ps", "--endpoints", "--id", name)):
            narrow = await asyncio.to_thread(in_a_terminal, *arguments, "--nats", nats.url, columns=80)
            assert max(len(line) for line in narrow.splitlines()) <= 80, narrow
        narrow = await asyncio.to_thread(in_a_terminal, "ps", "--id", name, "--nats", nats.url, columns=80)
        wide = await asyncio.to_thread(in_a_terminal, "ps", "--id", name, "--nats", nats.url, columns=300)
    title, texts, *_ = narrow.splitlines()
    assert (title, texts.split("   ")[0]) == (name, "  role [/somebody]")
    assert "graph somewhere?[2J" in narrow
    heading, line = wide.splitlines()
    assert "started" in heading
    assert line.split()[:2] == [name, "[/somebody]"]


def test_ps_of_a_live_worker_lists_it_alone(graph: RunningGraph) -> None:
    everyone = json_of(run_cli("ps", "--nats", graph.nats_url, "--json"))["workers"]
    assert len(everyone) > 1
    finished = run_cli("ps", "--id", everyone[0]["id"], "--nats", graph.nats_url, "--json")
    assert finished.returncode == 0, finished.stderr
    assert [worker["id"] for worker in json_of(finished)["workers"]] == [everyone[0]["id"]]


def test_ps_of_a_worker_that_does_not_answer_fails_and_names_it(graph: RunningGraph) -> None:
    finished = run_cli("ps", "--id", "decode-gone", "--nats", graph.nats_url)
    assert finished.returncode == 1
    assert "decode-gone does not answer" in finished.stderr
    assert finished.stdout == ""
