"""Spans as they arrive at a collector: names, kinds, parents, links, attributes, events, errors."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import ClassVar

import pytest

import observability
from observability import ROOT, Attributes, OtlpReceiver, Span, SpanKind, SpanRecord, semantic_conventions


def arrived(receiver: OtlpReceiver) -> dict[str, SpanRecord]:
    """Flush, and return the spans of all traces by name."""
    assert observability.flush(5)
    spans = [span for trace_id in receiver.store.trace_ids() for span in receiver.store.trace(trace_id)]
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


async def test_a_span_arrives_with_its_kind_attributes_events_and_times(traced: OtlpReceiver) -> None:
    attributes: Attributes = {"text": "ä", "count": 3, "rate": 0.5, "flag": True, "list": ["a", "b"], "nothing": None}
    with observability.span("root", kind=SpanKind.SERVER, attributes=attributes) as root:
        root.set({"late": 1, "nothing": None})
        root.event("post", {"chunk": 2})
        assert root.is_recording
    [record] = arrived(traced).values()
    assert (record.name, record.kind, record.service, record.status) == (
        "root",
        "server",
        "frontend",
        "unset",
    )
    assert (record.trace_id, record.span_id, record.parent_id) == (root.trace_id, root.span_id, "")
    assert record.attributes == {
        "text": "ä",
        "count": 3,
        "rate": 0.5,
        "flag": True,
        "list": ["a", "b"],
        "late": 1,
    }
    [event] = record.events
    assert (event.name, event.attributes) == ("post", {"chunk": 2})
    assert 0 < record.start_ns <= event.time_ns <= record.end_ns


@pytest.mark.parametrize("kind", SpanKind)
async def test_every_kind_arrives_as_itself(traced: OtlpReceiver, kind: SpanKind) -> None:
    with observability.span("one", kind=kind):
        pass
    assert arrived(traced)["one"].kind == kind.value


async def test_the_current_span_is_the_parent_across_awaits_and_tasks(traced: OtlpReceiver) -> None:
    async def child(name: str) -> None:
        with observability.span(name):
            await asyncio.sleep(0.01)

    with observability.span("root") as root:
        assert observability.current_span().context == root.context
        assert observability.current_trace_id() == root.trace_id
        await asyncio.gather(child("a"), child("b"))
    assert observability.current_trace_id() == ""
    spans = arrived(traced)
    assert spans["a"].parent_id == spans["b"].parent_id == spans["root"].span_id
    assert len({span.trace_id for span in spans.values()}) == 1


async def test_a_parent_may_be_given_as_span_or_context_or_be_none(traced: OtlpReceiver) -> None:
    with observability.span("root") as root, observability.span("current"):
        observability.start_span("by span", parent=root).end()
        observability.start_span("by context", parent=root.context).end()
        observability.start_span("own trace", parent=ROOT).end()
    spans = arrived(traced)
    assert spans["by span"].parent_id == spans["by context"].parent_id == root.span_id
    assert spans["own trace"].parent_id == ""
    assert spans["own trace"].trace_id != root.trace_id


async def test_links_at_the_start_and_later_point_at_their_spans(traced: OtlpReceiver) -> None:
    with observability.span("write") as write:
        pass
    with observability.span("read") as read:
        pass
    with observability.span("wait", links=[write, ROOT]) as wait:
        wait.link(read.context)
        wait.link(ROOT)
    links = arrived(traced)["wait"].links
    assert [(link.trace_id, link.span_id) for link in links] == [
        (write.trace_id, write.span_id),
        (read.trace_id, read.span_id),
    ]


async def test_a_started_span_is_not_current_and_ends_once(traced: OtlpReceiver) -> None:
    started = observability.start_span("loose")
    assert observability.current_trace_id() == ""
    await asyncio.to_thread(started.end)
    assert not started.is_recording
    started.end(error="too late")
    started.set({"late": 1})
    started.event("late")
    started.link(started)
    started.fail("late")
    record = arrived(traced)["loose"]
    assert (record.status, record.attributes, record.events, record.links) == ("unset", {}, (), ())
    assert started.span_id == record.span_id


class PeerGoneError(Exception):
    code: ClassVar[str] = "peer_gone"


@pytest.mark.parametrize(
    ("error", "error_type"),
    [(PeerGoneError("decode-1 is gone"), "peer_gone"), (ValueError("bad\nline"), "ValueError")],
)
async def test_an_exception_that_leaves_marks_the_span_failed(
    traced: OtlpReceiver, error: Exception, error_type: str
) -> None:
    with pytest.raises(type(error)), observability.span("failing"):
        raise error
    record = arrived(traced)["failing"]
    assert (record.status, record.status_message) == ("error", str(error))
    assert record.attributes["error.type"] == error_type
    [event] = record.events
    assert event.name == "exception"
    assert event.attributes["exception.message"] == str(error)
    assert "raise error" in event.attributes["exception.stacktrace"]


async def test_a_cancelled_task_leaves_an_ended_span_of_type_cancelled(traced: OtlpReceiver) -> None:
    async def wait() -> None:
        with observability.span("waiting"):
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    record = arrived(traced)["waiting"]
    assert record.status == "error"
    assert record.attributes["error.type"] == "cancelled"


async def test_fail_and_end_with_a_text_need_no_exception(traced: OtlpReceiver) -> None:
    observability.start_span("a").end(error="no acknowledgement")
    record = arrived(traced)["a"]
    assert (record.status, record.status_message, record.events) == ("error", "no acknowledgement", ())
    assert record.attributes == {"error.type": "_OTHER"}


async def test_a_stream_closed_from_another_task_logs_nothing_and_ends_its_span(
    traced: OtlpReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    async def stream() -> AsyncIterator[int]:
        with observability.span("streaming"):
            yield 1
            yield 2

    tokens = stream()
    await asyncio.create_task(anext(tokens))  # type: ignore[arg-type]
    with caplog.at_level(logging.DEBUG):
        await asyncio.create_task(tokens.aclose())  # type: ignore[attr-defined]
    assert arrived(traced)["streaming"].attributes["error.type"] == "cancelled"
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


async def test_contexts_are_hashable_and_equal_by_ids(traced: OtlpReceiver) -> None:
    with observability.span("a") as a, observability.span("b") as b:
        assert len({a.context, a.context, b.context}) == 2
        assert a.context != b.context
        assert a.context
        assert not ROOT
        assert a.context != "a"
        assert isinstance(observability.current_span(), Span)


async def test_a_second_configure_flushes_the_first_and_takes_over(
    traced: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with observability.span("first"):
        pass
    observability.configure("second-service", instance_id="2", service_version="2")
    with observability.span("second"):
        pass
    spans = arrived(traced)
    assert spans["first"].service == "frontend"
    assert spans["second"].service == observability.service_name() == "second-service"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from-environment")
    observability.configure("third", instance_id="3", service_version="3")
    with observability.span("third"):
        pass
    assert arrived(traced)["third"].service == observability.service_name() == "from-environment"


async def test_names_of_the_conventions_are_spelt_as_the_conventions_spell_them() -> None:
    from opentelemetry.semconv import schemas
    from opentelemetry.semconv._incubating.attributes import (
        error_attributes,
        gen_ai_attributes,
        http_attributes,
        messaging_attributes,
        server_attributes,
        url_attributes,
    )
    from opentelemetry.semconv._incubating.metrics import gen_ai_metrics

    known: set[object] = set()
    for module in (
        error_attributes,
        gen_ai_attributes,
        gen_ai_metrics,
        http_attributes,
        messaging_attributes,
        server_attributes,
        url_attributes,
    ):
        known |= {value for name, value in vars(module).items() if name.isupper()}
    ours = {
        value
        for name, value in vars(semantic_conventions).items()
        if name.isupper() and "." in str(value) and name not in ("SCHEMA_URL", "SEMANTIC_CONVENTIONS_VERSION")
    }
    assert {name for name in ours if not name.startswith("nixl.")} <= known
    assert semantic_conventions.SCHEMA_URL in {member.value for member in schemas.Schemas}
