"""The traces that came in: bounded, shared between the receiver's threads and those who look.

In: `SpanRecord`s in any order, any number of times. Out: the spans of one trace; the wait until a trace is
whole.
Invariants: at most `max_traces` traces and `max_spans` spans, the oldest trace dropped first; a span sent
twice (a retried export) is kept once; all methods may be called from any thread.
Leaves out: gRPC (`receiver`), the meaning of a trace's spans (`span_record`).
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from observability.span_record import SpanRecord, orphans, roots

# A leaf that its process hasn't exported yet is missed by no other span; hence the wait for more.
DEFAULT_QUIET_S = 0.3


class TraceIncompleteError(TimeoutError):
    """A trace did not become whole in time. Says what is missing."""

    def __init__(self, trace_id: str, spans: list[SpanRecord], timeout_s: float) -> None:
        """`spans` are those that did come."""
        self.trace_id = trace_id
        self.num_spans = len(spans)
        self.num_roots = len(roots(spans))
        self.missing_parent_ids = tuple(sorted({span.parent_id for span in orphans(spans)}))
        super().__init__(
            f"trace {trace_id} is not complete after {timeout_s:g} s, {len(spans)} spans came: "
            f"{_lack(spans) or 'spans are still coming'}"
        )


class TraceStore:
    """The latest traces, by trace id."""

    def __init__(self, *, max_traces: int = 1000, max_spans: int = 200_000) -> None:
        self._max_traces = max_traces
        self._max_spans = max_spans
        self._traces: dict[str, _Trace] = {}  # in the order of their first span
        self._num_spans = 0
        self._lock = threading.Lock()
        self._wakers: set[Callable[[], None]] = set()

    def add(self, spans: Iterable[SpanRecord]) -> None:
        """Keep spans, replacing those with the same ids, and drop the oldest traces that are now too many."""
        with self._lock:
            for span in spans:
                self._add(span)
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    def trace(self, trace_id: str) -> list[SpanRecord]:
        """Return the spans of a trace in the order of their start; none for a trace that isn't here."""
        with self._lock:
            entry = self._traces.get(trace_id)
            return sorted(entry.spans.values(), key=lambda span: span.start_ns) if entry else []

    def trace_ids(self) -> list[str]:
        """Return the traces that are here, the oldest first."""
        with self._lock:
            return list(self._traces)

    def last_trace_id(self) -> str | None:
        """Return the trace whose root ended last, or None if no root has come."""
        with self._lock:
            ended = {trace_id: entry.root_end_ns for trace_id, entry in self._traces.items() if entry.root_end_ns}
        return max(ended, key=ended.__getitem__) if ended else None

    @property
    def num_spans(self) -> int:
        """The number of spans kept, over all traces."""
        return self._num_spans

    async def wait_for_complete(
        self, trace_id: str, timeout_s: float, *, quiet_s: float = DEFAULT_QUIET_S
    ) -> list[SpanRecord]:
        """Wait until a trace is whole, and return its spans.

        Whole: it has one root, no orphan, and no new span came for `quiet_s`.

        Raises:
            TraceIncompleteError: that didn't happen within `timeout_s`. A `TimeoutError`; names the missing
            parents.
        """
        deadline = time.monotonic() + timeout_s
        with self._arrivals() as arrival:
            while True:
                arrival.clear()
                spans, quiet_at = self._look(trace_id, quiet_s)
                now = time.monotonic()
                wake_at = deadline
                if not _lack(spans):
                    if now >= quiet_at:
                        return spans
                    wake_at = min(quiet_at, deadline)
                if now >= deadline:
                    raise TraceIncompleteError(trace_id, spans, timeout_s)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(arrival.wait(), wake_at - now)

    @contextlib.contextmanager
    def _arrivals(self) -> Iterator[asyncio.Event]:
        """An event of the running loop that is set after each `add`, whichever thread calls it."""
        loop = asyncio.get_running_loop()
        event = asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed in the meantime
                loop.call_soon_threadsafe(event.set)

        with self._lock:
            self._wakers.add(wake)
        try:
            yield event
        finally:
            with self._lock:
                self._wakers.discard(wake)

    def _look(self, trace_id: str, quiet_s: float) -> tuple[list[SpanRecord], float]:
        with self._lock:
            entry = self._traces.get(trace_id)
            return (list(entry.spans.values()), entry.last_arrival + quiet_s) if entry else ([], 0.0)

    def _add(self, span: SpanRecord) -> None:
        entry = self._traces.get(span.trace_id)
        if entry is None:
            entry = self._traces[span.trace_id] = _Trace()
        self._num_spans += span.span_id not in entry.spans
        entry.put(span)
        while len(self._traces) > self._max_traces or self._num_spans > self._max_spans:
            oldest = next(iter(self._traces))
            self._num_spans -= len(self._traces.pop(oldest).spans)


class _Trace:
    """The spans of one trace by span id."""

    __slots__ = ("last_arrival", "root_end_ns", "spans")

    def __init__(self) -> None:
        self.spans: dict[str, SpanRecord] = {}
        self.root_end_ns = 0
        self.last_arrival = 0.0

    def put(self, span: SpanRecord) -> None:
        self.spans[span.span_id] = span
        self.last_arrival = time.monotonic()
        if not span.parent_id:
            self.root_end_ns = max(self.root_end_ns, span.end_ns)


def _lack(spans: list[SpanRecord]) -> str:
    """Say what keeps the spans from being a whole trace; "" if nothing does."""
    if not spans:
        return "no span came"
    lacks = []
    num_roots = len(roots(spans))
    if num_roots != 1:
        lacks.append("the root is missing" if num_roots == 0 else f"there are {num_roots} roots instead of one")
    waiting: dict[str, list[str]] = {}
    for span in orphans(spans):
        waiting.setdefault(span.parent_id, []).append(f"{span.name!r} of {span.service or 'an unnamed service'}")
    lacks += [f"parent {parent_id} of {', '.join(names)} is missing" for parent_id, names in sorted(waiting.items())]
    return "; ".join(lacks)
