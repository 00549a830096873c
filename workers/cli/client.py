"""The bus as a command sees it: NATS alone, a short wait for the server, no data plane."""

from contextlib import AbstractAsyncContextManager

from bus import Bus, BusConfig

OPERATOR = "operator"
"""Whose credentials the commands that look after a graph are run with; `request` is run with those of `client`."""
CONNECT_TIMEOUT_S = 3.0
"""A person waits for the command; a worker waits longer."""


def open_client(name: str, nats_url: str | None) -> AbstractAsyncContextManager[Bus]:
    """A bus for the length of a command, with a worker id that begins with `name`, or with NIXLBUS_IDENTITY.

    Entering raises `ConnectionLost`, `PermissionDenied`; a bad variable is a `ConfigError` now.
    """
    config = BusConfig.from_env(name, nats_url=nats_url, connect_timeout_s=CONNECT_TIMEOUT_S)
    return Bus.open(config, data_plane=False)
