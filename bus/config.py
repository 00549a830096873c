"""What a bus needs to know before it opens: frozen, checked on construction, read from the environment in one place.

In: `NIXLBUS_*` variables, or arguments. Out: a `BusConfig`, or a `ConfigError` that names the variable.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from schemas.subjects import DEFAULT_PREFIX, Subjects, identifier

DEFAULT_NATS_URL = "nats://127.0.0.1:4222"


class ConfigError(ValueError):
    """A setting that can't be used. Attribute: `variable`, the environment variable that sets it."""

    def __init__(self, variable: str, value: object, expected: str) -> None:
        self.variable = variable
        super().__init__(f"{variable}={value!r} is not {expected}")


class BusConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a `Bus` is opened with. Each field's variable and the source of its default stand below."""

    worker_id: str
    """NIXLBUS_WORKER_ID; a role and random digits if unset, so that two workers never share one."""
    nats_url: str = DEFAULT_NATS_URL
    """NIXLBUS_NATS_URL: one URL, or several with commas."""
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
        identifier("NIXLBUS_WORKER_ID", self.worker_id)
        Subjects(self.prefix)
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
        values: dict[str, Any] = {"worker_id": f"{role}-{secrets.token_hex(3)}"}
        for field, (variable, parse, expected) in _READERS.items():
            text = environ.get(variable, "")
            if not text:
                continue
            try:
                values[field] = parse(text)
            except ValueError:
                raise ConfigError(variable, text, expected) from None
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls(**values)


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
    "worker_id": ("NIXLBUS_WORKER_ID", _text, "an identifier"),
    "nats_url": ("NIXLBUS_NATS_URL", _text, "a URL"),
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
