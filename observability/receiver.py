"""A small OTLP/gRPC receiver: where the demo and the tests send their spans instead of Jaeger.

In: Export calls of any OpenTelemetry exporter. Out: `SpanRecord`s in a `TraceStore`.
Invariants: gRPC runs in threads of its own, not in the event loop, so the receiver works beside uvloop and
goes on receiving while a caller in the same process blocks in `flush()`; the calls are answered after the
spans are stored.
Leaves out: metrics and logs, OTLP over HTTP, passing spans on. Plain text: bind it to this host alone.
Source: OTLP 1.x.
"""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from observability.span_record import span_records
from observability.trace_store import TraceStore

_SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
# gRPC's own limit is 4 MB; a batch of 512 spans with stack traces may be larger.
_MAX_REQUEST_BYTES = 64 * 1024 * 1024
_STOP_GRACE_S = 0.5


class ReceiverBindError(OSError):
    """The receiver can't listen at its address."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        self.host = host
        self.port = port
        self.reason = reason
        super().__init__(
            f"the OTLP receiver can't listen on {_authority(host, port)}: {reason}. "
            "Choose another port, or 0 for any free one."
        )


class OtlpReceiver:
    """An OTLP/gRPC receiver, running while its `async with` block does.

    `port=0` takes any free port. Entering raises `ReceiverBindError` if it can't listen.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, store: TraceStore | None = None) -> None:
        self._host = host
        self._port = port
        self._server: Any = None
        self._threads: ThreadPoolExecutor | None = None
        self.store = store or TraceStore()
        """The traces received so far; still there after the receiver has stopped."""

    @property
    def endpoint(self) -> str:
        """The value for OTEL_EXPORTER_OTLP_ENDPOINT; known once the receiver runs."""
        return f"http://{_authority(self._host, self._port)}"

    async def __aenter__(self) -> Self:
        import grpc  # type: ignore[import-untyped]

        _check_address(self._host, self._port)
        # Two, so that a slow exporter doesn't hold up the others.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="otlp-receiver")
        self._server = grpc.server(
            self._threads,
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES)],
        )
        self._server.add_generic_rpc_handlers((_trace_service(self.store),))
        try:
            self._port = self._server.add_insecure_port(_authority(self._host, self._port))
        except RuntimeError as error:
            self._threads.shutdown()
            raise ReceiverBindError(self._host, self._port, str(error)) from error
        self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        stopped = self._server.stop(_STOP_GRACE_S)
        await asyncio.to_thread(stopped.wait)
        assert self._threads is not None
        await asyncio.to_thread(self._threads.shutdown)


def _trace_service(store: TraceStore) -> Any:
    """Return the service's one method as a gRPC handler."""
    import grpc
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
        ExportTraceServiceResponse,
    )

    def export(request: ExportTraceServiceRequest, context: object) -> ExportTraceServiceResponse:
        store.add(span_records(request.resource_spans))
        return ExportTraceServiceResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        export, ExportTraceServiceRequest.FromString, ExportTraceServiceResponse.SerializeToString
    )
    return grpc.method_handlers_generic_handler(_SERVICE, {"Export": handler})


def _check_address(host: str, port: int) -> None:
    """Bind and let go: the system's own error says why an address can't be had, gRPC's doesn't."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise ReceiverBindError(host, port, error.strerror or str(error)) from error


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
