"""A real nats-server under the very file that `nixlbus nats-conf` writes, and plain clients of its users."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nats.aio.client import Client

from bus import (
    BusConfig,
    EmbeddedServer,
    Roles,
    ServerFiles,
    ServerSettings,
    TlsFiles,
    embedded_server,
    write_server_files,
)
from workers.roles.access import vlm_roles


class Guarded:
    """A running server and the files of its users."""

    def __init__(self, server: EmbeddedServer, files: ServerFiles) -> None:
        self.url = server.url
        self.server = server
        self.files = files

    def seed(self, user: str) -> str:
        return Path(self.files.users[user].nkey).read_text()

    def configuration(self) -> str:
        return Path(self.files.configuration).read_text()

    def config(self, user: str, **fields: Any) -> BusConfig:
        files = self.files.users[user]
        return BusConfig.from_env(
            user, {}, nats_url=self.url, nats_nkey=files.nkey, key_file=files.shared_key, connect_timeout_s=5, **fields
        )

    @asynccontextmanager
    async def client(self, user: str) -> AsyncIterator["PlainClient"]:
        plain = PlainClient()
        await plain.nats.connect(
            self.url, nkeys_seed=self.files.users[user].nkey, error_cb=plain.on_error, inbox_prefix=f"_INBOX.{user}.x"
        )
        try:
            yield plain
        finally:
            await plain.nats.close()


class PlainClient:
    """nats-py as it is, and what the server refused it."""

    def __init__(self) -> None:
        self.nats = Client()
        self.errors: list[str] = []
        self.heard: list[str] = []

    async def on_error(self, error: Exception) -> None:
        self.errors.append(str(error).lower())

    async def _on_message(self, message: Any) -> None:
        self.heard.append(message.subject)

    async def settle(self) -> None:
        """Wait for the server's word on all that was sent: nats-py's flush may overtake what it is to flush."""
        await self.nats.flush()
        await self.nats.flush()

    async def may_publish(self, subjects: list[str]) -> set[str]:
        """Those of `subjects` that the server lets this user publish to."""
        self.errors.clear()
        for subject in subjects:
            await self.nats.publish(subject, b"\xc0")
        await self.settle()
        return {s for s in subjects if f'nats: permissions violation for publish to "{s.lower()}"' not in self.errors}

    async def may_subscribe(self, subjects: list[str]) -> set[str]:
        """Those of `subjects`, each `<subject>` or `<subject> <queue group>`, that it may subscribe to."""
        allowed = set()
        for subject in subjects:
            self.errors.clear()
            name, _, queue_group = subject.partition(" ")
            subscription = await self.nats.subscribe(name, queue=queue_group, cb=self._on_message)
            await self.settle()
            if not self.errors:
                allowed.add(subject)
                await subscription.unsubscribe()
        return allowed

    async def listen(self, subject: str, queue_group: str = "") -> None:
        """Note the subjects of what comes in `heard`."""
        await self.nats.subscribe(subject, queue=queue_group, cb=self._on_message)
        await self.settle()


@asynccontextmanager
async def guarded_server(
    folder: Path,
    *,
    roles: Roles | None = None,
    keys_per_instance: dict[str, int] | None = None,
    tls: TlsFiles | None = None,
) -> AsyncIterator[Guarded]:
    """Write the files into `folder` and run the server on free ports."""
    settings = ServerSettings(port=-1, monitoring_port=-1, store_dir=str(folder / "jetstream"), tls=tls)
    files = write_server_files(folder / "conf", roles or vlm_roles(), settings, keys_per_instance=keys_per_instance)
    async with embedded_server(configuration=Path(files.configuration)) as server:
        yield Guarded(server, files)
