import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bus import BusConfig, embedded_server
from tests.graph_fixture import NIXLBUS, environment
from workers.launcher import PRELOADED, STOP_TIMEOUT_S, WorkerFailed, running, stop_timeout_s
from workers.process import WorkerSpec
from workers.settings import Settings


def test_the_fork_server_has_imported_everything_and_its_children_can_compute() -> None:
    command = [sys.executable, str(Path(__file__).with_name("launched_child.py"))]
    finished = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90, check=False)
    assert finished.returncode == 0, finished.stderr
    said = json.loads(finished.stdout)
    assert said["imported"] == list(PRELOADED)
    assert said["exist"] == [True] * len(PRELOADED)
    assert (said["product"], said["threads"]) == (64.0, 1)


async def test_a_worker_that_can_not_start_is_told_and_the_others_are_stopped() -> None:
    async with embedded_server() as server:
        good = WorkerSpec("processor", BusConfig(worker_id="good", nats_url=server.url), Settings())
        bad = WorkerSpec("encode", BusConfig(worker_id="bad", nats_url=server.url), Settings())
        with pytest.raises(WorkerFailed, match="NIXLBUS_KEY_FILE") as caught:
            async with running([good, bad]):
                raise AssertionError("not every worker was ready")
    assert caught.value.role == "encode"


def test_a_worker_is_not_killed_while_it_may_still_drain() -> None:
    config = BusConfig(worker_id="w", nats_url="nats://127.0.0.1:4222")
    assert stop_timeout_s(WorkerSpec("decode", config, Settings(drain_timeout_s=120))) > 120
    assert stop_timeout_s(WorkerSpec("decode", config, Settings(drain_timeout_s=1))) == STOP_TIMEOUT_S


async def test_up_ends_with_an_error_when_a_worker_is_killed_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    process = await asyncio.create_subprocess_exec(
        NIXLBUS,
        "up",
        "--json",
        *("--nats-port", "0", "--http-port", "0", "--otlp-port", "0"),
        env=environment(XDG_STATE_HOME=str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 90))
    pids = {worker["role"]: worker["pid"] for worker in ready["workers"]}
    os.kill(pids["prefill"], signal.SIGKILL)
    error = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))["error"]
    assert "prefill" in error["message"]
    assert await asyncio.wait_for(process.wait(), 60) == 1
    assert not any(is_alive(pid) for pid in pids.values())


async def test_workers_end_by_themselves_when_their_launcher_is_killed(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        NIXLBUS,
        "up",
        "--json",
        *("--nats-port", "0", "--http-port", "0", "--otlp-port", "0"),
        env=environment(XDG_STATE_HOME=str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 90))
    process.kill()
    await process.wait()
    pids = [worker["pid"] for worker in ready["workers"]]
    async with asyncio.timeout(30):
        while any(is_alive(pid) for pid in pids):  # noqa: ASYNC110  # other processes: there is no event
            await asyncio.sleep(0.1)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
