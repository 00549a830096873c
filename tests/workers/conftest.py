"""A nats-server for workers that are not the packaged graph's."""

import pytest

from bus import EmbeddedServer


@pytest.fixture(scope="session")
def nats(nixlbus_server: EmbeddedServer) -> EmbeddedServer:
    return nixlbus_server
