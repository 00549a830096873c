"""The receiver and its store: bounds, waiting for a whole trace, other loops, taken ports; trees of records."""

import asyncio
import json
import socket
import threading
import time
from itertools import pairwise

import msgspec
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

import observability
from observability import OtlpReceiver, ReceiverBindError, SpanRecord, TraceIncompleteError, TraceStore


def record(
    span_id: str, parent_id: str = "", *, trace_id: str = "t1", start_ns: int = 0, end_ns: int = 1
) -> SpanRecord:
    return SpanRecord(f"name of {span_id}", "internal", trace_id, span_id, parent_id, "service", start_ns, end_ns)


async def test_the_oldest_traces_are_dropped_beyond_the_bound() -> None:
    store = TraceStore(max_traces=3)
    for number in range(10):
        store.add([record("a", trace_id=f"t{number}"), record("b", "a", trace_id=f"t{number}")])
    assert store.trace_ids() == ["t7", "t8", "t9"]
    assert store.num_spans == 6
    assert store.trace("t0") == []


async def test_the_number_of_spans_is_bounded_too() -> None:
    store = TraceStore(max_spans=10)
    for number in range(4):
        store.add(record(f"s{index}", trace_id=f"t{number}") for index in range(4))
    assert store.trace_ids() == ["t2", "t3"]
    assert store.num_spans == 8


async def test_a_span_sent_twice_is_kept_once() -> None:
    store = TraceStore()
    store.add([record("a"), record("a")])
    store.add([record("a")])
    assert store.num_spans == len(store.trace("t1")) == 1


async def test_the_last_trace_is_the_one_whose_root_ended_last() -> None:
    store = TraceStore()
    assert store.last_trace_id() is None
    store.add([record("a", trace_id="late", end_ns=9), record("b", trace_id="early", end_ns=5)])
    store.add([record("c", "b", trace_id="early", end_ns=20), record("d", "x", trace_id="rootless", end_ns=30)])
    assert store.last_trace_id() == "late"


async def test_waiting_ends_once_the_missing_parent_has_come_and_it_is_quiet() -> None:
    store = TraceStore()
    store.add([record("child", "root")])
    adding = threading.Timer(0.1, store.add, [[record("root")]])
    adding.start()
    began = time.monotonic()
    spans = await store.wait_for_complete("t1", 5, quiet_s=0.1)
    assert {span.span_id for span in spans} == {"root", "child"}
    assert 0.19 < time.monotonic() - began < 2
    began = time.monotonic()
    await store.wait_for_complete("t1", 5, quiet_s=0.1)
    assert time.monotonic() - began < 0.1
    adding.join()


async def test_waiting_goes_on_while_spans_are_coming() -> None:
    store = TraceStore()
    store.add([record("root")])

    async def keep_adding() -> None:
        for number in range(5):
            await asyncio.sleep(0.05)
            store.add([record(f"late{number}", "root")])

    adding = asyncio.create_task(keep_adding())
    spans = await store.wait_for_complete("t1", 5, quiet_s=0.2)
    assert len(spans) == 6
    await adding


@pytest.mark.parametrize(
    ("spans", "lack"),
    [
        ([], "no span came"),
        ([record("b", "a")], "the root is missing; parent a of 'name of b' of service is missing"),
        ([record("root"), record("c", "x")], "parent x of 'name of c' of service is missing"),
        ([record("root"), record("other")], "there are 2 roots instead of one"),
    ],
)
async def test_waiting_in_vain_says_what_is_missing(spans: list[SpanRecord], lack: str) -> None:
    store = TraceStore()
    store.add(spans)
    with pytest.raises(TimeoutError) as raised:
        await store.wait_for_complete("t1", 0.05, quiet_s=0.01)
    error = raised.value
    assert isinstance(error, TraceIncompleteError)
    assert str(error) == f"trace t1 is not complete after 0.05 s, {len(spans)} spans came: {lack}"
    assert error.missing_parent_ids == tuple(span.parent_id for span in spans if span.parent_id)


async def test_waiting_can_be_cancelled_and_leaves_nothing_behind() -> None:
    store = TraceStore()
    waiting = asyncio.create_task(store.wait_for_complete("t1", 60))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not store._wakers


def test_the_receiver_works_beside_uvloop_and_a_blocking_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        async with OtlpReceiver() as receiver:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
            observability.configure("uv", instance_id="1", service_version="1")
            with observability.span("root") as root, observability.span("child"):
                pass
            assert observability.flush(5)  # on the loop's own thread
            return len(await receiver.store.wait_for_complete(root.trace_id, 5))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == 2


async def test_a_taken_port_is_an_error_that_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ReceiverBindError, match=f"127.0.0.1:{port}: Address already in use") as raised:
            async with OtlpReceiver(port=port):
                pass
    assert (raised.value.host, raised.value.port) == ("127.0.0.1", port)


async def test_an_address_of_another_machine_is_an_error_that_says_so() -> None:
    with pytest.raises(ReceiverBindError, match=r"192\.0\.2\.1:0: Cannot assign requested address"):
        async with OtlpReceiver(host="192.0.2.1"):
            pass


async def test_a_port_is_free_again_after_the_receiver_and_its_traces_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    async with OtlpReceiver() as first:
        port = int(first.endpoint.rpartition(":")[2])
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", first.endpoint)
        observability.configure("one", instance_id="1", service_version="1")
        with observability.span("root") as root:
            pass
        observability.shutdown()
    async with OtlpReceiver(port=port) as second:
        assert second.endpoint == first.endpoint
    assert len(first.store.trace(root.trace_id)) == 1


async def test_records_are_plain_json_and_can_be_read_back(traced: OtlpReceiver) -> None:
    with observability.span("a", attributes={"not a number": float("nan"), "list": [1, 2]}) as span:
        span.event("e", {"x": 1})
        span.link(span)
    assert observability.flush()
    [arrived] = traced.store.trace(span.trace_id)
    text = json.dumps(arrived.to_dict(), allow_nan=False)
    assert msgspec.convert(json.loads(text), SpanRecord) == arrived
    assert arrived.attributes["not a number"] == "nan"


def test_a_tree_is_read_depth_first_in_the_order_of_starts() -> None:
    root, late, early = record("r"), record("b", "r", start_ns=5), record("a", "r", start_ns=1)
    leaf, orphan = record("c", "b", start_ns=6), record("o", "gone", start_ns=3)
    spans = [leaf, late, orphan, early, root]
    assert observability.tree(spans) == [(0, root), (1, early), (1, late), (2, leaf), (0, orphan)]
    assert observability.roots(spans) == [root]
    assert observability.orphans(spans) == [orphan]


IDS = st.sampled_from(["", "a", "b", "c", "d", "e", "f"])


@given(st.lists(st.tuples(IDS, IDS, st.integers(0, 5))))
def test_every_span_is_in_the_tree_once_whatever_the_parents(triples: list[tuple[str, str, int]]) -> None:
    spans = [record(span_id, parent_id, start_ns=start) for span_id, parent_id, start in triples]
    rows = observability.tree(spans)
    assert sorted(map(id, spans)) == sorted(id(span) for _, span in rows)
    assert not rows or rows[0][0] == 0
    assert all(below - above <= 1 for (above, _), (below, _) in pairwise(rows))
