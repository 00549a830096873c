"""The document of every subject: of the packaged graph, of classes, of live workers."""

import inspect
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from bus import BusConfig, EmbeddedServer, Frame, Message, bus_channels
from schemas.asyncapi import document
from schemas.codec import Encoding, encode
from schemas.subjects import Subjects
from tests.schemas.every_message import EXAMPLES
from tests.schemas.test_asyncapi import check, payload_validator
from workers import Worker, endpoint, on_event
from workers.channels import class_channels, live_channels
from workers.roles import role_class, role_names


class Count(Message, frozen=True, kw_only=True, tag="channels.count"):
    to: int


class Number(Frame, frozen=True, kw_only=True, tag="channels.number"):
    number: int


class Counted(Message, frozen=True, kw_only=True, tag="channels.counted"):
    total: int = 0


class Counter(Worker):
    group = "numbers"

    @endpoint(concurrency=3, timeout_s=1.5)
    async def total(self, request: Count) -> Counted:
        """Add them up.

        All of them.
        """
        return Counted(total=sum(range(request.to)))

    @endpoint(queue_group="counters", public=True)
    async def count(self, request: Count) -> AsyncGenerator[Number, None]:
        for number in range(request.to):
            yield Number(number=number)

    @endpoint("mine", direct=True)
    async def own(self, request: Count) -> Counted:
        return Counted()

    @on_event("counted", queue_group="listeners")
    async def heard(self, event: Counted) -> None:
        """Somebody counted."""


@pytest.fixture(scope="module")
def packaged() -> dict[str, Any]:
    subjects = Subjects()
    roles = [role_class(name) for name in role_names()]
    channels = [channel for role in roles for channel in class_channels(role, subjects, "vlm")]
    return document([*channels, *bus_channels(subjects)], title="nixlbus", version="1.0.0")


def described(*channels: Any) -> dict[str, Any]:
    found = document(channels, title="test", version="1.0.0")
    check(found)
    return found


def test_the_packaged_graph_is_a_valid_document(packaged: dict[str, Any]) -> None:
    check(packaged)
    stages = {f"graph.vlm.{stage}" for stage in ("generate", "decode", "prefill", "encode")}
    assert stages <= set(packaged["channels"])
    assert all(packaged["operations"][f"{stage}.receive"]["bindings"]["nats"]["queue"] for stage in stages)


@pytest.mark.parametrize(
    "builder", [name for name, _ in inspect.getmembers(Subjects, inspect.isfunction) if name[0] != "_"]
)
def test_every_subject_that_is_built_is_in_the_document(builder: str, packaged: dict[str, Any]) -> None:
    build = getattr(Subjects(), builder)
    values = {"graph": "vlm", "stage": "decode", "endpoint": "claim", "kind": "drained"}
    built = build(*[values.get(name, f"{name}-1") for name in inspect.signature(build).parameters])
    subject = built[0] if isinstance(built, tuple) else built  # the events of plain and of dotted worker ids
    addresses = [channel["address"] for channel in packaged["channels"].values() if channel["address"]]
    assert any(
        re.fullmatch(re.sub(r"\\\{\w+\\\}", r"[^.]+", re.escape(address)), subject.name) for address in addresses
    )


def test_every_message_is_in_the_document_and_valid_by_it(packaged: dict[str, Any]) -> None:
    seen = {"fault"}
    for name, channel in packaged["channels"].items():
        for key, message in channel["messages"].items():
            tag = message.get("name")
            if tag:
                payload_validator(packaged, name, key).validate(json.loads(encode(EXAMPLES[tag], Encoding.JSON)))
                seen.add(tag)
    inside_others = {"handshake.description", "operation.grant", "stream.end", "job.claim"}
    assert seen == set(EXAMPLES) - inside_others


def test_a_class_is_described_as_it_is_declared() -> None:
    found = described(*class_channels(Counter, Subjects()))
    channels, operations = found["channels"], found["operations"]
    assert channels["graph.numbers.total"]["address"] == "nixlbus.v1.graph.numbers.total"
    assert channels["graph.numbers.total"]["summary"] == "Add them up."
    assert operations["graph.numbers.total.receive"]["x-nixlbus"] == {
        "kind": "unary",
        "concurrency": 3,
        "max_queued": 256,
        "timeout_ms": 1500,
    }
    assert channels["graph.numbers.count"]["messages"].keys() == {"channels.count", "channels.count.json"}
    assert {"channels.number", "stream.end", "fault"} <= channels["graph.numbers.count.reply"]["messages"].keys()
    assert operations["graph.numbers.count.receive"]["bindings"]["nats"]["queue"] == "counters"
    assert channels["worker.mine"]["address"] == "nixlbus.v1.worker.{worker_id}.mine"
    assert "bindings" not in operations["worker.mine.receive"]
    assert channels["event.counted"]["address"] == "nixlbus.v1.event.{worker_id}.counted"
    assert operations["event.counted.receive"]["bindings"]["nats"]["queue"] == "listeners"
    assert "reply" not in operations["event.counted.receive"]


def test_a_class_in_another_group_is_described_there() -> None:
    found = described(*class_channels(Counter, Subjects(), "others"))
    assert found["channels"]["graph.others.total"]["address"] == "nixlbus.v1.graph.others.total"


def test_a_method_without_its_types_is_an_error_that_names_it() -> None:
    class Untyped(Worker):
        @endpoint()
        async def guess(self, request):  # type: ignore[no-untyped-def]
            return request

    with pytest.raises(TypeError, match="guess"):
        list(class_channels(Untyped, Subjects()))


async def test_live_workers_are_described_as_their_class_is(nats: EmbeddedServer) -> None:
    subjects = Subjects()
    configs = [BusConfig(worker_id=f"counter-{number}", nats_url=nats.url) for number in range(2)]
    async with Counter.running(configs[0]) as counter, Counter.running(configs[1]):
        services = [service for service in await counter.bus.services() if service["metadata"]["role"] == "counter"]
    assert len(services) == 2
    live = described(*live_channels(services, subjects))
    declared = described(*class_channels(Counter, subjects))
    assert live["channels"].keys() == declared["channels"].keys()
    for name, channel in declared["channels"].items():
        channel.pop("summary", None)
        live["channels"][name].pop("summary", None)
        assert live["channels"][name] == channel
    for name, operation in declared["operations"].items():
        assert live["operations"][name].get("bindings") == operation.get("bindings")
        assert live["operations"][name]["x-nixlbus"]["concurrency"] == operation["x-nixlbus"]["concurrency"]
    assert live["components"]["schemas"].keys() == declared["components"]["schemas"].keys()


def test_a_live_endpoint_that_tells_only_tags_is_described_by_them() -> None:
    services = [{
        "id": "older-1",
        "endpoints": [{"name": "ask", "subject": "nixlbus.v1.graph.g.ask", "queue_group": "ask",
                       "metadata": {"request": "a.request", "reply": "a.reply,a.other", "concurrency": "many"}}],
    }]  # fmt: skip
    found = described(*live_channels(services, Subjects()))
    assert found["channels"]["graph.g.ask"]["messages"].keys() == {"a.request"}
    assert found["channels"]["graph.g.ask.reply"]["messages"].keys() == {"a.reply", "a.other", "fault"}
