"""A graph whose roles are of both versions: a request's hops, and the tensors, cross versions."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from bus import Bus, BusConfig, embedded_server, write_key_file
from tests.graph_fixture import SAMPLES, ask
from tests.upgrade.versions import THIS, Version, running

ROLES = {"processor": "generate", "decode": "decode", "prefill": "prefill", "encode": "encode"}
"""Role to stage, which is its queue group in both versions: in another group a worker would do the work again."""
MODEL = SAMPLES.parent
NUM_REQUESTS = {False: 16, True: 64}
"""Where each side of a hop is drawn evenly, a pair of neighbours that none of 64 takes is one case in 10^7."""
AT_ONCE = 8
PROGRAM = """
import sys, workers.cli.app as app
assert app.__file__.startswith(sys.argv.pop(1) + "/"), app.__file__
app.main()
"""
"""The `nixlbus` command, certain to be the version's own."""


@asynccontextmanager
async def role(version: Version, name: str, nats_url: str, folder: Path) -> AsyncIterator[str]:
    """One role's worker, as `nixlbus worker` starts it; yields its id when it is ready."""
    worker_id = f"{name}-{version.number.replace('.', '-')}"
    async with running(
        version,
        *("-c", PROGRAM, str(version.folder), "worker", name, "--json"),
        is_ready=lambda line: '"ready"' in line,
        NIXLBUS_NATS_URL=nats_url,
        NIXLBUS_KEY_FILE=str(folder / "key"),
        NIXLBUS_MODEL=str(MODEL),
        NIXLBUS_WORKER_ID=worker_id,
    ):
        yield worker_id


@pytest.mark.timeout(240)  # it imports torch four or eight times
@pytest.mark.parametrize(
    "everywhere",
    [pytest.param(False, id="by-turns"), pytest.param(True, id="both-in-every-role", marks=pytest.mark.full)],
)
async def test_roles_of_both_versions_answer_together(
    version_before: Version, tmp_path: Path, everywhere: bool
) -> None:
    versions = [(name, version) for name in ROLES for version in (version_before, THIS)]
    chosen = versions if everywhere else [versions[0], versions[3], versions[4], versions[7]]
    write_key_file(tmp_path / "key")
    async with embedded_server() as server, AsyncExitStack() as stack:
        config = BusConfig(worker_id="client", nats_url=server.url)
        bus = await stack.enter_async_context(Bus.open(config, data_plane=False))
        async with asyncio.TaskGroup() as starting:
            started = [
                starting.create_task(stack.enter_async_context(role(version, name, server.url, tmp_path)))
                for name, version in chosen
            ]
        seven = (SAMPLES / "digit-7.png").read_bytes()
        at_once = asyncio.Semaphore(AT_ONCE)

        async def answer() -> str:
            async with at_once:
                return (await ask(bus, "What digit is this?", [seven])).text

        assert set(await asyncio.gather(*(answer() for _ in range(NUM_REQUESTS[everywhere])))) == {
            "This is the digit 7."
        }
        endpoints = {each["id"]: each["endpoints"] for each in await bus.services()}
        assert set(endpoints) == {each.result() for each in started}
        for worker_id, served in endpoints.items():
            assert sum(each["num_requests"] for each in served), f"{worker_id} was not asked"
            assert not sum(each["num_errors"] for each in served), f"{worker_id}: {served}"
            stage = ROLES[worker_id.split("-")[0]]
            groups = {each["subject"]: each["queue_group"] for each in served}
            assert groups[bus.subjects.graph("vlm", stage).name] == stage
