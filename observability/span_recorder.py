"""The spans of this process, kept in memory for those who look at them: tests.

In: every span that begins and ends while the recorder is entered. Out: `SpanRecord`s, as a collector would get them.
Invariants: works whether or not tracing was configured, and when it is configured meanwhile; export, if there is one,
goes on; leaving restores what was; every span is recorded, whatever the sampler says; at most `max_spans` are kept, the
oldest go first.
Leaves out: other processes' spans, for which there is `OtlpReceiver`.
"""

import asyncio
import os
import time
from collections import deque
from types import TracebackType

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

from observability import tracing
from observability.span_record import SpanRecord, orphans, roots, span_records, tree

DEFAULT_MAX_SPANS = 100_000


class SpanRecorder:
    """`with SpanRecorder() as spans:`, then look at what ended inside. Methods may be called from any thread."""

    def __init__(self, *, max_spans: int = DEFAULT_MAX_SPANS) -> None:
        """Raises `ValueError` where OTEL_SDK_DISABLED=true, under which no span is ever made."""
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            raise ValueError("OTEL_SDK_DISABLED=true keeps every span from being made; unset it to record spans")
        self._listener = _Listener(max_spans)

    def __enter__(self) -> "SpanRecorder":
        tracing.listen(self._listener)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        tracing.stop_listening(self._listener)

    @property
    def spans(self) -> list[SpanRecord]:
        """The spans that have ended, in the order of their ends."""
        records = span_records(encode_spans(list(self._listener.ended)).resource_spans)
        return sorted(records, key=lambda span: span.end_ns)  # OTLP puts them together by resource

    def named(self, name: str) -> list[SpanRecord]:
        """The spans of this name, in the order of their ends."""
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> SpanRecord:
        """The only span of this name. Raises `LookupError` that tells the names there are, if it isn't the only one."""
        found = self.named(name)
        if len(found) != 1:
            raise LookupError(f"{len(found)} spans are called {name!r}, not one; there are {self._names()}")
        return found[0]

    def roots(self) -> list[SpanRecord]:
        """The spans without a parent."""
        return roots(self.spans)

    def orphans(self) -> list[SpanRecord]:
        """The spans whose parent didn't end here: in another process, not yet, or never."""
        return orphans(self.spans)

    def tree(self) -> list[tuple[int, SpanRecord]]:
        """Every span with its depth, parents before children, siblings by their start."""
        return tree(self.spans)

    def clear(self) -> None:
        """Forget what has ended."""
        self._listener.ended.clear()

    async def wait_for(self, name: str, timeout_s: float = 5.0, *, count: int = 1) -> list[SpanRecord]:
        """Wait until `count` spans of this name have ended, and return those that have.

        Raises `TimeoutError` that tells the names there are.
        """
        deadline_s = time.monotonic() + timeout_s
        while self._listener.num_ended(name) < count:
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"no {count} spans called {name!r} within {timeout_s:g} s; there are {self._names()}"
                )
            await asyncio.sleep(0.002)
        return self.named(name)

    def _names(self) -> str:
        names = sorted({span.name for span in list(self._listener.ended)})
        return ", ".join(map(repr, names)) or "none"


class _Listener(SpanProcessor):
    """Keeps what ends; turned into records when somebody looks."""

    def __init__(self, max_spans: int) -> None:
        self.ended: deque[ReadableSpan] = deque(maxlen=max_spans)

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span)

    def num_ended(self, name: str) -> int:
        return sum(span.name == name for span in list(self.ended))
