"""`nixlbus asyncapi`: an AsyncAPI 3.0 document of every subject, on stdout or in a file.

Of worker classes, of the packaged graph if none is named, or with `--live` of the workers that answer service discovery
right now. In each case the bus's own subjects are in it too.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bus import BusConfig, bus_channels
from schemas.asyncapi import Channel, document
from schemas.subjects import Subjects
from workers.channels import class_channels, live_channels
from workers.cli.client import OPERATOR, open_client
from workers.cli.output import Output
from workers.roles import role_class, role_names
from workers.settings import Settings
from workers.target import UnknownTarget, load_worker
from workers.worker import package_version


async def run(targets: list[str] | None, live: bool, nats: str | None, graph: str | None, out: Path | None) -> int:
    """Write the document; returns the exit status."""
    config = BusConfig.from_env("asyncapi", nats_url=nats)
    subjects = Subjects(config.prefix)
    if live:
        async with open_client(OPERATOR, nats) as bus:
            channels = list(live_channels(await bus.services(), subjects))
    elif targets:
        channels = [channel for target in targets for channel in _declared(target, subjects, graph or "")]
    else:
        channels = list(_packaged(subjects, Settings.from_env(graph=graph).graph))
    described = document(
        [*channels, *bus_channels(subjects)],
        title=", ".join(targets) if targets else "nixlbus",
        version=package_version(),
        server=_host(config.nats_url),
    )
    _write(described, out)
    return 0


def _write(described: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")
        Output(as_json=False).note(f"wrote {len(described['channels'])} channels to {out}")


def _declared(target: str, subjects: Subjects, group: str) -> Iterator[Channel]:
    try:
        yield from class_channels(load_worker(target), subjects, group)
    except TypeError as error:
        raise UnknownTarget(f"{target}: {error}") from None


def _packaged(subjects: Subjects, graph: str) -> Iterator[Channel]:
    for role in role_names():
        if role != "frontend":  # it serves HTTP alone, and needs an extra
            yield from class_channels(role_class(role), subjects, graph)


def _host(nats_url: str) -> str:
    """Host and port of the first server, without credentials."""
    url = nats_url.split(",")[0].strip()
    return urlsplit(url if "//" in url else f"nats://{url}").netloc.rpartition("@")[2] or "127.0.0.1:4222"
