"""What a worker of a graph needs to know beside the bus: frozen, checked, read from the environment in one place."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import msgspec

from bus import ConfigError
from schemas.subjects import identifier
from workers.worker import DRAIN_TIMEOUT_S


class ProcessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of any worker's process; each field's variable stands below it."""

    log_level: str = "WARNING"
    """NIXLBUS_LOG_LEVEL."""
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    """NIXLBUS_DRAIN_TIMEOUT_S: how long requests in flight get after SIGTERM."""
    health_host: str = "127.0.0.1"
    """NIXLBUS_HEALTH_HOST: loopback unless said otherwise."""
    health_port: int = -1
    """NIXLBUS_HEALTH_PORT: of /livez and /readyz; 0 takes a free one, below 0 none."""

    def __post_init__(self) -> None:
        if self.drain_timeout_s <= 0:
            raise ConfigError("NIXLBUS_DRAIN_TIMEOUT_S", self.drain_timeout_s, "above 0")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, **overrides: Any) -> Self:
        """Read the environment; `overrides` that are not None win. Raises `ConfigError` that names the variable."""
        values: dict[str, Any] = {}
        for field in msgspec.structs.fields(cls):
            parse: Callable[[str], Any] = type(field.default)
            variable = _variable(field.name)
            text = environ.get(variable, "")
            if text:
                try:
                    values[field.name] = parse(text)
                except ValueError:
                    raise ConfigError(variable, text, f"of type {parse.__name__}") from None
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls(**values)


class Settings(ProcessSettings, frozen=True, kw_only=True):
    """Settings of the graph's workers besides; each field's variable stands below it."""

    graph: str = "vlm"
    """NIXLBUS_GRAPH."""
    model: str = ""
    """NIXLBUS_MODEL: a checkpoint's folder; empty is the packaged digits model."""
    request_timeout_s: float = 60.0
    """NIXLBUS_REQUEST_TIMEOUT_S: for a request that brings no deadline of its own."""
    kv_blocks: int = 1024
    """NIXLBUS_KV_BLOCKS: blocks in decode's pool; 1,024 of 16 tokens are 16 full contexts of the demo model."""
    block_tokens: int = 16
    """NIXLBUS_BLOCK_TOKENS: tokens in a block, vLLM's default."""
    http_host: str = "127.0.0.1"
    """NIXLBUS_HTTP_HOST: loopback unless said otherwise."""
    http_port: int = 8000
    """NIXLBUS_HTTP_PORT: 0 takes a free one."""
    otlp_host: str = "127.0.0.1"
    """NIXLBUS_OTLP_HOST: where the `traces` role listens for spans."""
    otlp_port: int = 4317
    """NIXLBUS_OTLP_PORT: OTLP's registered port; 0 takes a free one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        identifier("NIXLBUS_GRAPH", self.graph)
        for field in ("kv_blocks", "block_tokens", "request_timeout_s"):
            if getattr(self, field) <= 0:
                raise ConfigError(_variable(field), getattr(self, field), "above 0")


def _variable(field: str) -> str:
    return f"NIXLBUS_{field.upper()}"
