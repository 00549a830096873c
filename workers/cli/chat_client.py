"""A client of the frontend's streamed chat completions, on the standard library.

In: a URL, a prompt, images. Out: the events of the stream, as they come. The demo uses it, so that its request goes
the way that an HTTP client's goes.
"""

import asyncio
import base64
import json
import mimetypes
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bus import ConnectionLost, RemoteFault, RemoteProtocolError
from schemas.fault import Fault

TIMEOUT_S = 60.0


async def stream_chat(url: str, prompt: str, images: Sequence[Path], max_tokens: int) -> AsyncIterator[dict[str, Any]]:
    """POST one request and yield its events. Raises `RemoteFault` for an error object, `ConnectionLost`."""
    address = urlsplit(url)
    body = json.dumps(_body(prompt, images, max_tokens)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 20)
            try:
                writer.write(head.encode() + body)
                status = await _status(reader)
                async for event in _events(reader, status):
                    yield event
            finally:
                writer.close()
    except OSError as error:
        raise ConnectionLost(f"no answer from the frontend at {url}: {error}") from None


def _body(prompt: str, images: Sequence[Path], max_tokens: int) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(path)}} for path in images]
    content.append({"type": "text", "text": prompt})
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


async def _status(reader: asyncio.StreamReader) -> int:
    status_line = (await reader.readline()).split()
    if len(status_line) < 2:
        raise ConnectionLost("the frontend closed the connection without an answer")
    while (await reader.readline()).strip():
        pass
    return int(status_line[1])


async def _events(reader: asyncio.StreamReader, status: int) -> AsyncIterator[dict[str, Any]]:
    if status != 200:
        answer = (await reader.read()).decode(errors="replace")
        raise _fault(json.loads(answer[answer.index("{") : answer.rindex("}") + 1]))
    async for raw in reader:
        line = raw.strip()
        if line == b"data: [DONE]":
            return
        if line.startswith(b"data: "):
            event: dict[str, Any] = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise _fault(event)
            yield event
    raise RemoteProtocolError("the stream ended before its end")


def _fault(answer: dict[str, Any]) -> RemoteFault:
    error = answer["error"]
    return RemoteFault(
        Fault(
            code=error.get("code", "internal"),
            message=error["message"],
            worker_id=error.get("worker_id", ""),
            trace_id=error.get("trace_id", ""),
        )
    )
