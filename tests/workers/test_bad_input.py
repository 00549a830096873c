import asyncio
import base64
import io
import json
import struct
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import nats
import pytest
from nats.aio.client import Client

from bus import Bus, RemoteFault
from tests.graph_fixture import NIXLBUS, RunningGraph, ask, client_config, post, sample

SUBJECT = "nixlbus.v1.graph.vlm.generate"
PROMPTLY_S = 1.0


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_png() -> bytes:
    """A PNG whose header says 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated_png() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()[:400]


def chat(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "generate.request", "messages": [{"role": "user", "content": list(parts)}], **fields}


def image(payload: bytes) -> dict[str, Any]:
    return {"type": "image", "image": payload}


TEXT = {"type": "text", "text": "What digit is this?"}
VALID = msgpack.packb(chat(TEXT))

CASES: dict[str, tuple[bytes, dict[str, str], str]] = {
    "not an image": (msgpack.packb(chat(image(b"this is no picture"), TEXT)), {}, "invalid_image"),
    "a truncated image": (msgpack.packb(chat(image(truncated_png()), TEXT)), {}, "invalid_image"),
    "an image over the limit": (msgpack.packb(chat(image(huge_png()), TEXT)), {}, "image_too_large"),
    "a prompt over the context": (
        msgpack.packb(chat({"type": "text", "text": "the " * 2000})),
        {},
        "prompt_too_long",
    ),
    "too many images": (msgpack.packb(chat(*[image(b"x")] * 65, TEXT)), {}, "invalid_prompt"),
    "an unknown message type": (msgpack.packb({"type": "generate.nonsense"}), {}, "unknown_message_type"),
    "truncated msgpack": (VALID[:-7], {}, "malformed_message"),
    "no msgpack at all": (b"\xc1\xff\x00", {}, "malformed_message"),
    "empty": (b"", {}, "malformed_message"),
    "broken JSON": (b'{"messages": [', {}, "malformed_message"),
    "a missing field": (msgpack.packb({"type": "generate.request"}), {}, "invalid_message"),
    "an ill-typed field": (msgpack.packb({"type": "generate.request", "messages": 7}), {}, "invalid_message"),
    "a bad request id": (msgpack.packb(chat(TEXT, request_id="a.b>*")), {}, "invalid_message"),
    "a wrong protocol version": (VALID, {"Nixlbus-Protocol": "99"}, "wrong_protocol"),
    "an unknown model": (msgpack.packb(chat(TEXT, model="gpt-17")), {}, "unknown_model"),
    "a deadline that is over": (VALID, {"Nixlbus-Ttl-Ms": "0"}, "deadline_exceeded"),
}


@pytest.fixture
async def client(graph: RunningGraph) -> AsyncIterator[Client]:
    connection = await nats.connect(graph.nats_url)
    yield connection
    await connection.close()


async def fault_for(client: Client, payload: bytes, headers: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    reply_subject = client.new_inbox()
    replies = await client.subscribe(reply_subject)
    await client.publish(SUBJECT, payload, reply=reply_subject, headers=headers or None)
    message = await replies.next_msg(timeout=10)
    await replies.unsubscribe()
    frame = json.loads(message.data) if message.data[:1] == b"{" else msgpack.unpackb(message.data)
    return frame, dict(message.headers or {})


@pytest.mark.parametrize("name", CASES)
async def test_bad_input_gets_a_typed_fault_promptly_and_the_next_request_works(
    graph: RunningGraph, client: Client, name: str
) -> None:
    payload, headers, code = CASES[name]
    started_s = time.monotonic()
    fault, reply_headers = await fault_for(client, payload, headers)
    assert time.monotonic() - started_s < PROMPTLY_S
    assert (fault["type"], fault["code"]) == ("fault", code)
    assert fault["message"]
    assert len(fault["trace_id"]) == 32
    assert int(reply_headers["Nats-Service-Error-Code"]) >= 400
    assert reply_headers["Nats-Service-Error"]
    assert "Traceback" not in fault["message"]
    assert "object at 0x" not in fault["message"]
    async with Bus.open(client_config(graph), data_plane=False) as bus:
        assert "7" in (await ask(bus, "What digit is this?", [sample(7)])).text


async def test_no_fault_leaves_memory_behind(graph: RunningGraph, client: Client) -> None:
    for payload, headers, _ in CASES.values():
        await fault_for(client, payload, headers)
    async with Bus.open(client_config(graph), data_plane=False) as bus:
        await asyncio.gather(*(ask(bus, "What digit is this?", [sample(3)]) for _ in range(16)))
        services = await bus.services()
    assert {service["metadata"]["role"] for service in services} >= {"processor", "decode", "prefill", "encode"}


async def test_a_fault_names_the_worker_and_the_hops_it_passed(graph: RunningGraph, client: Client) -> None:
    fault, _ = await fault_for(client, *CASES["a truncated image"][:2])
    assert fault["worker_id"].startswith("encode-")
    assert [hop.split("-")[0] for hop in fault["hops"]] == ["prefill", "decode", "processor"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_message"),
        ({"messages": []}, 400, "invalid_prompt"),
        ({"messages": [{"role": "user", "content": "hi"}], "model": "gpt-17"}, 404, "unknown_model"),
        ({"messages": [{"role": "user", "content": "hi"}], "temperature": 0.7}, 400, "unsupported"),
        ({"messages": [{"role": "user", "content": "hi"}], "n": 2}, 400, "unsupported"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, 400, "invalid_message"),
        ("image:not base64!", 400, "invalid_image"),
        ("image:" + base64.b64encode(b"no picture").decode(), 400, "invalid_image"),
        ("image:" + base64.b64encode(huge_png()).decode(), 413, "image_too_large"),
    ],
)
async def test_http_answers_bad_input_with_an_error_object(
    graph: RunningGraph, body: Any, status: int, code: str
) -> None:
    if isinstance(body, str):
        url = "data:image/png;base64," + body.removeprefix("image:")
        body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    answered, headers, answer = await asyncio.to_thread(post, graph.http_url, body)
    error = json.loads(answer)["error"]
    assert (answered, error["code"]) == (status, code)
    assert error["message"]
    assert len(headers["x-trace-id"]) == 32


async def test_a_stream_that_can_not_begin_is_an_http_error_and_no_empty_200(graph: RunningGraph) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "model": "gpt-17", "stream": True}
    status, _, _ = await asyncio.to_thread(post, graph.http_url, body)
    assert status == 404


async def test_a_missing_stage_is_told_at_once(graph: RunningGraph) -> None:
    process = await asyncio.create_subprocess_exec(
        *_worker_command(graph, "processor", "lonely"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        while json.loads(await asyncio.wait_for(process.stdout.readline(), 60))["step"] != "ready":
            pass
        async with Bus.open(client_config(graph), data_plane=False) as bus:
            started_s = time.monotonic()
            with pytest.raises(RemoteFault) as caught:
                await ask(bus, "hello", graph="lonely")
            assert time.monotonic() - started_s < PROMPTLY_S
        assert caught.value.fault.code == "no_responders"
        assert caught.value.fault.retryable
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0


def _worker_command(graph: RunningGraph, role: str, graph_name: str) -> list[str]:
    return [NIXLBUS, "worker", role, "--nats", graph.nats_url, "--graph", graph_name, "--json"]
