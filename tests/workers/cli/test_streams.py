"""`nixlbus streams` and those who come after it, under the configuration that `nixlbus nats-conf` writes for a file of
roles."""

import asyncio
import re
from pathlib import Path
from subprocess import CompletedProcess

from bus import embedded_server
from tests.graph_fixture import json_of, run_cli

ROLES = """
graph = "media"
[roles.api]
submits = ["transcode"]
[roles.worker]
works = ["transcode"]
[roles.store]
media = true
"""


async def test_streams_are_made_by_the_provisioner_and_dead_letters_read_by_the_operator(tmp_path: Path) -> None:
    roles, conf, port = tmp_path / "roles.toml", tmp_path / "conf", re.compile(r"(?<=:)(4222|8222)(?=\")")
    roles.write_text(ROLES)
    written = run_cli("nats-conf", "--out", str(conf), "--roles", str(roles), "--store-dir", str(tmp_path / "data"))
    assert written.returncode == 0, written.stderr
    configuration = conf / "server" / "nats-server.conf"
    configuration.write_text(port.sub("-1", configuration.read_text()))
    async with embedded_server(configuration=configuration) as server:

        async def as_user(user: str, *arguments: str) -> "CompletedProcess[str]":
            seed = str(conf / user / "nats.nkey")
            return await asyncio.to_thread(run_cli, *arguments, NIXLBUS_NATS_URL=server.url, NIXLBUS_NATS_NKEY=seed)

        refused = await as_user("worker", "streams", "--roles", str(roles))
        assert refused.returncode == 1
        assert "denied" in refused.stderr
        made = await as_user("provisioner", "streams", "--roles", str(roles), "--json")
        assert made.returncode == 0, made.stderr
        names = json_of(made)["names"]
        assert {"NIXLBUS_JOBS", "NIXLBUS_DLQ", "KV_NIXLBUS_CLAIMS", "OBJ_NIXLBUS_MEDIA"} < set(names)
        again = await as_user("provisioner", "streams", "--roles", str(roles))
        assert again.returncode == 0
        assert all(name in again.stdout.replace("\n", "") for name in names)
        listed = await as_user("operator", "dlq", "ls")
        assert (listed.returncode, listed.stdout.strip()) == (0, "no dead letters"), listed.stderr


def test_a_file_without_anything_durable_needs_none(tmp_path: Path) -> None:
    roles = tmp_path / "roles.toml"
    roles.write_text('graph = "g"\n[roles.a]\nserves = ["a"]\n')
    written = run_cli("nats-conf", "--out", str(tmp_path / "conf"), "--roles", str(roles), "--json")
    assert "provisioner" not in json_of(written)["users"]
