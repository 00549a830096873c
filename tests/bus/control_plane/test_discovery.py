"""Discovery as others read it: nats-py's own types for ADR-32, and what is in the metadata besides."""

import asyncio
import json
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats

from bus import Bus, BusConfig, EndpointConfig, Frame, Message, server_binary
from bus.control_plane.discovery import MAX_SCHEMA_BYTES, MAX_SCHEMAS_BYTES
from schemas.json_schema import json_schema, schema_id, schema_text
from schemas.subjects import Subject


class Ask(Message, frozen=True, kw_only=True, tag="discovery.ask"):
    text: str = ""


class Told(Message, frozen=True, kw_only=True, tag="discovery.told"):
    text: str = ""


class Token(Frame, frozen=True, kw_only=True, tag="discovery.token"):
    text: str = ""


class Opaque(Message, frozen=True, kw_only=True, tag="discovery.opaque"):
    extension: msgspec.msgpack.Ext


async def answer(request: Ask) -> Told:
    return Told()


async def stream(request: Ask) -> AsyncGenerator[Token, None]:
    yield Token()


def config(name: str, **fields: Any) -> EndpointConfig:
    fields = {"request_type": Ask, **fields}
    return EndpointConfig(name, Subject(f"discovery.{name}", name), **fields)


async def told(raw: Client, verb: str) -> dict[str, Any]:
    reply = await raw.request(f"$SRV.{verb}.discovered", b"", timeout=5)
    found: dict[str, Any] = json.loads(reply.data)
    return found


async def announced(bus: Bus) -> None:
    await bus.announce("discovered", "1.2.3", {"role": "test"})


async def test_what_is_told_is_what_nats_py_reads(bus: Bus, raw: Client) -> None:
    await bus.serve(config("one", queue_group="q", reply_type=Told, public=True, default_ttl_s=2.5), answer)
    await announced(bus)
    ping = ServicePing.from_dict(await told(raw, "PING"))
    info = ServiceInfo.from_dict(await told(raw, "INFO"))
    stats = ServiceStats.from_dict(await told(raw, "STATS"))
    assert ping.id == info.id == stats.id == bus.worker_id
    (endpoint,) = info.endpoints
    assert (endpoint.name, endpoint.subject, endpoint.queue_group) == ("one", "discovery.one", "q")
    assert endpoint.metadata == {
        "kind": "unary",
        "request": "discovery.ask",
        "request_schema": schema_text(Ask),
        "request_schema_id": schema_id(schema_text(Ask)),
        "reply": "discovery.told",
        "reply_schema": schema_text(Told),
        "reply_schema_id": schema_id(schema_text(Told)),
        "concurrency": "16",
        "max_queued": "256",
        "timeout_ms": "2500",
        "public": "true",
    }
    assert stats.endpoints[0].data == {"refused": 0, "cancelled": 0, "active": 0, "queued": 0}
    assert set((await told(raw, "STATS"))["endpoints"][0]) == set(stats.endpoints[0].to_dict())


async def test_streams_and_events_are_told_as_what_they_are(bus: Bus, raw: Client) -> None:
    await bus.serve(config("tokens", reply_type=Token), stream)
    await bus.subscribe(Subject("discovery.event", "event"), Ask, lambda event: None)
    await announced(bus)
    tokens, event = (await told(raw, "INFO"))["endpoints"]
    assert (tokens["metadata"]["kind"], tokens["metadata"]["reply"]) == ("stream", "discovery.token,stream.end")
    assert event["metadata"]["kind"] == "event"
    assert "reply" not in event["metadata"]


async def test_an_event_and_a_stage_of_one_name_have_each_their_own_figures(bus: Bus, caller: Bus) -> None:
    heard = asyncio.Event()
    await bus.serve(config("same", reply_type=Told), answer)
    await bus.subscribe(Subject("discovery.event", "same"), Ask, lambda event: heard.set())
    await announced(bus)
    await caller.publish(Subject("discovery.event", "same"), Ask())
    await asyncio.wait_for(heard.wait(), 5)
    for _ in range(2):
        await caller.request(Subject("discovery.same", "same"), Ask(), Told, timeout_s=5)
    (service,) = [found for found in await caller.services() if found["name"] == "discovered"]
    counted = {endpoint["subject"]: endpoint["num_requests"] for endpoint in service["endpoints"]}
    assert counted == {"discovery.same": 2, "discovery.event": 1}


async def test_statistics_tell_what_runs_what_waits_and_what_was_refused(bus: Bus, caller: Bus, raw: Client) -> None:
    release = asyncio.Event()

    async def held(request: Ask) -> Told:
        await release.wait()
        return Told()

    await bus.serve(config("held", concurrency=2, max_queued=3, reply_type=Told), held)
    await announced(bus)
    subject = Subject("discovery.held", "held")
    requests = [asyncio.create_task(caller.request(subject, Ask(), Told, timeout_s=20)) for _ in range(6)]
    async with asyncio.timeout(10):
        while (await told(raw, "STATS"))["endpoints"][0]["data"]["refused"] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await told(raw, "STATS"))["endpoints"][0]["data"] == {
        "refused": 1,
        "cancelled": 0,
        "active": 2,
        "queued": 3,
    }
    release.set()
    await asyncio.gather(*requests, return_exceptions=True)
    assert (await told(raw, "STATS"))["endpoints"][0]["data"] == {
        "refused": 1,
        "cancelled": 0,
        "active": 0,
        "queued": 0,
    }


def wide(name: str, num_fields: int) -> Any:
    fields: list[Any] = [(f"{name}_field_number_{number}", int) for number in range(num_fields)]
    return msgspec.defstruct(name, fields, bases=(Message,), tag=name, frozen=True, kw_only=True)


async def test_a_long_schema_is_left_out_and_its_id_stays(bus: Bus, raw: Client) -> None:
    long = wide("Long", 200)
    assert len(schema_text(long)) > MAX_SCHEMA_BYTES
    await bus.serve(config("long", request_type=long), answer)
    await announced(bus)
    metadata = (await told(raw, "INFO"))["endpoints"][0]["metadata"]
    assert metadata["request_schema_id"] == schema_id(schema_text(long))
    assert "request_schema" not in metadata


async def test_an_answer_stays_small_however_many_endpoints_there_are(bus: Bus, raw: Client) -> None:
    for number in range(20):
        await bus.serve(config(f"e{number}", request_type=wide(f"Message{number}", 80)), answer)
    await announced(bus)
    reply = await raw.request("$SRV.INFO.discovered", b"", timeout=5)
    endpoints = json.loads(reply.data)["endpoints"]
    with_schema = ["request_schema" in endpoint["metadata"] for endpoint in endpoints]
    assert any(with_schema)
    assert not all(with_schema)
    assert all("request_schema_id" in endpoint["metadata"] for endpoint in endpoints)
    assert len(reply.data) < 2 * MAX_SCHEMAS_BYTES


async def test_a_message_without_a_counterpart_in_json_is_told_by_its_tag(bus: Bus, raw: Client) -> None:
    with pytest.raises(TypeError):
        json_schema(Opaque)
    await bus.serve(config("opaque", request_type=Opaque), answer)
    await announced(bus)
    metadata = (await told(raw, "INFO"))["endpoints"][0]["metadata"]
    assert metadata["request"] == "discovery.opaque"
    assert not {"request_schema", "request_schema_id"} & set(metadata)


async def test_an_answer_fits_the_payload_of_a_small_server(tmp_path: Path) -> None:
    process = subprocess.Popen(  # noqa: ASYNC220
        [server_binary(), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(tmp_path), "-c", "small.conf"],
        cwd=_with_conf(tmp_path, "max_payload: 8192\n"),
        stderr=subprocess.DEVNULL,
    )
    try:
        ports = tmp_path / f"nats-server_{process.pid}.ports"
        async with asyncio.timeout(10):
            while not ports.exists() or not ports.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        (url,) = json.loads(ports.read_text())["nats"]
        async with Bus.open(BusConfig(worker_id="small", nats_url=url), data_plane=False) as bus:
            for number in range(4):
                await bus.serve(config(f"e{number}", request_type=wide(f"Message{number}", 50)), answer)
            await announced(bus)
            (service,) = await bus.services()
    finally:
        process.terminate()
        process.wait(5)
    assert [e["name"] for e in service["endpoints"] if "request_schema_id" in e["metadata"]] == ["e0", "e1", "e2", "e3"]


def _with_conf(folder: Path, text: str) -> Path:
    (folder / "small.conf").write_text(text)
    return folder


FOREIGN: list[Any] = [
    {"id": 1, "name": "discovered", "metadata": {"nixlbus": "1"}},
    {"id": [], "name": "x", "metadata": {"nixlbus": "1"}},
    {"id": "q", "name": "other", "metadata": None},
    {"id": "q", "name": "other", "metadata": ["nixlbus"]},
    {"id": "q", "name": None, "metadata": {"nixlbus": "1"}},
    {"id": "q", "name": "other", "metadata": {"nixlbus": 2}},
    {"id": "q", "name": "other", "metadata": {"nixlbus": "1"}, "endpoints": None, "started": 7},
    {"id": "q", "name": "other", "metadata": {"nixlbus": "1"}, "endpoints": [3]},
    {"id": "q", "name": "other", "metadata": {"nixlbus": "1"}, "endpoints": [{"name": "e", "num_requests": "many"}]},
    {"id": "q", "name": "other", "metadata": {"nixlbus": "1"}, "version": {}, "endpoints": {}, "started": []},
    {"id": "nats", "name": "a-service-of-nats", "version": "1.0.0", "metadata": {}},
    [],
    None,
    "text",
]


async def answering(raw: Client, payloads: list[bytes]) -> None:
    async def reply(message: Any) -> None:
        for payload in payloads:
            await message.respond(payload)

    for verb in ("INFO", "STATS"):
        await raw.subscribe(f"$SRV.{verb}", cb=reply)
    for _ in range(2):  # after one, a request of another connection may still not find them
        await raw.flush()


async def test_what_other_services_answer_is_left_out_whatever_it_is(bus: Bus, caller: Bus, raw: Client) -> None:
    await bus.serve(config("one", reply_type=Told), answer)
    await announced(bus)
    await caller.request(Subject("discovery.one", "one"), Ask(), Told, timeout_s=5)
    payloads = [json.dumps(each).encode() for each in FOREIGN]
    await answering(raw, [*payloads, b"", b"{", b'"\xff"', b"[" * 100_000])
    (service,) = await caller.services()
    (endpoint,) = service["endpoints"]
    assert (service["id"], endpoint["num_requests"], endpoint["metadata"]["kind"]) == (bus.worker_id, 1, "unary")


async def test_a_worker_that_answers_twice_is_listed_once_with_its_first_answer(caller: Bus, raw: Client) -> None:
    told: dict[str, Any] = {"name": "other", "id": "twice", "metadata": {"nixlbus": "1"}, "of": "later"}
    endpoint = {"name": "e", "subject": "s", "num_requests": 3, "data": {"active": 1}, "average_processing_time": 5}
    first, second = {**told, "endpoints": [endpoint], "started": "then"}, {**told, "endpoints": [], "started": "now"}
    await answering(raw, [json.dumps(each).encode() for each in (first, second)])
    (service,) = await caller.services()
    assert (service["started"], service["version"], service["of"]) == ("then", "", "later")
    (listed,) = service["endpoints"]
    assert listed == {**endpoint, "queue_group": "", "metadata": {}, "num_errors": 0, "processing_time": 0}
