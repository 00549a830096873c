"""frontend: OpenAI's chat completions over HTTP, in front of the graph.

In: `POST /v1/chat/completions`, `GET /v1/models`, `/health`, `/ready`. Out: the same request on the graph's `generate`
subject, and its frames as server-sent events or one JSON object. The span of the HTTP request is the trace's root
(or continues a caller's `traceparent`). A fault is an error object with its HTTP status; after the first byte of a
stream it is an error event, never a silent end.
"""

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, aclosing
from typing import Any, ClassVar, TypeVar

from bus import Bus, BusError, ConfigError, RequestRefused, RetryPolicy, fault_of
from observability import semantic_conventions as names
from observability.active_span import Span, SpanKind
from observability.propagation import extract
from observability.tracing import start_span
from schemas.fault import Fault, FaultCode
from schemas.generate import GenerateChunk, GenerateDone, GenerateRequest
from workers import openai_api
from workers.roles.graph_worker import GraphWorker
from workers.settings import Settings

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:  # pragma: no cover
    raise ImportError("the frontend needs starlette and uvicorn: pip install 'nixlbus[http]'") from error

ROUTE = "/v1/chat/completions"
T = TypeVar("T")
MAX_BODY_BYTES = 12 << 20
"""An image of 8 MiB, the bus's max_payload, is 10.7 MiB as base64."""


class FrontendWorker(GraphWorker):
    """Serves HTTP on the worker's own event loop."""

    role: ClassVar[str] = "frontend"
    needs_data_plane: ClassVar[bool] = False

    def __init__(self, bus: Bus, settings: Settings) -> None:
        super().__init__(bus, settings)
        self.url = ""
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and serve. Raises `ConfigError` if the address is taken."""
        listener = _listen(self.settings.http_host, self.settings.http_port)
        host, port = listener.getsockname()[:2]
        self.url = f"http://{host}:{port}"
        application = Starlette(
            routes=[
                Route(ROUTE, self._chat_completions, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._health),
                Route("/ready", self._ready),
            ]
        )
        config = uvicorn.Config(application, log_level="warning", lifespan="off", access_log=False)
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def stop(self) -> None:
        """Accept no more, and finish what is being answered within the drain's time.

        What is left then meets the end of the bus, which its clients are told as an error.
        """
        if self._server and self._serving:
            self._server.should_exit = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.drain_timeout_s):
                    await self._serving

    def metadata(self) -> dict[str, str]:
        """Discovery also tells the URL."""
        return {**super().metadata(), "url": self.url}

    async def _chat_completions(self, http: Request) -> Response:
        server_span = start_span(
            f"POST {ROUTE}",
            kind=SpanKind.SERVER,
            parent=extract(dict(http.headers)),
            attributes={
                names.HTTP_REQUEST_METHOD: "POST",
                names.HTTP_ROUTE: ROUTE,
                names.URL_PATH: http.url.path,
                names.URL_SCHEME: http.url.scheme,
            },
        )
        handed_over = False
        try:
            request = openai_api.parse(await _body(http))
            frames = self._frames(openai_api.to_generate_request(request), server_span)
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(aclosing(frames))
                first = await _unless_gone(http, anext(frames))
                if not request.stream:
                    return await _unless_gone(http, _complete(first, frames, server_span))
                stack.pop_all()
            handed_over = True
            events = _events(request, first, frames, server_span)
            headers = {**_trace_header(server_span), "Cache-Control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        except (BusError, ClientDisconnect) as error:
            fault = _fault(error, self.bus.worker_id, server_span)
            return JSONResponse(openai_api.error_object(fault), fault.http_status, headers=_trace_header(server_span))
        finally:
            if not handed_over:
                server_span.end()

    def _frames(
        self, request: GenerateRequest, server_span: Span
    ) -> AsyncGenerator[GenerateChunk | GenerateDone, None]:
        return self.bus.stream(
            self.bus.subjects.graph(self.settings.graph, "generate"),
            request,
            GenerateChunk,
            GenerateDone,
            timeout_s=self.settings.request_timeout_s,
            retry=RetryPolicy(),
            parent=server_span,
        )

    async def _models(self, _: Request) -> Response:
        services = await self.bus.services(timeout_s=1.0)
        models = {s["metadata"].get("model", "") for s in services if s["metadata"].get("role") == "processor"}
        listed = [{"id": m, "object": "model", "created": 0, "owned_by": "nixlbus"} for m in sorted(models) if m]
        return JSONResponse({"object": "list", "data": listed})

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, _: Request) -> Response:
        try:
            services = await self.bus.services(timeout_s=1.0)
        except BusError as error:
            return JSONResponse({"status": "not ready", "reason": str(error)}, 503)
        present = {service["metadata"].get("role") for service in services}
        missing = [role for role in ("processor", "decode", "prefill", "encode") if role not in present]
        return JSONResponse(
            {"status": "not ready" if missing else "ready", "missing": missing}, 503 if missing else 200
        )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the worker's process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ConfigError("NIXLBUS_HTTP_PORT", port, f"free on {host}: {error.strerror}") from None


async def _body(http: Request) -> bytes:
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestRefused(
                FaultCode.PAYLOAD_TOO_LARGE,
                f"the request body is over {MAX_BODY_BYTES:,} bytes",
                remedy="send smaller images",
            )
    return bytes(body)


async def _unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away: raises `ClientDisconnect` then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _complete(first: GenerateChunk | GenerateDone, frames: AsyncIterator[Any], server_span: Span) -> Response:
    text = ""
    frame = first
    while isinstance(frame, GenerateChunk):
        text += frame.text
        frame = await anext(frames)
    server_span.set({names.HTTP_RESPONSE_STATUS_CODE: 200})
    body = openai_api.completion(_completion_id(), text, frame)
    return JSONResponse(body, headers=_trace_header(server_span))


async def _events(
    request: openai_api.ChatCompletionRequest,
    first: GenerateChunk | GenerateDone,
    frames: AsyncGenerator[Any, None],
    server_span: Span,
) -> AsyncIterator[bytes]:
    completion_id = _completion_id()
    server_span.set({names.HTTP_RESPONSE_STATUS_CODE: 200})
    try:
        async with aclosing(frames):
            yield _event(openai_api.chunk(completion_id, request.model, {"role": "assistant", "content": ""}))
            frame = first
            while isinstance(frame, GenerateChunk):
                if frame.text:
                    yield _event(openai_api.chunk(completion_id, request.model, {"content": frame.text}))
                frame = await anext(frames)
            last = openai_api.chunk(completion_id, frame.model, {}, frame.finish_reason)
            yield _event({**last, "nixlbus": openai_api.extension(frame)})
            if request.stream_options and request.stream_options.include_usage:
                yield _event(openai_api.usage_chunk(completion_id, frame))
            yield b"data: [DONE]\n\n"
    except BusError as error:
        yield _event(openai_api.error_object(_fault(error, "", server_span)))
    finally:
        server_span.end()


def _fault(error: BaseException, worker_id: str, server_span: Span) -> Fault:
    fault = fault_of(error, worker_id=worker_id, trace_id=server_span.trace_id)
    server_span.fail(error)
    server_span.set({names.HTTP_RESPONSE_STATUS_CODE: fault.http_status})
    return fault


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _trace_header(server_span: Span) -> dict[str, str]:
    return {"X-Trace-Id": server_span.trace_id} if server_span.trace_id else {}


def _completion_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"
