"""`nixlbus server` and `nixlbus run`, as a developer uses them: real processes in an empty folder."""

import asyncio
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bus import Bus, BusConfig, EmbeddedServer, Message
from schemas.subjects import Subjects
from tests.graph_fixture import NIXLBUS, environment

WORKER = """
from bus import Message
from workers import Worker, endpoint


class Add(Message, frozen=True, kw_only=True, tag="add"):
    a: int
    b: int


class Sum(Message, frozen=True, kw_only=True, tag="sum"):
    total: int


class Calculator(Worker):
    group = "math"

    @endpoint()
    async def add(self, request: Add) -> Sum:
        return Sum(total=request.a + request.b)
"""


class Add(Message, frozen=True, kw_only=True, tag="add"):
    a: int
    b: int


class Sum(Message, frozen=True, kw_only=True, tag="sum"):
    total: int


@contextmanager
def started(folder: Path, *arguments: str, status: int = 0, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [NIXLBUS, *arguments],
        cwd=folder,
        env=environment(XDG_STATE_HOME=str(folder), **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        if status == 0:
            process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert process.stdout
        process.stdout.close()
    assert process.returncode == status


def line(process: "subprocess.Popen[str]") -> dict[str, str]:
    assert process.stdout
    text = process.stdout.readline()
    assert text, "the process ended"
    told: dict[str, str] = json.loads(text)
    return told


def nats_server_of(process: "subprocess.Popen[str]") -> int:
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if "nats-server" in Path(f"/proc/{child}/comm").read_text():
            return int(child)
    raise AssertionError("it has no nats-server")


def until_unready(health: str) -> None:
    deadline_s = time.monotonic() + 10
    while get(f"{health}/readyz")[0] == 200 and time.monotonic() < deadline_s:
        time.sleep(0.05)


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, response.read().decode().strip()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode().strip()


async def test_a_worker_of_one_s_own_serves_tells_its_health_and_drains(tmp_path: Path, unused_tcp_port: int) -> None:
    (tmp_path / "calc.py").write_text(WORKER)
    with started(tmp_path, "server", "--port", "0", "--otlp-port", "0", "--json", status=1) as server:
        url = line(server)["nats_url"]
        subject = Subjects().graph("math", "add")
        health = f"http://127.0.0.1:{unused_tcp_port}"
        async with Bus.open(BusConfig(worker_id="client", nats_url=url), data_plane=False) as bus:
            with started(
                tmp_path, "run", "calc:Calculator", "--json", NIXLBUS_NATS_URL=url, NIXLBUS_HEALTH_PORT=health[17:]
            ) as worker:
                while line(worker)["step"] != "ready":
                    pass
                assert (await bus.request(subject, Add(a=1, b=2), Sum, timeout_s=5)).total == 3
                assert get(f"{health}/livez") == (200, "alive")
                assert get(f"{health}/readyz") == (200, "ready")
                assert get(f"{health}/else")[0] == 404
                os.kill(nats_server_of(server), signal.SIGKILL)
                await asyncio.to_thread(until_unready, health)
                assert get(f"{health}/readyz") == (503, "not connected to NATS")
                assert get(f"{health}/livez") == (200, "alive")


def test_a_target_that_is_none_is_told_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "calc.py").write_text(WORKER)
    for target, said in (
        ("calc:Calculater", "calc has no Worker class 'Calculater'; it has ['Calculator']"),
        ("nowhere:Calculator", "there is no module 'nowhere'"),
        ("calc", "not of the form module:Class"),
    ):
        finished = subprocess.run(
            [NIXLBUS, "run", target],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (finished.returncode, finished.stdout) == (1, "")
        assert said in finished.stderr
        assert "Traceback" not in finished.stderr


FAILING = """
from workers import Worker


class NoDatabase(Worker):
    async def start(self) -> None:
        raise RuntimeError("no database today")


class Unmade(Worker):
    def __init__(self, bus) -> None:
        super().__init__(bus)
        self.size = None + 1


class Counted(Worker):
    def __init__(self, bus, size: int) -> None:
        super().__init__(bus)
"""


def run_failing(folder: Path, nats_url: str, target: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    (folder / "failing.py").write_text(FAILING)
    (folder / "unsound.py").write_text("x = 1\ny = x.nothing\n")
    return subprocess.run(
        [NIXLBUS, "run", target],
        cwd=folder,
        env=environment(NIXLBUS_NATS_URL=nats_url, **variables),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "failing:NoDatabase",
            "no-database failed RuntimeError: no database today; NIXLBUS_LOG_LEVEL=DEBUG shows where",
        ),
        ("failing:Unmade", "unmade failed TypeError: unsupported operand type"),
        ("failing:Counted", "missing a required argument: 'size'; pass what the constructor takes besides the bus"),
        ("unsound:Anything", "AttributeError: 'int' object has no attribute 'nothing' (unsound.py, line 2)"),
    ],
)
async def test_what_keeps_a_worker_of_one_s_own_from_starting_is_one_line(
    tmp_path: Path, nats: EmbeddedServer, target: str, said: str
) -> None:
    finished = await asyncio.to_thread(run_failing, tmp_path, nats.url, target)
    assert finished.returncode == 1
    assert said in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr


async def test_where_a_start_failed_is_told_to_who_debugs(tmp_path: Path, nats: EmbeddedServer) -> None:
    finished = await asyncio.to_thread(run_failing, tmp_path, nats.url, "failing:NoDatabase", NIXLBUS_LOG_LEVEL="DEBUG")
    assert finished.returncode == 1
    assert 'failing.py", line 7' in finished.stderr


def test_a_file_s_name_will_do_for_its_module(tmp_path: Path) -> None:
    (tmp_path / "calc.py").write_text(WORKER)
    finished = subprocess.run(
        [NIXLBUS, "run", "calc.py:Other"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert "it has ['Calculator']" in finished.stderr
