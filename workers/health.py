"""Liveness and readiness over HTTP, for whatever starts and stops workers.

In: `GET /livez`, `GET /readyz`. Out: 200 or 503 and one line. Alive means that the event loop turns: it answers.
Ready means that work may be sent here: connected, subscribed, the data plane up, not draining. A lost NATS server makes
a worker unready and not dead, or an outage of one server would restart every worker.
Off unless NIXLBUS_HEALTH_PORT is set. Answers these two and nothing else, one request per connection.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

READ_TIMEOUT_S = 5.0
MAX_REQUEST_BYTES = 8192

_LOG = logging.getLogger(__name__)


@asynccontextmanager
async def health_server(host: str, port: int, not_ready: Callable[[], str]) -> AsyncIterator[str]:
    """Answer for as long as the context lasts; yields the URL. `not_ready` tells why not, "" if ready.

    Raises `OSError` if the address is taken.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(_response(head, not_ready))
                    await writer.drain()
            finally:
                writer.close()

    server = await asyncio.start_server(answer, host, port, limit=MAX_REQUEST_BYTES)
    try:
        bound_host, bound_port = server.sockets[0].getsockname()[:2]
        yield f"http://{bound_host}:{bound_port}"
    finally:
        server.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await server.wait_closed()


def _response(head: bytes, not_ready: Callable[[], str]) -> bytes:
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        status, text = "405 Method Not Allowed", "only GET"
    elif path == b"/livez":
        status, text = "200 OK", "alive"
    elif path == b"/readyz":
        reason = not_ready()
        status, text = ("503 Service Unavailable", reason) if reason else ("200 OK", "ready")
    else:
        status, text = "404 Not Found", "there are /livez and /readyz"
    body = b"" if method == b"HEAD" else f"{text}\n".encode()
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
