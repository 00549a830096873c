"""`nixlbus nats-conf`: what a deployment's init step writes: a nats-server configuration with users, and their keys.

Thin: who may do what is `bus/control_plane/permissions.py`, the files are `bus/control_plane/server_files.py`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from bus import ServerSettings, TlsFiles, load_roles, write_server_files
from schemas.subjects import DEFAULT_PREFIX
from workers.cli.output import Output
from workers.roles.access import vlm_roles
from workers.settings import Settings


async def run(
    out: Path,
    roles_file: Path | None,
    keys_per_instance: Sequence[str],
    server: ServerSettings,
    tls: tuple[str | None, str | None, str | None],
    as_json: bool,
) -> int:
    """Write the files; existing keys are kept. Returns the exit status. Raises `RolesFileError`, `ConfigError`."""
    import msgspec

    output = Output(as_json)
    roles = load_roles(roles_file) if roles_file else vlm_roles(Settings.from_env().graph)
    counts = parsed_counts(keys_per_instance)
    unknown = sorted(set(counts) - set(roles.roles))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no role; there are {', '.join(roles.roles)}")
    settings = msgspec.structs.replace(server, tls=tls_files(*tls))
    prefix = os.environ.get("NIXLBUS_PREFIX") or DEFAULT_PREFIX
    files = write_server_files(out, roles, settings, keys_per_instance=counts, prefix=prefix)
    output.result(msgspec.to_builtins(files))
    output.text(f"wrote {files.configuration} and a folder with keys for each of {', '.join(files.users)}")
    return 0


def parsed_counts(texts: Sequence[str]) -> dict[str, int]:
    """`role=N` to how many keys a role gets. Raises `BadParameter`."""
    counts = {}
    for text in texts:
        role, _, number = text.partition("=")
        if not role or not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 1000:
            raise typer.BadParameter(f"{text!r} is not of the form role=N, with N from 1 to 1000")
        counts[role] = int(number)
    return counts


def tls_files(cert: str | None, key: str | None, ca: str | None) -> TlsFiles | None:
    """The server's TLS files, or None for a server without. Raises `BadParameter`."""
    if not cert and not key and not ca:
        return None
    if not cert or not key:
        raise typer.BadParameter("--tls-cert and --tls-key go together; --tls-ca is for clients' certificates")
    return TlsFiles(cert=cert, key=key, ca=ca or "")
