"""The way of a finished span out of this process: queue, batches, OTLP over gRPC.

In: finished spans from `tracing`'s provider, the standard OTEL_* variables. Out: Export calls to a collector,
counts, and at most one log warning per outage.
Invariants: nothing here blocks or raises into the code that ends a span; what waits is bounded in number, and so in
memory; a full queue drops its oldest spans and counts them; `flush` and `shutdown` return within their time limit even
if the collector never answers.
Leaves out: whether to export at all (`export_environment`), making spans (`tracing`), receiving them
(`receiver`). Imports the SDK, and gRPC for an exporter: `tracing` imports this when there is an endpoint.
Source: OpenTelemetry environment variable specification; the SDK's BatchSpanProcessor and OTLP exporter 1.45.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any

import msgspec
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from observability.export_environment import positive_int

logger = logging.getLogger(__name__)

# A burst of 20,000 spans fits, even if the collector takes none of them meanwhile. The SDK's own default of 2048 lost
# 36 % of one, 16,384 lost 5 %, before a collector that takes 50 ms per batch. A span with nine attributes takes 4.5 KB
# here until it is sent, so a full queue takes 150 MB: only while the collector is away or slower than the spans come.
DEFAULT_MAX_QUEUE_SIZE = 32768
# The SDK's.
DEFAULT_MAX_BATCH_SIZE = 512
# The SDK's is 5000: too long for someone who looks at a request's trace right after it.
DEFAULT_SCHEDULE_DELAY_MS = 500


class ExportCounts(msgspec.Struct, frozen=True):
    """How many spans ended here and what became of them; the rest of the ended ones wait to be exported."""

    ended: int
    exported: int
    failed: int
    """The collector refused them or didn't answer."""
    dropped: int
    """The queue was full."""


class SpanPipeline(BatchSpanProcessor):
    """The SDK's batching processor with limits in time and with counts."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = _CountingExporter(exporter)
        self._num_ended = 0
        self._counter = count(1)
        _said.clear()
        queue_size = positive_int("OTEL_BSP_MAX_QUEUE_SIZE", DEFAULT_MAX_QUEUE_SIZE)
        batch_size = positive_int("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", DEFAULT_MAX_BATCH_SIZE)
        super().__init__(
            self._exporter,
            max_queue_size=queue_size,
            max_export_batch_size=min(batch_size, queue_size),
            schedule_delay_millis=positive_int("OTEL_BSP_SCHEDULE_DELAY", DEFAULT_SCHEDULE_DELAY_MS),
        )
        # In place of the processor's own, which drops the same but tells only a meter.
        self._queue = self._batch_processor._queue = _CountingQueue(maxlen=queue_size)

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span for the next batch; never blocks."""
        self._num_ended = next(self._counter)  # counts right from many threads, where += would not
        super().on_end(span)

    @property
    def counts(self) -> ExportCounts:
        """What became of the spans so far."""
        return ExportCounts(
            self._num_ended, self._exporter.num_exported, self._exporter.num_failed, self._queue.num_dropped
        )

    def flush(self, timeout_s: float) -> bool:
        """Export what has ended. Blocks for at most `timeout_s`; True if all of it arrived in time.

        The SDK's `force_flush` has no time limit, hence the thread, which outlives a flush that is given up.
        """
        num_failed = self._exporter.num_failed
        flusher = threading.Thread(target=self.force_flush, name="span-flush", daemon=True)
        flusher.start()
        flusher.join(timeout_s)
        return not flusher.is_alive() and self._exporter.num_failed == num_failed

    def close(self, timeout_s: float) -> None:
        """Export what has ended and stop. Blocks for at most about `timeout_s`, then drops the rest.

        Starts no thread, so it also works while the interpreter exits.
        """
        # The public shutdown() waits 30 s; its private half takes the limit.
        self._batch_processor.shutdown(timeout_millis=int(timeout_s * 1000))


def otlp_exporter() -> SpanExporter:
    """Return the exporter that the environment describes. Connects later, and again whenever it must.

    Raises:
        ValueError: a variable of the exporter (timeout, compression, certificates, ...) can't be used.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    try:
        return OTLPSpanExporter()
    except Exception as error:
        raise ValueError(f"a variable OTEL_EXPORTER_OTLP_* can't be used: {error}") from error


class _CountingQueue(deque[Any]):
    """A bounded queue, filled from the left and emptied from the right, that counts what it drops."""

    def __init__(self, maxlen: int) -> None:
        super().__init__(maxlen=maxlen)
        self._lock = threading.Lock()
        self.num_dropped = 0

    def appendleft(self, span: Any) -> None:
        with self._lock:
            self.num_dropped += len(self) == self.maxlen
            super().appendleft(span)

    def pop(self) -> Any:  # type: ignore[override]  # a deque's takes no index
        with self._lock:  # or room would be made between the question and the drop
            return super().pop()


class _CountingExporter(SpanExporter):
    """Passes batches on, counts them, and says once per outage that they don't arrive."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._reported = False
        self._is_exporting = False
        self.num_exported = 0
        self.num_failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        _exporting.exporter = self
        self._is_exporting = True
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            self.report(f"{type(error).__name__}: {error}")
            result = SpanExportResult.FAILURE
        finally:
            _exporting.exporter = None
            self._is_exporting = False
        self._count(len(spans), result)
        return result

    # No lock: the processor exports one batch at a time.
    def _count(self, num_spans: int, result: SpanExportResult) -> None:
        if result is SpanExportResult.SUCCESS:
            self.num_exported += num_spans
            self._reported = False
        else:
            self.num_failed += num_spans
            self.report("the collector refused a batch")

    def report(self, reason: str) -> None:
        if not self._reported:
            self._reported = True
            logger.warning("spans are not arriving (said once per outage): %s", reason)

    def shutdown(self) -> None:
        if self._is_exporting:
            self.report("the collector didn't answer before the shutdown's time limit")
        self._exporter.shutdown()


def _report_once_per_outage(record: logging.LogRecord) -> bool:
    """Turn what the OTLP exporter logs about each attempt into the one report of the outage."""
    exporter: _CountingExporter | None = getattr(_exporting, "exporter", None)
    if exporter is None:
        return True  # not a thread of ours: a host application's exporter
    exporter.report(record.getMessage())
    return False


def _say_once(record: logging.LogRecord) -> bool:
    """Let "queue full" and the like through once per configuration; `ExportCounts` has the number."""
    is_new = record.msg not in _said
    _said.add(record.msg)
    return is_new


_exporting = threading.local()
_said: set[str] = set()
# They stay: a thread that was given up logs after `close` has returned.
logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").addFilter(_report_once_per_outage)
logging.getLogger("opentelemetry.sdk._shared_internal").addFilter(_say_once)
