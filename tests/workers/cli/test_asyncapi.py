"""`nixlbus asyncapi` and `nixlbus ps --endpoints`, as a user runs them."""

import asyncio
import json
import subprocess
from pathlib import Path

from bus import BusConfig, EmbeddedServer
from tests.graph_fixture import NIXLBUS, environment, json_of, run_cli
from tests.schemas.test_asyncapi import check
from tests.workers.cli.test_run import WORKER
from tests.workers.test_channels import Counter


def test_a_class_of_the_current_folder_is_written_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "calculator.py").write_text(WORKER)
    finished = subprocess.run(
        [NIXLBUS, "asyncapi", "calculator:Calculator", "--out", "asyncapi.json"],
        cwd=tmp_path, env=environment(NIXLBUS_NATS_URL="nats://user:hidden@nats.example:4223"),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    text = (tmp_path / "asyncapi.json").read_text()
    described = json.loads(text)
    check(described)
    assert "graph.math.add" in described["channels"]
    assert described["servers"]["nats"]["host"] == "nats.example:4223"
    assert "hidden" not in text
    assert finished.stdout == ""


def test_a_class_that_is_not_there_is_one_line() -> None:
    finished = run_cli("asyncapi", "nowhere:Nothing")
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: nowhere:Nothing")


def test_live_takes_no_classes() -> None:
    finished = run_cli("asyncapi", "--live", "calculator:Calculator")
    assert finished.returncode == 2


async def test_live_workers_are_described_and_their_endpoints_listed(nats: EmbeddedServer) -> None:
    async with Counter.running(BusConfig(worker_id="counter-7", nats_url=nats.url)):
        finished = await asyncio.to_thread(run_cli, "asyncapi", "--live", "--nats", nats.url)
        listed = await asyncio.to_thread(run_cli, "ps", "--endpoints", "--nats", nats.url, COLUMNS="80")
        workers = await asyncio.to_thread(run_cli, "ps", "--id", "counter-7", "--nats", nats.url, COLUMNS="80")
        as_json = await asyncio.to_thread(run_cli, "ps", "--id", "counter-7", "--nats", nats.url, "--json")
    assert finished.returncode == 0, finished.stderr
    described = json_of(finished)
    check(described)
    assert {"graph.numbers.total", "graph.numbers.count.reply", "event.counted", "cancel"} <= set(described["channels"])
    (line,) = [line for line in listed.stdout.splitlines() if "graph.numbers.total" in line]
    assert line.split() == [
        "counter-7", "nixlbus.v1.graph.numbers.total", "total", "unary", "channels.count", "channels.counted",
        "0", "0", "0", "0",
    ]  # fmt: skip
    heading, line = workers.stdout.splitlines()
    (worker,) = json_of(as_json)["workers"]
    assert heading.split()[-6:] == ["active", "queued", "requests", "errors", "mean", "ms"]
    assert worker["version"] in line.split()
    assert worker["endpoints"][0]["data"].keys() == {"refused", "cancelled", "active", "queued"}
