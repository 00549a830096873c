"""A trace across messages: round trips, pass-through, and whatever a peer may send."""

import asyncio
import json
import logging
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import observability
from observability import OtlpReceiver
from observability.propagation import header_lines, span_context_of

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


async def test_what_is_injected_is_extracted_as_the_same_span(traced: OtlpReceiver) -> None:
    headers = {"Nixlbus-Protocol": "1"}
    with observability.span("root") as root:
        observability.inject(headers)
        assert observability.traceparent(root) == headers["traceparent"]
    parent = observability.extract(headers)
    assert parent == root.context
    assert parent
    assert (parent.trace_id, parent.span_id, parent.is_sampled) == (root.trace_id, root.span_id, True)
    assert observability.extract({"traceparent": observability.traceparent(root.context)}) == parent
    assert set(headers) == {"Nixlbus-Protocol", "traceparent"}


async def test_header_lines_are_what_inject_writes(traced: OtlpReceiver) -> None:
    came = {"traceparent": PARENT, "tracestate": "vendor=a1", "baggage": "user=alice"}
    parents = [observability.extract(headers) for headers in ({"traceparent": PARENT}, came)]
    for parent in [None, *parents]:
        with observability.span("recorded", parent=parent) as recorded:
            injected: dict[str, str] = {}
            observability.inject(injected, recorded)
            assert header_lines(recorded) == "".join(f"{name}: {value}\r\n" for name, value in injected.items())
    observability.shutdown()
    for headers, parent in zip(({"traceparent": PARENT}, came), parents, strict=True):
        with observability.span("passing through", parent=parent) as passing:
            assert header_lines(passing) == "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with observability.span("none") as none:
        assert header_lines(none) == ""


@pytest.mark.parametrize(
    "header", [PARENT, f" {PARENT}", PARENT.upper(), "", "ff" + PARENT[2:], f"cc{PARENT[2:]}-more"]
)
def test_a_traceparent_alone_is_read_as_among_headers(header: str) -> None:
    assert span_context_of(header) == observability.extract({"traceparent": header})


async def test_a_given_span_is_injected_rather_than_the_current_one(traced: OtlpReceiver) -> None:
    headers: dict[str, str] = {}
    with observability.span("other") as other, observability.span("current"):
        observability.inject(headers, other)
    assert observability.extract(headers) == other.context


@pytest.mark.parametrize("name", ["traceparent", "Traceparent", "TRACEPARENT", "traceParent"])
def test_header_names_are_matched_whatever_their_case(name: str) -> None:
    parent = observability.extract({"other": "x", name: f" {PARENT}\t"})
    assert parent is not None
    assert (parent.trace_id, parent.span_id) == ("a" * 32, "b" * 16)


async def test_tracestate_and_baggage_travel_through_a_process(traced: OtlpReceiver) -> None:
    headers = {"traceparent": PARENT, "TraceState": "vendor=a1,tenant@system=b:2", "Baggage": "user=alice,plan=a%20b"}
    onward: dict[str, str] = {}
    with observability.span("middle", parent=observability.extract(headers)), observability.span("send"):
        observability.inject(onward)
    assert onward["tracestate"] == "vendor=a1,tenant@system=b:2"
    assert sorted(onward["baggage"].split(",")) == ["plan=a+b", "user=alice"]
    assert onward["traceparent"].split("-")[1] == "a" * 32
    assert onward["traceparent"].split("-")[2] != "b" * 16


def test_a_process_with_tracing_off_passes_the_trace_of_its_caller_through() -> None:
    headers = {"traceparent": PARENT, "tracestate": "vendor=a1", "baggage": "user=alice"}
    onward: dict[str, str] = {}
    with observability.span("middle", parent=observability.extract(headers)) as middle:
        with observability.span("send") as send:
            observability.inject(onward)
        assert middle.trace_id == send.trace_id == ""
    assert onward == headers
    after: dict[str, str] = {}
    observability.inject(after)
    assert after == {}


@pytest.mark.parametrize(
    "header",
    [
        "",
        "garbage",
        PARENT[:-1],
        PARENT + "-extra",
        PARENT.upper(),
        PARENT.replace("a" * 32, "0" * 32),
        PARENT.replace("b" * 16, "0" * 16),
        "ff" + PARENT[2:],
        PARENT + "\n",
        "\N{ARABIC-INDIC DIGIT ZERO}" * 2 + PARENT[2:],
    ],
)
def test_a_malformed_traceparent_counts_as_none(header: str) -> None:
    assert observability.extract({"traceparent": header}) is None


def test_a_later_version_of_traceparent_is_read_as_this_one() -> None:
    parent = observability.extract({"traceparent": f"cc{PARENT[2:]}-what-comes-later"})
    assert parent is not None
    assert parent.span_id == "b" * 16


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tracestate", "no-equals-sign"),
        ("tracestate", "a=1,a=2"),
        ("tracestate", ",".join(f"k{number}=1" for number in range(33))),
        ("tracestate", "a=" + "x" * 600),
        ("baggage", "no-equals-sign"),
        ("baggage", "user=a\nb"),
        ("baggage", "user=" + "x" * 9000),
        ("baggage", ",".join(f"k{number}=1" for number in range(181))),
    ],
)
def test_a_malformed_companion_is_left_out_alone_and_quietly(
    name: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    onward: dict[str, str] = {}
    with observability.span("middle", parent=observability.extract({"traceparent": PARENT, name: value})):
        observability.inject(onward)
    assert onward == {"traceparent": PARENT}
    assert caplog.records == []


def test_no_headers_are_no_parent() -> None:
    assert observability.extract(None) is None
    assert observability.extract({}) is None


# Hypothesis builds its table of characters at the first text: seconds, in a fresh checkout.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["traceparent", "TraceState", "baggage", "x"]), st.text() | st.just(PARENT)))
def test_arbitrary_headers_never_raise_and_never_break_what_is_sent_on(headers: dict[str, str]) -> None:
    onward: dict[str, str] = {}
    with observability.span("middle", parent=observability.extract(headers)):
        observability.inject(onward)
    if headers.get("traceparent") == PARENT:
        assert onward["traceparent"] == PARENT
    assert all("\n" not in value and "\r" not in value for value in onward.values())


MEMBER = st.from_regex(r"[a-z][a-z0-9]{0,5}=[ -~]{0,8}", fullmatch=True)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {
            "traceparent": st.just(PARENT),
            "tracestate": st.lists(MEMBER).map(",".join),
            "baggage": st.lists(MEMBER).map(",".join),
        }
    )
)
def test_nearly_right_companions_neither_raise_nor_log(headers: dict[str, str]) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logging.getLogger().addHandler(handler)
    try:
        onward: dict[str, str] = {}
        with observability.span("middle", parent=observability.extract(headers)):
            observability.inject(onward)
    finally:
        logging.getLogger().removeHandler(handler)
    assert onward["traceparent"] == PARENT
    assert records == []


ANSWERING = """
import json, sys, observability as o
o.configure("answering", instance_id="1", service_version="1")
headers = json.loads(sys.argv[1])
with o.span("process", kind=o.SpanKind.CONSUMER, parent=o.extract(headers)):
    with o.span("work"):
        pass
"""


def answer_in_another_process(headers: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ANSWERING, json.dumps(headers)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)


async def test_two_processes_make_one_trace_without_an_orphan(traced: OtlpReceiver) -> None:
    with observability.span("root"), observability.span("send", kind=observability.SpanKind.PRODUCER) as send:
        headers: dict[str, str] = {}
        observability.inject(headers)
        ended = await asyncio.to_thread(answer_in_another_process, headers)
    assert (ended.stdout, ended.stderr) == ("", "")
    spans = await traced.store.wait_for_complete(send.trace_id, 10)
    assert observability.orphans(spans) == []
    assert [(depth, span.name, span.service) for depth, span in observability.tree(spans)] == [
        (0, "root", "frontend"),
        (1, "send", "frontend"),
        (2, "process", "answering"),
        (3, "work", "answering"),
    ]
