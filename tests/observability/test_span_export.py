"""Export under load and to collectors that are dead, deaf or unwanted: the caller never notices."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

import pytest

import observability
from observability import ExportCounts, OtlpReceiver, SpanRecord, TraceStore
from observability.span_export import DEFAULT_MAX_BATCH_SIZE, DEFAULT_MAX_QUEUE_SIZE


@pytest.fixture
def dead_endpoint() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def deaf_endpoint() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def configure() -> None:
    observability.configure("exporting", instance_id="1", service_version="1")


async def test_a_burst_of_2000_spans_arrives_without_loss(traced: OtlpReceiver) -> None:
    with observability.span("root") as root:
        for number in range(1999):
            with observability.span("one of many", attributes={"number": number}):
                pass
    spans = await traced.store.wait_for_complete(root.trace_id, 10)
    assert len(spans) == 2000
    assert {span.attributes["number"] for span in spans if span.parent_id} == set(range(1999))
    assert observability.flush()
    counts = observability.export_counts()
    assert counts is not None
    assert (counts.ended, counts.exported, counts.failed, counts.dropped) == (2000, 2000, 0, 0)


class SlowStore(TraceStore):
    """A collector that takes 50 ms over each batch."""

    def add(self, spans: Iterable[SpanRecord]) -> None:
        time.sleep(0.05)
        super().add(spans)


async def test_a_burst_of_20000_spans_arrives_at_a_slow_collector_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    async with OtlpReceiver(store=SlowStore()) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        configure()
        with observability.span("root") as root:
            started = [observability.start_span("one of many", attributes={"number": n}) for n in range(19_999)]
            for span in started:
                span.end()
        assert await asyncio.to_thread(observability.flush, 60)
        assert observability.export_counts() == ExportCounts(ended=20_000, exported=20_000, failed=0, dropped=0)
        arrived = receiver.store.trace(root.trace_id)
        assert {span.attributes["number"] for span in arrived if span.parent_id} == set(range(19_999))


@pytest.mark.parametrize("collector", ["dead_endpoint", "deaf_endpoint"])
def test_a_collector_that_is_away_neither_blocks_nor_raises_and_is_reported_once(
    collector: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", request.getfixturevalue(collector))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "4")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    configure()
    slowest = 0.0
    for _ in range(3000):
        began = time.perf_counter()
        with observability.span("lost"):
            pass
        slowest = max(slowest, time.perf_counter() - began)
    assert slowest < 0.8  # an attempt to export blocks for 4 s
    began = time.perf_counter()
    assert not observability.flush(0.1)
    assert time.perf_counter() - began < 0.5
    while (counts := observability.export_counts()) and not counts.failed:
        time.sleep(0.02)
    began = time.perf_counter()
    observability.shutdown(timeout_s=0.2)
    assert time.perf_counter() - began < 1.0
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in warnings] == ["observability.span_export"]
    assert "not arriving" in warnings[0].getMessage()


def test_a_process_with_a_dead_collector_ends_soon_and_says_one_line(dead_endpoint: str) -> None:
    program = (
        "import observability as o; o.configure_logging('INFO')\n"
        "o.configure('dying', instance_id='1', service_version='1')\n"
        "for _ in range(600):\n"
        "  with o.span('lost'): pass\n"
    )
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": dead_endpoint}
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert time.perf_counter() - began < 8
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert "WARNING dying observability.span_export spans are not arriving" in line


def test_a_full_queue_drops_spans_and_says_so_once(
    deaf_endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", deaf_endpoint)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "600")
    configure()
    for _ in range(3000):
        with observability.span("one of many"):
            pass
    counts = observability.export_counts()
    assert counts is not None
    # What isn't dropped waits in the queue, or is in the one batch that the collector was sent.
    assert counts.dropped in (3000 - 600, 3000 - 600 - DEFAULT_MAX_BATCH_SIZE)
    observability.shutdown(timeout_s=0.1)
    messages = [record.getMessage() for record in caplog.records]
    assert len([message for message in messages if "Queue full" in message]) == 1
    assert "the collector didn't answer before the shutdown's time limit" in messages[-1]


@pytest.mark.parametrize(
    "unset",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
    ],
)
async def test_tracing_that_is_off_exports_nothing_and_records_nothing(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, unset: dict[str, str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    for name, value in unset.items():
        monkeypatch.setenv(name, value)
    configure()
    headers: dict[str, str] = {}
    with observability.span("off", attributes={"a": 1}) as off, observability.span("inner", parent=off):
        off.set({"b": 2})
        off.fail("nothing")
        observability.inject(headers)
        observability.start_span("loose").end()
    assert not off.is_recording
    assert (off.trace_id, off.span_id, observability.current_trace_id()) == ("", "", "")
    assert headers == {}
    assert not observability.is_tracing()
    assert observability.export_counts() is None
    assert observability.flush()
    assert receiver.store.num_spans == 0


def test_tracing_that_is_off_costs_next_to_nothing() -> None:
    began = time.process_time()
    for _ in range(20_000):
        with observability.span("off"):
            pass
    assert (time.process_time() - began) / 20_000 < 10e-6


async def test_the_traces_endpoint_wins_over_the_general_one(
    receiver: OtlpReceiver, dead_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", dead_endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.endpoint)
    configure()
    with observability.span("one"):
        pass
    assert observability.flush()
    assert receiver.store.num_spans == 1


async def test_the_sampler_of_the_environment_decides_and_children_follow_their_parent(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    configure()
    headers: dict[str, str] = {}
    with observability.span("not sampled") as root:
        observability.inject(headers)
        assert root.trace_id == ""
    assert headers["traceparent"].endswith(("-00", "-02"))
    with observability.span("follows", parent=observability.extract(headers)):
        pass
    sampled = observability.extract({"traceparent": f"00-{1:032x}-{1:016x}-01"})
    with observability.span("sampled upstream", parent=sampled):
        pass
    assert observability.flush()
    assert [span.name for span in receiver.store.trace(f"{1:032x}")] == ["sampled upstream"]
    assert receiver.store.num_spans == 1


@pytest.mark.parametrize("value", ["many", "0", "-5", "1.5"])
def test_a_bad_number_is_warned_of_by_name_and_ignored(
    value: str, dead_endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", dead_endpoint)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", value)
    configure()
    assert f"OTEL_BSP_MAX_QUEUE_SIZE must be a positive integer, not {value!r}" in caplog.text
    assert str(DEFAULT_MAX_QUEUE_SIZE) in caplog.text


async def test_a_queue_smaller_than_a_batch_is_taken_as_it_is(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "5")
    configure()
    with observability.span("one"):
        pass
    assert observability.flush(5)
    assert receiver.store.num_spans == 1


def test_a_bad_exporter_variable_is_an_error_that_names_it(dead_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", dead_endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "zip")
    with pytest.raises(ValueError, match=r"OTEL_EXPORTER_OTLP_\*.*zip"):
        configure()
    assert not observability.is_tracing()
