"""What the environment's sampler drops is never made, and the decision travels."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import Decision, _get_from_env_or_default

import observability
from observability import OtlpReceiver
from observability.sampling import HeadSampler

NAMES = [
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
]
SAMPLED, UNSAMPLED = f"00-{'a' * 32}-{'b' * 16}-01", f"00-{'a' * 32}-{'b' * 16}-00"


def configure(monkeypatch: pytest.MonkeyPatch, receiver: OtlpReceiver, sampler: str, argument: str = "") -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    observability.configure("sampling", instance_id="1", service_version="1")


@pytest.mark.parametrize("name", NAMES)
@given(
    trace_id=st.integers(1, (1 << 128) - 1),
    ratio=st.floats(0, 1),
    parent_flag=st.none() | st.booleans(),
)
def test_it_decides_as_the_sdk_does(name: str, trace_id: int, ratio: float, parent_flag: bool | None) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_TRACES_SAMPLER", name)
        environment.setenv("OTEL_TRACES_SAMPLER_ARG", str(ratio))
        ours = HeadSampler.from_environment()
        theirs = [_get_from_env_or_default(), ours.for_sdk()]
    above = None
    drops = ours.drops(trace_id)
    if parent_flag is not None:
        flags = trace.TraceFlags(int(parent_flag))
        parent = trace.NonRecordingSpan(trace.SpanContext(trace_id, 1, is_remote=True, trace_flags=flags))
        above = trace.set_span_in_context(parent)
        drops = not parent_flag if ours.follows_parent else drops
    for sampler in theirs:
        decision = sampler.should_sample(above, trace_id, "any").decision
        assert (decision is Decision.RECORD_AND_SAMPLE) is not drops


async def test_a_dropped_trace_has_one_valid_id_and_its_decision_on_all_its_hops(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, receiver, "parentbased_traceidratio", "0")
    headers: list[dict[str, str]] = [{}, {}, {}]
    with observability.span("root") as root:
        observability.inject(headers[0])
        send = observability.start_span("send")
        observability.inject(headers[1], send)
        with observability.span("process", parent=observability.extract(headers[1])):
            observability.inject(headers[2])
        assert (root.is_recording, root.trace_id, observability.traceparent(send)) == (
            False,
            "",
            headers[1]["traceparent"],
        )
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", headers[0]["traceparent"])
    assert len({each["traceparent"].split("-")[1] for each in headers}) == 1
    parents = [observability.extract(each) for each in headers]
    assert all(parent is not None and not parent.is_sampled for parent in parents)
    other: dict[str, str] = {}
    observability.inject(other, observability.start_span("another root"))
    assert other["traceparent"].split("-")[1] != headers[0]["traceparent"].split("-")[1]
    assert observability.flush()
    assert receiver.store.num_spans == 0


async def test_attributes_of_a_dropped_span_are_never_made(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, receiver, "parentbased_always_off")
    made: list[str] = []

    def attributes() -> dict[str, str]:
        made.append("made")
        return {"a": "1"}

    observability.start_span("dropped", attributes=attributes).end()
    with observability.span("dropped too", attributes=attributes):
        pass
    assert made == []
    parent = observability.extract({"traceparent": SAMPLED})
    with observability.span("recorded", parent=parent, attributes=attributes):
        pass
    assert made == ["made"]
    assert observability.flush()
    [record] = receiver.store.trace("a" * 32)
    assert (record.name, record.parent_id, record.attributes) == ("recorded", "b" * 16, {"a": "1"})


async def test_a_ratio_records_that_share_of_the_traces_and_says_so_in_their_headers(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, receiver, "parentbased_traceidratio", "0.25")
    sampled: set[str] = set()
    for _ in range(2000):
        headers: dict[str, str] = {}
        with observability.span("root"):
            observability.inject(headers)
        context = observability.extract(headers)
        assert context
        if context.is_sampled:
            sampled.add(context.trace_id)
    assert observability.flush(10)
    assert set(receiver.store.trace_ids()) == sampled
    assert 350 < len(sampled) < 650  # 500, and seven standard deviations to either side


@pytest.mark.parametrize(
    ("name", "argument"), [("always_off", ""), ("traceidratio", "0"), ("parentbased_always_on", "")]
)
async def test_a_trace_that_stops_being_recorded_here_goes_on_as_one_that_is_not(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, name: str, argument: str
) -> None:
    configure(monkeypatch, receiver, name, argument)
    is_parent_based = name.startswith("parentbased")
    onward: dict[str, str] = {}
    came = {
        "traceparent": UNSAMPLED if is_parent_based else SAMPLED,
        "tracestate": "vendor=a1",
        "baggage": "user=alice",
    }
    with observability.span("middle", parent=observability.extract(came)), observability.span("send"):
        observability.inject(onward)
    assert onward == {**came, "traceparent": UNSAMPLED}
    assert observability.flush()
    assert receiver.store.num_spans == 0


async def test_always_on_records_what_its_parent_does_not(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, receiver, "always_on")
    with observability.span("ours", parent=observability.extract({"traceparent": UNSAMPLED})):
        pass
    assert observability.flush()
    assert [record.name for record in receiver.store.trace("a" * 32)] == ["ours"]


@pytest.mark.parametrize(
    ("name", "argument", "variable", "value"),
    [
        ("jaeger_remote", "", "OTEL_TRACES_SAMPLER", "'jaeger_remote'"),
        ("parentbased_traceidratio", "a tenth", "OTEL_TRACES_SAMPLER_ARG", "'a tenth'"),
        ("traceidratio", "1.5", "OTEL_TRACES_SAMPLER_ARG", "'1.5'"),
        ("traceidratio", "nan", "OTEL_TRACES_SAMPLER_ARG", "'nan'"),
    ],
)
async def test_a_bad_sampler_is_warned_of_by_name_and_everything_is_recorded(
    receiver: OtlpReceiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    argument: str,
    variable: str,
    value: str,
) -> None:
    configure(monkeypatch, receiver, name, argument)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{variable} must be")
    assert value in warning
    with observability.span("recorded"):
        pass
    assert observability.flush()
    assert receiver.store.num_spans == 1
