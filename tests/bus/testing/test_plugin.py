"""The plugin as another project meets it: pytest in a folder of its own, in a process of its own."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from bus import testing

ROOT = Path(__file__).parents[3]
PLUGIN = "bus.testing.plugin"
LOOP_SCOPE = ("-o", "asyncio_default_fixture_loop_scope=function")  # pytest-asyncio warns where it is unset
HEAVY = {"torch", "nixl", "nats", "msgspec", "grpc", "opentelemetry", "bus.bus", "observability", "schemas"}


def run_pytest(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


TESTS = """
import asyncio
import json
import os
import subprocess
import sys
import urllib.request

import pytest

from bus import Bus, DeadlineExceeded, EndpointConfig
from schemas.message import Message
from schemas.subjects import Subject


class Ask(Message, frozen=True, kw_only=True, tag="outside.ask"):
    number: int


class Told(Message, frozen=True, kw_only=True, tag="outside.told"):
    number: int


SUBJECT = Subject("outside.double", "outside.double")


async def serve(bus):
    async def double(request: Ask) -> Told:
        return Told(number=2 * request.number)

    await bus.serve(EndpointConfig("double", SUBJECT, Ask), double)


def test_the_server_is_real_and_has_jetstream(nixlbus_server):
    with urllib.request.urlopen(nixlbus_server.monitoring_url + "/jsz", timeout=5) as response:
        assert "streams" in json.load(response)


def test_the_key_is_nobody_else_s(nixlbus_key_file):
    assert os.stat(nixlbus_key_file).st_mode & 0o777 == 0o600


async def test_buses_talk(nixlbus_bus, nixlbus_open):
    await serve(nixlbus_bus)
    async with nixlbus_open() as asking, nixlbus_open("named") as named:
        assert await asking.request(SUBJECT, Ask(number=4), Told, timeout_s=5) == Told(number=8)
        assert named.worker_id == "named"
        assert len({bus.worker_id for bus in (nixlbus_bus, asking, named)}) == 3


async def test_spans_are_recorded(nixlbus_bus, nixlbus_spans):
    await serve(nixlbus_bus)
    await nixlbus_bus.request(SUBJECT, Ask(number=4), Told, timeout_s=5)
    (process,) = await nixlbus_spans.wait_for("process outside.double")
    assert process.parent_id == nixlbus_spans.one("send outside.double").span_id
    assert nixlbus_spans.orphans() == []


async def test_the_spans_of_another_test_are_gone(nixlbus_spans):
    assert nixlbus_spans.spans == []


async def test_the_network_has_faults(nixlbus_bus, nixlbus_open, nixlbus_faults):
    await serve(nixlbus_bus)
    async with nixlbus_open(nats_url=nixlbus_faults.url) as asking:
        rule = nixlbus_faults.drop("outside.*")
        with pytest.raises(DeadlineExceeded):
            await asking.request(SUBJECT, Ask(number=1), Told, timeout_s=0.2)
        assert rule.hits == 1
        assert (await asking.request(SUBJECT, Ask(number=1), Told, timeout_s=5)).number == 2


async def test_a_data_plane_opens(nixlbus_open):
    async with nixlbus_open(data_plane=True, arena_bytes=1 << 20) as bus:
        assert bus.is_ready
        assert isinstance(bus, Bus)


async def test_other_processes_reach_the_server(nixlbus_server, nixlbus_faults):
    program = (
        "import asyncio, sys; from bus import Bus, BusConfig\\n"
        "async def main():\\n"
        "    async with Bus.open(BusConfig(worker_id='p', nats_url=sys.argv[1]), data_plane=False) as bus:\\n"
        "        print(bus.is_ready)\\n"
        "asyncio.run(main())"
    )
    command = [sys.executable, "-c", program, nixlbus_faults.url]  # blocks this loop; the proxy has its own
    assert subprocess.run(command, capture_output=True, text=True, timeout=30).stdout == "True\\n"
"""


def test_the_fixtures_work_in_a_project_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "test_outside.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    finished = run_pytest(tmp_path, "-p", PLUGIN)
    assert finished.returncode == 0, finished.stdout
    assert f"{TESTS.count('def test_')} passed" in finished.stdout
    assert "warning" not in finished.stdout


REPORT = """
import json, sys

def test_nothing():
    pass

def pytest_sessionfinish(session):
    with open("loaded.json", "w") as out:
        json.dump([sorted(sys.modules), session.config.pluginmanager.hasplugin("bus.testing.plugin")], out)
"""


@pytest.mark.parametrize("arguments", [LOOP_SCOPE, ("-p", "no:asyncio")], ids=["", "no asyncio"])
def test_who_uses_no_fixture_pays_nothing_and_sees_no_warning(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "conftest.py").write_text(REPORT)
    (tmp_path / "test_inside.py").write_text("def test_nothing():\n    pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    finished = run_pytest(tmp_path, "-p", PLUGIN, *arguments)
    assert finished.returncode == 0, finished.stdout
    assert "1 passed" in finished.stdout
    assert "warning" not in finished.stdout
    loaded, is_plugged_in = json.loads((tmp_path / "loaded.json").read_text())
    assert is_plugged_in
    assert HEAVY & set(loaded) == set()


def test_without_pytest_asyncio_the_others_work_and_the_bus_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "hide_asyncio.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'pytest_asyncio' else find(name, *a)\n"
    )
    (tmp_path / "test_inside.py").write_text(
        "def test_server(nixlbus_server):\n    assert nixlbus_server.url\n\ndef test_bus(nixlbus_bus):\n    pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    finished = run_pytest(tmp_path, "-p", "hide_asyncio", "-p", "no:asyncio", "-p", PLUGIN)
    assert "1 passed" in finished.stdout
    assert "pip install pytest-asyncio" in finished.stdout


def test_a_missing_nats_server_is_an_error_that_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "test_inside.py").write_text(
        "import bus.control_plane.embedded_server as e, shutil, sys, pathlib\n"
        "e.sys = type('S', (), {'executable': '/nowhere/python'})\n"
        "def test_server(nixlbus_server):\n    pass\n"
    )
    finished = run_pytest(tmp_path, "-p", PLUGIN, *LOOP_SCOPE)
    assert "pip install 'nixlbus[embedded]'" in finished.stdout


def test_every_fixture_has_our_prefix_and_says_what_it_is(tmp_path: Path) -> None:
    listed = run_pytest(tmp_path, "-p", PLUGIN, "--fixtures", *LOOP_SCOPE).stdout
    ours = listed.partition("fixtures defined from bus.testing.plugin")[2].partition("----- fixtures defined")[0]
    names = [line.split()[0] for line in ours.splitlines() if line and not line.startswith((" ", "-", "="))]
    expected = ["bus", "faults", "key_file", "open", "server", "spans"]
    assert sorted(name for name in names if name.startswith("nixlbus")) == [f"nixlbus_{name}" for name in expected]
    assert "no docstring available" not in ours


def test_all_is_what_can_be_had() -> None:
    assert list(testing.__all__) == sorted(testing.__all__) == sorted(testing._LAZY)
    assert all(getattr(testing, name).__name__ == name for name in testing.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        testing.nothing  # noqa: B018


def test_pytest_finds_it_by_its_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["pytest11"]
    assert declared == {PLUGIN: PLUGIN}
    assert {found.name for found in entry_points(group="pytest11", value=PLUGIN)} <= {PLUGIN}
