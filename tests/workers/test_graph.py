import asyncio
import json
import os
import secrets
import signal
import urllib.request
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from bus import Bus, RemoteFault
from observability.propagation import extract
from observability.tracing import span
from schemas.generate import GenerateChunk, GenerateDone, GenerateRequest
from schemas.traces import TraceReply, TraceRequest
from tests.graph_fixture import RunningGraph, ask, client_config, image_turn, post, sample, user
from workers.models.packaged import digits_path

CONFIG: dict[str, Any] = json.loads(Path(digits_path(), "config.json").read_text())
FLOAT32_BYTES = 4


def kv_bytes(num_tokens: int) -> int:
    """What the keys and values of a prompt hold, from the checkpoint's config alone."""
    text = CONFIG["text_config"]
    return int(
        text["num_hidden_layers"] * 2 * text["num_key_value_heads"] * text["head_dim"] * FLOAT32_BYTES * num_tokens
    )


def embedding_bytes(num_images: int) -> int:
    """What the embeddings of images hold: one per patch, the class token is dropped."""
    vision, text = CONFIG["vision_config"], CONFIG["text_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return int(patches * text["hidden_size"] * FLOAT32_BYTES * num_images)


async def spans_of(bus: Bus, trace_id: str) -> list[dict[str, Any]]:
    reply = await bus.request(
        bus.subjects.worker("traces", "trace"), TraceRequest(trace_id=trace_id), TraceReply, timeout_s=15
    )
    return reply.spans


async def test_a_picture_is_answered_and_its_ledger_adds_up(graph: RunningGraph) -> None:
    async with Bus.open(client_config(graph), data_plane=False) as bus:
        answer = await ask(bus, "What digit is this?", [sample(7)])
    assert "7" in answer.text
    done = answer.done
    assert done.finish_reason == "stop"
    assert done.usage.completion_tokens == len(answer.token_ids)
    assert done.elapsed_ms == pytest.approx(sum(hop.ms for hop in done.ledger), abs=0.05)
    assert [hop.name for hop in done.ledger] == [
        "processor",
        "bus processor->decode",
        "bus decode->prefill",
        "bus prefill->encode",
        "encode",
        "embeddings encode->prefill",
        "prefill",
        "kv prefill->decode",
        "decode",
    ]
    assert all(hop.ms >= 0 for hop in done.ledger)


@pytest.mark.parametrize(
    ("images", "prompt"), [(1, "What digit is this?"), (2, "Which digits are these?"), (0, "hello")]
)
async def test_the_bytes_of_the_transfers_are_what_the_tensors_hold(
    graph: RunningGraph, images: int, prompt: str
) -> None:
    async with Bus.open(client_config(graph), data_plane=False) as bus:
        answer = await ask(bus, prompt, [sample(3), sample(7)][:images])
        spans = await spans_of(bus, answer.done.trace_id)
    writes = {span["service"]: span["attributes"]["nixl.bytes"] for span in spans if span["name"] == "nixl.write"}
    expected = {"prefill": kv_bytes(answer.done.usage.prompt_tokens)}
    if images:
        expected["encode"] = embedding_bytes(images)
    assert writes == expected
    ledger = {hop.name: hop.bytes for hop in answer.done.ledger}
    assert ledger["kv prefill->decode"] == expected["prefill"]


async def test_tensors_do_not_travel_over_nats(graph: RunningGraph) -> None:
    async with Bus.open(client_config(graph), data_plane=False) as bus:
        prompt = "the " * 380
        await ask(bus, prompt, [sample(0)], max_tokens=8)
        before = graph.counted_bytes()
        answer = await ask(bus, prompt, [sample(0)], max_tokens=8)
        over_nats = graph.counted_bytes() - before
    num_tokens = answer.done.usage.prompt_tokens
    assert num_tokens >= 400
    assert 0 < over_nats < (kv_bytes(num_tokens) + embedding_bytes(1)) / 10


async def test_the_trace_of_a_request_is_the_documented_tree(graph: RunningGraph) -> None:
    body = {"messages": [image_turn(7)], "max_tokens": 16}
    status, headers, answer = await asyncio.to_thread(post, graph.http_url, body)
    assert status == 200
    async with Bus.open(client_config(graph), data_plane=False) as bus:
        spans = await spans_of(bus, json.loads(answer)["nixlbus"]["trace_id"])
    assert headers["x-trace-id"] == spans[0]["trace_id"]
    by_id = {span["span_id"]: span for span in spans}
    edges = {
        (_label(span), _label(by_id[span["parent_id"]]) if span["parent_id"] else "")
        for span in spans
        if not span["parent_id"] or span["parent_id"] in by_id
    }
    assert edges == {
        ("frontend POST /v1/chat/completions server", ""),
        ("frontend send graph.vlm.generate producer", "frontend POST /v1/chat/completions server"),
        ("processor process graph.vlm.generate consumer", "frontend send graph.vlm.generate producer"),
        ("processor send graph.vlm.decode producer", "processor process graph.vlm.generate consumer"),
        ("decode process graph.vlm.decode consumer", "processor send graph.vlm.decode producer"),
        ("decode kv.writable internal", "decode process graph.vlm.decode consumer"),
        ("decode send graph.vlm.prefill producer", "decode process graph.vlm.decode consumer"),
        ("prefill process graph.vlm.prefill consumer", "decode send graph.vlm.prefill producer"),
        ("prefill embeddings.writable internal", "prefill process graph.vlm.prefill consumer"),
        ("prefill send graph.vlm.encode producer", "prefill process graph.vlm.prefill consumer"),
        ("encode process graph.vlm.encode consumer", "prefill send graph.vlm.encode producer"),
        ("encode model.encode internal", "encode process graph.vlm.encode consumer"),
        ("encode nixl.write internal", "encode process graph.vlm.encode consumer"),
        ("prefill model.prefill internal", "prefill process graph.vlm.prefill consumer"),
        ("prefill nixl.write internal", "prefill process graph.vlm.prefill consumer"),
        ("decode model.decode internal", "decode process graph.vlm.decode consumer"),
    }
    assert len(spans) == len(edges)
    waits = {span["service"]: span["links"] for span in spans if span["name"].endswith(".writable")}
    writes = {span["service"]: span["span_id"] for span in spans if span["name"] == "nixl.write"}
    assert [link["span_id"] for link in waits["decode"]] == [writes["prefill"]]
    assert [link["span_id"] for link in waits["prefill"]] == [writes["encode"]]
    assert all(span["status"] != "error" for span in spans)
    assert not any(_secret(span["attributes"]) for span in spans)


async def test_requests_at_once_keep_their_traces_and_answers_apart(graph: RunningGraph) -> None:
    digits = [0, 3, 4, 7] * 8
    async with Bus.open(client_config(graph), data_plane=False) as bus:
        answers = await asyncio.gather(*(ask(bus, "What digit is this?", [sample(digit)]) for digit in digits))
        assert [str(digit) in answer.text for digit, answer in zip(digits, answers, strict=True)] == [True] * 32
        assert len({answer.done.trace_id for answer in answers}) == 32
        for answer in answers[:4]:
            spans = await spans_of(bus, answer.done.trace_id)
            ids = {span["span_id"] for span in spans}
            assert len(spans) == 14
            assert sum(span["parent_id"] not in ids for span in spans) == 1


async def test_http_streams_the_answer_as_openai_clients_expect_it(graph: RunningGraph) -> None:
    body = {
        "model": "digits",
        "messages": [image_turn(4)],
        "stream": True,
        "stream_options": {"include_usage": True},
        "unknown_field": 1,
    }
    status, headers, answer = await asyncio.to_thread(post, graph.http_url, body)
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
    assert "4" in text
    assert [event["choices"][0]["finish_reason"] for event in events if event["choices"]][-1] == "stop"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] > 0
    assert len({event["id"] for event in events}) == 1


async def test_http_ready_and_models_tell_the_graph(graph: RunningGraph) -> None:
    def get(path: str) -> Any:
        with urllib.request.urlopen(f"{graph.http_url}{path}", timeout=5) as response:
            return json.load(response)

    assert (await asyncio.to_thread(get, "/ready"))["status"] == "ready"
    assert [model["id"] for model in (await asyncio.to_thread(get, "/v1/models"))["data"]] == ["digits"]


def _label(span: dict[str, Any]) -> str:
    return f"{span['service']} {span['name']} {span['kind']}"


def _secret(attributes: dict[str, Any]) -> bool:
    return any(
        "token" in name and "usage" not in name and "model." not in name for name in attributes if "nixl" in name
    )


async def test_a_stream_that_nobody_reads_any_further_ends_every_stage_behind_it(graph: RunningGraph) -> None:
    async with Bus.open(client_config(graph), data_plane=False) as bus:
        request = GenerateRequest(messages=[user("hello")], max_tokens=900, ignore_eos=True)
        trace_id = secrets.token_hex(16)
        with span("root", parent=extract({"traceparent": f"00-{trace_id}-{'1' * 16}-01"})):
            frames = bus.stream(
                bus.subjects.graph("vlm", "generate"), request, GenerateChunk, GenerateDone, timeout_s=30
            )
            async with aclosing(frames):
                assert [(await anext(frames)).seq for _ in range(5)] == [0, 1, 2, 3, 4]
        ended = await cancelled_spans(bus, trace_id)
        assert {"process graph.vlm.generate", "process graph.vlm.decode"} <= ended
        assert (await ask(bus, "What digit is this?", [sample(3)])).text == "This is the digit 3."


async def test_an_http_client_that_goes_away_ends_every_stage_behind_it(graph: RunningGraph) -> None:
    encode_pid, trace_id = graph.worker_pids()["encode"], secrets.token_hex(16)
    body = json.dumps({"messages": [image_turn(7)], "max_tokens": 16}).encode()
    host, port = graph.http_url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\ntraceparent: 00-{trace_id}-{'1' * 16}-01\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    os.kill(encode_pid, signal.SIGSTOP)
    try:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + body)
        await writer.drain()
        await asyncio.sleep(0.5)  # until prefill waits for encode
        writer.close()
        async with Bus.open(client_config(graph), data_plane=False) as bus:
            ended = await cancelled_spans(bus, trace_id)
    finally:
        os.kill(encode_pid, signal.SIGCONT)
    assert {f"process graph.vlm.{stage}" for stage in ("generate", "decode", "prefill")} <= ended
    async with Bus.open(client_config(graph), data_plane=False) as bus:
        assert (await ask(bus, "What digit is this?", [sample(3)])).text == "This is the digit 3."


async def cancelled_spans(bus: Bus, trace_id: str) -> set[str]:
    """Names of the spans of a trace that ended with a cancellation, once there are no more of them."""
    async with asyncio.timeout(20):
        while True:
            with suppress(RemoteFault):
                ended = [s for s in await spans_of(bus, trace_id) if s["attributes"].get("error.type") == "cancelled"]
                if len(ended) > 3:
                    return {each["name"] for each in ended}
            await asyncio.sleep(0.2)
