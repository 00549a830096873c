"""The whole graph under the configuration that `nixlbus nats-conf` writes; and that it shows none of its secrets."""

import asyncio
import re
import signal
import subprocess
from pathlib import Path

import pytest

from bus import Bus
from observability.receiver import OtlpReceiver
from tests.bus.control_plane.guarded_server import Guarded, guarded_server
from tests.graph_fixture import NIXLBUS, ask, environment, image_turn, json_of, post, run_cli, sample
from workers.launcher import running
from workers.process import WorkerSpec
from workers.roles import GRAPH_ROLES, role_class
from workers.roles.access import vlm_roles
from workers.settings import Settings

SECRETS = re.compile(r"\bSU[A-Z2-7]{56}\b|\b[0-9a-f]{64}\b")
"""What a user's seed and a shared key look like."""


def secrets_of(guarded: Guarded) -> list[str]:
    """Every secret of a deployment, as its files hold them."""
    found = [guarded.seed(user) for user in guarded.files.users]
    keys = {Path(files.shared_key).read_text() for files in guarded.files.users.values() if files.shared_key}
    assert len(keys) == 1
    return [*found, keys.pop().split()[1]]


async def test_the_whole_graph_answers_and_the_server_has_nothing_to_refuse(tmp_path: Path) -> None:
    settings = Settings(http_port=0)
    async with guarded_server(tmp_path) as guarded, OtlpReceiver() as receiver:
        specs = [WorkerSpec(role, guarded.config(role), settings, receiver.endpoint) for role in GRAPH_ROLES]
        async with running(specs) as workers, Bus.open(guarded.config("client"), data_plane=False) as client:
            answer = await ask(client, "What digit is this?", [sample(7)])
            assert "7" in answer.text
            url = next(worker.detail for worker in workers if worker.spec.role == "frontend")
            status, _, body = await asyncio.to_thread(post, url, {"messages": [image_turn(4)]})
            assert (status, b"4" in body) == (200, True)
            operator = guarded.files.users["operator"].nkey
            listed = await asyncio.to_thread(
                run_cli, "ps", "--json", NIXLBUS_NATS_URL=guarded.url, NIXLBUS_NATS_NKEY=operator
            )
            workers_listed = json_of(listed)["workers"]
            assert {worker["metadata"]["role"] for worker in workers_listed} == set(GRAPH_ROLES)
            for listed_worker in workers_listed:
                role = listed_worker["metadata"]["role"]
                served = {
                    e["subject"]: e["queue_group"] for e in listed_worker["endpoints"] if ".graph." in e["subject"]
                }
                assert served == {f"nixlbus.v1.graph.vlm.{stage}": stage for stage in vlm_roles().roles[role].serves}
            refused = [line for line in await asyncio.to_thread(log_of, guarded) if "Violation" in line]
            assert refused == []
            await receiver.store.wait_for_complete(answer.done.trace_id, 10)
        spans = repr([receiver.store.trace(trace_id) for trace_id in receiver.store.trace_ids()])
        assert "nixl.write" in spans
        assert not [secret for secret in secrets_of(guarded) if secret in spans]
        assert [line for line in await asyncio.to_thread(log_of, guarded) if "Violation" in line] == []


def log_of(guarded: Guarded) -> list[str]:
    return Path(guarded.server.log_file).read_text().splitlines()


async def test_a_worker_shows_no_secret_at_any_log_level(tmp_path: Path) -> None:
    """A worker that serves, and a command with a wrong password in its URL."""
    async with guarded_server(tmp_path) as guarded:
        files = guarded.files.users["encode"]
        variables = {"NIXLBUS_LOG_LEVEL": "DEBUG", "NIXLBUS_KEY_FILE": files.shared_key, "PYTHONASYNCIODEBUG": "1"}
        serving = await asyncio.create_subprocess_exec(
            NIXLBUS, "worker", "encode",
            env=environment(**variables, NIXLBUS_NATS_URL=guarded.url, NIXLBUS_NATS_NKEY=files.nkey),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        said = b""
        assert serving.stdout is not None
        while b"encode ready" not in said:
            line = await asyncio.wait_for(serving.stdout.readline(), 60)
            assert line, said.decode()
            said += line
        serving.send_signal(signal.SIGTERM)
        said += (await asyncio.wait_for(serving.communicate(), 30))[0]
        assert b"DEBUG" in said
        address = guarded.url.removeprefix("nats://")
        refused = await asyncio.to_thread(
            run_cli, "ps", NIXLBUS_LOG_LEVEL="DEBUG", NIXLBUS_NATS_URL=f"nats://someone:hunter2swordfish@{address}"
        )
        assert refused.returncode == 1
        assert "the NATS server at nats://127.0.0.1" in refused.stderr
        shown = said.decode() + refused.stdout + refused.stderr
        assert not [secret for secret in [*secrets_of(guarded), "hunter2swordfish"] if secret in shown]
        assert not SECRETS.search(shown)


@pytest.mark.parametrize("user", ["client", "observer", "encode"])
async def test_who_may_not_look_into_traces_is_told_so_at_once(tmp_path: Path, user: str) -> None:
    async with guarded_server(tmp_path) as guarded:
        finished = await asyncio.to_thread(
            run_cli, "trace", NIXLBUS_NATS_URL=guarded.url, NIXLBUS_NATS_NKEY=guarded.files.users[user].nkey,
            NIXLBUS_IDENTITY=user,
        )  # fmt: skip
        assert finished.returncode == 1
        assert "denied" in finished.stderr


def test_the_roles_that_get_the_shared_key_are_those_that_move_tensors() -> None:
    assert all(role_class(role).needs_data_plane == vlm_roles().moves_tensors(role) for role in GRAPH_ROLES)


def test_nats_conf_keeps_keys_and_gives_each_user_a_folder_of_its_own(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    first = json_of(run_cli("nats-conf", "--out", out, "--json"))
    before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    second = json_of(run_cli("nats-conf", "--out", out, "--keys-per-instance", "encode=3", "--json"))
    assert {path: path.read_bytes() for path in before if "server" not in path.parts} == {
        path: content for path, content in before.items() if "server" not in path.parts
    }
    assert "encode.3" in second["users"]
    assert "encode" not in second["users"]
    shared = {Path(files["shared_key"]).read_bytes() for files in second["users"].values() if files["shared_key"]}
    assert len(shared) == 1
    for user, files in first["users"].items():
        folder = Path(files["nkey"]).parent
        assert (folder.name, folder.stat().st_mode & 0o777) == (user, 0o700)
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert [user for user, files in first["users"].items() if files["shared_key"]] == ["decode", "prefill", "encode"]
    Path(first["users"]["client"]["nkey"]).chmod(0o644)
    refused = run_cli("nats-conf", "--out", out)
    assert refused.returncode == 1
    assert "chmod 600" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--keys-per-instance", "oracle=2"], "no role"),
        (["--keys-per-instance", "encode"], "role=N"),
        (["--keys-per-instance", "encode=0"], "role=N"),
        (["--tls-cert", "a"], "go together"),
        (["--roles", "/nonexistent.toml"], "can't be read"),
    ],
)
def test_nats_conf_says_what_is_wrong_with_its_arguments(tmp_path: Path, arguments: list[str], why: str) -> None:
    finished = run_cli("nats-conf", "--out", str(tmp_path), *arguments)
    assert finished.returncode in (1, 2)
    assert why in " ".join(finished.stderr.split())
