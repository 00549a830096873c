"""`nixlbus server`, as a developer starts it: where it listens, and what it tells to copy."""

import json
import os
import signal
import stat
import subprocess
from pathlib import Path

from tests.graph_fixture import NIXLBUS, environment, run_cli


def test_it_listens_where_its_environment_looks_and_makes_the_key_that_is_named(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    key, url = tmp_path / "a-key", f"nats://127.0.0.1:{unused_tcp_port}"
    told = environment(NIXLBUS_NATS_URL=url, NIXLBUS_KEY_FILE=str(key), COLUMNS="40")
    command = [NIXLBUS, "server", "--otlp-port", "0"]
    process = subprocess.Popen(command, env=told, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(4)]
        exports = dict(line.removeprefix("  export ").strip().split("=", 1) for line in lines[1:])
        assert (exports["NIXLBUS_NATS_URL"], exports["NIXLBUS_KEY_FILE"]) == (
            url,
            str(key),
        )  # whole, in a narrow window
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        finished = run_cli("ps", NIXLBUS_NATS_URL=exports["NIXLBUS_NATS_URL"])
        assert "traces" in finished.stdout
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout
        process.stdout.close()


def test_it_ends_with_its_nats_server(tmp_path: Path) -> None:
    told = environment(XDG_STATE_HOME=str(tmp_path))
    command = [NIXLBUS, "server", "--port", "0", "--otlp-port", "0", "--json"]
    process = subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline()
        (child,) = _children(process.pid, "nats-server")
        os.kill(child, signal.SIGKILL)
        out, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert json.loads(out)["error"]["message"] == f"nats-server (process {child}) ended by itself with status -9"
    assert "Traceback" not in errors


def _children(pid: int, name: str) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if name in Path(f"/proc/{child}/comm").read_text()]


def test_an_address_that_is_none_is_named() -> None:
    finished = run_cli("server", NIXLBUS_NATS_URL="nats://127.0.0.1:port")
    assert finished.returncode == 1
    assert "NIXLBUS_NATS_URL" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_password_in_an_address_that_is_none_is_not_shown() -> None:
    for url in ("nats://someone:hunter2@127.0.0.1:port", "nats://someone:hunter2", "nats://[someone:hunter2@h"):
        finished = run_cli("server", NIXLBUS_NATS_URL=url)
        assert finished.returncode == 1
        assert "NIXLBUS_NATS_URL" in finished.stderr
        assert "hunter2" not in finished.stderr + finished.stdout
