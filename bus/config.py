"""What a bus needs to know before it opens: frozen, checked on construction, read from the environment in one place.

In: `NIXLBUS_*` variables, or arguments. Out: a `BusConfig`, or a `ConfigError` that names the variable.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from bus.control_plane.nats_url import is_usable, names_user, redacted
from schemas.subjects import DEFAULT_PREFIX, Subjects, checked_worker_id

DEFAULT_NATS_URL = "nats://127.0.0.1:4222"


class ConfigError(ValueError):
    """A setting that can't be used. Attribute: `variable`, the environment variable that sets it."""

    def __init__(self, variable: str, value: object, expected: str) -> None:
        self.variable = variable
        super().__init__(f"{variable}={value!r} is not {expected}")


class BusConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a `Bus` is opened with. Each field's variable and the source of its default stand below."""

    worker_id: str
    """NIXLBUS_WORKER_ID; if unset a role and random digits, so that two workers never share one: `encode-1f2e3d`, or
    with NATS credentials `encode.1f2e3d`, whose role permissions can match. NIXLBUS_IDENTITY is another role for it."""
    nats_url: str = DEFAULT_NATS_URL
    """NIXLBUS_NATS_URL: one URL, or several with commas; `tls://` for TLS. A user and password may stand in it."""
    nats_creds: str = ""
    """NIXLBUS_NATS_CREDS: a credentials file of NATS (JWT and seed), mode 0600."""
    nats_nkey: str = ""
    """NIXLBUS_NATS_NKEY: an nkey's seed file, mode 0600; `nixlbus nats-conf` makes one for each role."""
    nats_ca: str = ""
    """NIXLBUS_NATS_CA: certificates to trust instead of the system's, PEM."""
    nats_cert: str = ""
    """NIXLBUS_NATS_CERT: our own certificate, PEM, for servers that ask for one; with `nats_key`."""
    nats_key: str = ""
    """NIXLBUS_NATS_KEY: its private key, PEM, mode 0600."""
    prefix: str = DEFAULT_PREFIX
    """NIXLBUS_PREFIX: first token of every subject."""
    connect_timeout_s: float = 10.0
    """NIXLBUS_CONNECT_TIMEOUT_S: for the first connection; later ones are retried for as long as the worker lives."""
    key_file: str = ""
    """NIXLBUS_KEY_FILE: the key that proves membership in the handshake; needed by workers that move tensors."""
    arena_bytes: int = 64 << 20
    """NIXLBUS_ARENA_MB: registered memory for operations; 90 prompts of 900 tokens of the demo model."""
    handshake_timeout_s: float = 10.0
    """NIXLBUS_HANDSHAKE_TIMEOUT_S: a first contact takes 20 ms; a busy 2-core machine has been seen to take 1 s."""
    operation_lease_s: float = 60.0
    """NIXLBUS_OPERATION_LEASE_S: how long a grant lasts where no deadline is nearer."""
    chunk_bytes: int = 8 << 20
    """NIXLBUS_CHUNK_MB: largest piece posted at once; a post can block for the whole copy (8 MiB: 2 to 4 ms)."""
    inline_bytes: int = 1 << 20
    """NIXLBUS_INLINE_KB: up to this a transfer is posted on the event loop: cheaper than two thread hand-overs."""
    max_foreign_registrations: int = 256
    """NIXLBUS_MAX_FOREIGN_REGISTRATIONS: memory outside the arena that is registered at one time."""
    quarantine_bytes: int = 0
    """NIXLBUS_QUARANTINE_MB: memory fenced for peers that may still write; above it it stops (0: half the arena)"""
    quarantine_operations: int = 1024
    """NIXLBUS_QUARANTINE_OPERATIONS: the same, in operations."""
    checksum: bool = False
    """NIXLBUS_CHECKSUM: whether operations prove their bytes where their caller doesn't say; two passes over them."""
    stream_replicas: int = 1
    """NIXLBUS_STREAM_REPLICAS: copies of what JetStream keeps for us, of what we create; 3 in a cluster."""
    media_ttl_s: float = 86_400.0
    """NIXLBUS_MEDIA_TTL_S: how long the object store keeps large messages, where we create it."""

    def __post_init__(self) -> None:
        checked_worker_id(self.worker_id, "NIXLBUS_WORKER_ID")
        Subjects(self.prefix)
        if not is_usable(self.nats_url):
            shown = "(not shown: it may hold a password)" if names_user(self.nats_url) else self.nats_url
            raise ConfigError("NIXLBUS_NATS_URL", shown, "a URL such as nats://127.0.0.1:4222")
        for name in ("connect_timeout_s", "handshake_timeout_s", "operation_lease_s"):
            if not 0 < getattr(self, name) <= 86_400:
                raise ConfigError(_VARIABLES[name], getattr(self, name), "a number of seconds above 0")
        for name in ("arena_bytes", "chunk_bytes", "inline_bytes"):
            if getattr(self, name) < 4096:
                raise ConfigError(_VARIABLES[name], getattr(self, name), "at least 4096 bytes")
        for name in ("max_foreign_registrations", "quarantine_operations"):
            if getattr(self, name) < 1:
                raise ConfigError(_VARIABLES[name], getattr(self, name), "a number above 0")
        if not 1 <= self.stream_replicas <= 5:
            raise ConfigError(_VARIABLES["stream_replicas"], self.stream_replicas, "a number from 1 to 5")
        if not 1 <= self.media_ttl_s <= 366 * 86_400:
            raise ConfigError(_VARIABLES["media_ttl_s"], self.media_ttl_s, "a number of seconds, 1 to a year")
        if self.quarantine_bytes < 0:
            raise ConfigError(_VARIABLES["quarantine_bytes"], self.quarantine_bytes, "a number of mebibytes")

    @classmethod
    def from_env(cls, role: str, environ: Mapping[str, str] = os.environ, **overrides: Any) -> "BusConfig":
        """Read the environment for a worker of `role`; `overrides` that are not None win. Raises `ConfigError`."""
        values: dict[str, Any] = {}
        for field, (variable, parse, expected) in _READERS.items():
            text = environ.get(variable, "")
            if not text:
                continue
            try:
                values[field] = parse(text)
            except ValueError:
                raise ConfigError(variable, text, expected) from None
        values.update({name: value for name, value in overrides.items() if value is not None})
        if "worker_id" not in values:
            values["worker_id"] = _new_worker_id(environ.get("NIXLBUS_IDENTITY") or role, _has_credentials(values))
        return cls(**values)

    def __repr__(self) -> str:
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        fields["nats_url"] = redacted(self.nats_url)
        return f"BusConfig({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def _has_credentials(values: Mapping[str, Any]) -> bool:
    return bool(values.get("nats_nkey") or values.get("nats_creds") or names_user(values.get("nats_url", "")))


def _new_worker_id(identity: str, has_credentials: bool) -> str:
    """An identity of one instance (`encode.1`) is its worker's id; of a role, the id's first part."""
    if "." in identity:
        return identity
    return f"{identity}{'.' if has_credentials else '-'}{secrets.token_hex(3)}"


def _text(text: str) -> str:
    return text


def _mebibytes(text: str) -> int:
    return int(float(text) * (1 << 20))


def _kibibytes(text: str) -> int:
    return int(float(text) * (1 << 10))


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


_READERS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "worker_id": ("NIXLBUS_WORKER_ID", _text, "a worker id"),
    "nats_url": ("NIXLBUS_NATS_URL", _text, "a URL"),
    "nats_creds": ("NIXLBUS_NATS_CREDS", _text, "a path"),
    "nats_nkey": ("NIXLBUS_NATS_NKEY", _text, "a path"),
    "nats_ca": ("NIXLBUS_NATS_CA", _text, "a path"),
    "nats_cert": ("NIXLBUS_NATS_CERT", _text, "a path"),
    "nats_key": ("NIXLBUS_NATS_KEY", _text, "a path"),
    "prefix": ("NIXLBUS_PREFIX", _text, "an identifier"),
    "connect_timeout_s": ("NIXLBUS_CONNECT_TIMEOUT_S", float, "a number of seconds"),
    "key_file": ("NIXLBUS_KEY_FILE", _text, "a path"),
    "arena_bytes": ("NIXLBUS_ARENA_MB", _mebibytes, "a number of mebibytes"),
    "handshake_timeout_s": ("NIXLBUS_HANDSHAKE_TIMEOUT_S", float, "a number of seconds"),
    "operation_lease_s": ("NIXLBUS_OPERATION_LEASE_S", float, "a number of seconds"),
    "chunk_bytes": ("NIXLBUS_CHUNK_MB", _mebibytes, "a number of mebibytes"),
    "inline_bytes": ("NIXLBUS_INLINE_KB", _kibibytes, "a number of kibibytes"),
    "max_foreign_registrations": ("NIXLBUS_MAX_FOREIGN_REGISTRATIONS", int, "a number"),
    "quarantine_bytes": ("NIXLBUS_QUARANTINE_MB", _mebibytes, "a number of mebibytes"),
    "quarantine_operations": ("NIXLBUS_QUARANTINE_OPERATIONS", int, "a number"),
    "checksum": ("NIXLBUS_CHECKSUM", _switch, "0 or 1"),
    "stream_replicas": ("NIXLBUS_STREAM_REPLICAS", int, "a number"),
    "media_ttl_s": ("NIXLBUS_MEDIA_TTL_S", float, "a number of seconds"),
}
_VARIABLES = {field: variable for field, (variable, _, _) in _READERS.items()}
