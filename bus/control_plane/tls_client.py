"""nats-py's client that keeps what a `tls://` URL promises: nothing is told to a server that doesn't offer TLS.

nats-py 2.16 encrypts when the server's INFO asks for it, whatever the URL says; whoever stands between could leave that
out of the INFO and be told the user's password. Source: `Client._process_connect_init`.
"""

from typing import Any

from nats.aio.client import Client
from nats.errors import Error


class TlsClient(Client):
    """Refuses to introduce itself in the clear where TLS was asked for."""

    def _connect_command(self) -> Any:
        server = self._current_server
        if server is not None and server.uri.scheme == "tls" and not self._server_info.get("tls_required"):
            raise Error("nats: the server offers no TLS and the URL asks for it")
        return super()._connect_command()
