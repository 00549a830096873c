"""The text of a nats-server configuration: our limits, JetStream, TLS, and users with their permissions.

In: a `ServerSettings` and, for a server that asks who is there, `User`s by their public nkeys. Out: text, in which no
secret stands. Pure. Without users the server takes anybody: for loopback. Permissions can't be spliced from variables
of nats-server's configuration language, hence a text that is written out.
Source: facts of nats-server 2.15; NATS documentation, "Authorization" and "Subject permissions".
"""

import json
from collections.abc import Sequence

import msgspec

from bus.control_plane.permissions import Permissions

MAX_PAYLOAD_BYTES = 8 << 20
"""Our configurations' max_payload: NATS's own advice for the upper end, and room for images in requests."""
ACCOUNT = "NIXLBUS"


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Paths on the server: certificate, key, and the authority of clients' certificates, if it asks for them."""

    cert: str
    key: str
    ca: str = ""


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a server is told beside its users."""

    host: str = "127.0.0.1"
    port: int = 4222
    monitoring_host: str = "127.0.0.1"
    """Of its own, because monitoring asks nobody who he is: not of `host`, which others are to reach."""
    monitoring_port: int = 8222
    store_dir: str = ""
    """JetStream's folder; empty for none."""
    tls: TlsFiles | None = None


class User(msgspec.Struct, frozen=True, kw_only=True):
    """Who may connect: `name` for readers, the public nkey, and what it may do."""

    name: str
    public_key: str
    permissions: Permissions


def server_configuration(
    *, host: str = "127.0.0.1", port: int = 4222, store_dir: str = "", monitoring_port: int = 8222
) -> str:
    """A configuration without users: our max_payload, monitoring, and JetStream if `store_dir`."""
    return _server(ServerSettings(host=host, port=port, store_dir=store_dir, monitoring_port=monitoring_port))


def guarded_configuration(settings: ServerSettings, users: Sequence[User], system_key: str) -> str:
    """A configuration with users: who isn't one of them is refused.

    `system_key`: public nkey of the system account's user.
    """
    entries = "\n".join(_user(user) for user in users)
    jetstream = "    jetstream: enabled\n" if settings.store_dir else ""
    return (
        "# Written by nixlbus nats-conf, which keeps the keys and writes this file anew. No secret is in it.\n"
        f"{_server(settings)}"
        "accounts {\n"
        f"  {ACCOUNT} {{\n{jetstream}    users: [\n{entries}\n    ]\n  }}\n"
        f"  SYS {{ users: [ {{ nkey: {system_key} }} ] }}\n"
        "}\n"
        "system_account: SYS\n"
    )


def _server(settings: ServerSettings) -> str:
    lines = [
        f'listen: "{settings.host}:{settings.port}"',
        f'http: "{settings.monitoring_host}:{settings.monitoring_port}"',
        f"max_payload: {MAX_PAYLOAD_BYTES}",
        'write_deadline: "10s"',
    ]
    if settings.store_dir:
        lines.append(f"jetstream {{ store_dir: {_text(settings.store_dir)} }}")
    if settings.tls is not None:
        tls = [f"cert_file: {_text(settings.tls.cert)}", f"key_file: {_text(settings.tls.key)}"]
        if settings.tls.ca:
            tls += [f"ca_file: {_text(settings.tls.ca)}", "verify: true"]
        lines.append(f"tls {{ {', '.join(tls)} }}")
    return "\n".join(lines) + "\n"


def _user(user: User) -> str:
    return (
        f"      # {user.name}\n"
        f"      {{ nkey: {user.public_key}, permissions: {{\n"
        f"          publish: {{ allow: {_subjects(user.permissions.publish)} }}\n"
        f"          subscribe: {{ allow: {_subjects(user.permissions.subscribe)} }} }} }}"
    )


def _subjects(subjects: Sequence[str]) -> str:
    listed = "".join(f"\n            {_text(subject)}" for subject in subjects)
    return f"[{listed}\n          ]"


def _text(text: str) -> str:
    return json.dumps(text)
