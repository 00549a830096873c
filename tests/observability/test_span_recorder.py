"""The spans of this process as tests look at them: beside an export, without one, and whoever turns it on or off."""

import asyncio

import pytest

import observability
from observability import OtlpReceiver, SpanKind, SpanRecorder, tracing


def test_spans_are_recorded_without_any_set_up_and_not_afterwards() -> None:
    with SpanRecorder() as spans:
        assert observability.is_tracing()
        with observability.span("outer", kind=SpanKind.SERVER, attributes={"count": 3}):
            observability.start_span("inner").end()
        observability.start_span("other").end()
    assert not observability.is_tracing()
    observability.start_span("after").end()
    assert [span.name for span in spans.spans] == ["inner", "outer", "other"]
    outer = spans.one("outer")
    assert (outer.kind, outer.attributes, spans.one("inner").parent_id) == ("server", {"count": 3}, outer.span_id)
    assert [(depth, span.name) for depth, span in spans.tree()] == [(0, "outer"), (1, "inner"), (0, "other")]
    assert [span.name for span in spans.roots()] == ["outer", "other"]
    assert spans.orphans() == []


def test_a_span_whose_parent_is_elsewhere_is_an_orphan() -> None:
    headers = {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-00"}  # not sampled by its sender
    with SpanRecorder() as spans, observability.span("here", parent=observability.extract(headers)):
        pass
    assert [span.name for span in spans.orphans()] == ["here"]


def test_one_span_is_one_or_an_error_that_names_those_there_are() -> None:
    with SpanRecorder() as spans:
        with pytest.raises(LookupError, match="0 spans are called 'a', not one; there are none"):
            spans.one("a")
        for name in ("b", "b", "c"):
            observability.start_span(name).end()
        with pytest.raises(LookupError, match="2 spans are called 'b', not one; there are 'b', 'c'"):
            spans.one("b")
        assert len(spans.named("b")) == 2
        spans.clear()
        assert spans.spans == []


async def test_a_span_of_later_is_waited_for() -> None:
    async def later() -> None:
        await asyncio.sleep(0.02)
        observability.start_span("late").end()

    with SpanRecorder() as spans:
        task = asyncio.create_task(later())
        assert [span.name for span in await spans.wait_for("late")] == ["late"]
        with pytest.raises(TimeoutError, match=r"no 2 spans called 'late' within 0\.02 s; there are 'late'"):
            await spans.wait_for("late", 0.02, count=2)
        await task


async def test_an_export_goes_on_beside_it_and_after_it(traced: OtlpReceiver) -> None:
    with SpanRecorder() as spans:
        observability.start_span("during").end()
    observability.start_span("after").end()
    assert observability.flush(5)
    exported = [span for trace_id in traced.store.trace_ids() for span in traced.store.trace(trace_id)]
    assert {span.name for span in exported} == {"during", "after"}
    assert {span.service for span in exported} == {"frontend"}
    assert spans.one("during") == next(span for span in exported if span.name == "during")


def test_it_goes_on_when_tracing_is_configured_or_shut_down_meanwhile() -> None:
    with SpanRecorder() as spans:
        observability.configure("worker", instance_id="worker-1", service_version="1")
        observability.start_span("configured").end()
        observability.shutdown()
        observability.start_span("shut down").end()
    assert spans.one("configured").service == "worker"
    assert len(spans.spans) == 2
    assert not observability.is_tracing()


def test_several_recorders_see_the_same() -> None:
    with SpanRecorder() as outer:
        with SpanRecorder() as inner:
            observability.start_span("both").end()
        observability.start_span("one").end()
    assert [span.name for span in inner.spans] == ["both"]
    assert [span.name for span in outer.spans] == ["both", "one"]
    assert tracing._listeners == []


def test_the_oldest_spans_go_first() -> None:
    with SpanRecorder(max_spans=2) as spans:
        for name in "abc":
            observability.start_span(name).end()
    assert [span.name for span in spans.spans] == ["b", "c"]


def test_a_disabled_sdk_is_an_error_and_no_empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with pytest.raises(ValueError, match="OTEL_SDK_DISABLED"):
        SpanRecorder()
