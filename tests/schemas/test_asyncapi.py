import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from bus import Frame, Message, Part, bus_channels
from schemas.asyncapi import Channel, address_of, document, placeholder
from schemas.json_schema import json_schema
from schemas.stream import LastFrame, StreamEnd, frames_of
from schemas.subjects import Subjects

SPECIFICATION = json.loads(Path(__file__).with_name("asyncapi-3.0.0.json").read_text())


def check(described: dict[str, Any]) -> None:
    """Raise if it is no AsyncAPI document, or refers to what isn't there."""
    Draft7Validator(SPECIFICATION).validate(described)
    for reference in references(described):
        found: Any = described
        for token in reference.removeprefix("#/").split("/"):
            assert token in found, reference
            found = found[token]


def references(value: Any) -> list[str]:
    if isinstance(value, list):
        return [reference for part in value for reference in references(part)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
    return own + [reference for part in value.values() for reference in references(part)]


def payload_validator(described: dict[str, Any], channel: str, message: str) -> Draft7Validator:
    payload = described["channels"][channel]["messages"][message]["payload"]
    return Draft7Validator({**payload, "components": described["components"]})


class Ask(Message, frozen=True, kw_only=True, tag="ask"):
    pair: tuple[int, str] = (1, "a")


class Token(Frame, frozen=True, kw_only=True, tag="token"):
    text: str


class End(LastFrame, frozen=True, kw_only=True, tag="end"):
    pass


def unary(name: str, request: Any, reply: Any, **more: Any) -> Channel:
    return Channel(
        name=name,
        address=f"nixlbus.v1.{name}",
        kind="unary",
        request=json_schema(request) if request else None,
        reply=json_schema(reply) if reply else None,
        **more,
    )


def described(*channels: Channel) -> dict[str, Any]:
    found = document(channels, title="test", version="1.0.0")
    check(found)
    return found


def test_the_channels_of_the_bus_alone_are_a_document() -> None:
    found = described(*bus_channels(Subjects()))
    assert found["channels"]["cancel"]["messages"].keys() == {"empty"}
    assert found["channels"]["worker.claim"]["address"] == "nixlbus.v1.worker.{worker_id}.claim"
    assert found["channels"]["worker.claim"]["parameters"].keys() == {"worker_id"}
    assert found["operations"]["ack.send"]["action"] == "send"
    assert found["operations"]["ack.receive"]["action"] == "receive"


def test_another_prefix_is_in_every_address() -> None:
    found = described(*bus_channels(Subjects("other")))
    assert all((channel["address"] or "other.v1.").startswith("other.v1.") for channel in found["channels"].values())


def test_a_request_has_its_queue_its_headers_and_its_reply() -> None:
    found = described(unary("a", Ask, Ask, queue_group="q", details={"concurrency": 3}))
    operation = found["operations"]["a.receive"]
    assert operation["bindings"]["nats"]["queue"] == "q"
    assert operation["x-nixlbus"] == {"kind": "unary", "concurrency": 3}
    assert operation["reply"]["messages"] == [
        {"$ref": "#/channels/a.reply/messages/ask"},
        {"$ref": "#/channels/a.reply/messages/fault"},
    ]
    assert found["channels"]["a.reply"]["address"] is None
    assert found["channels"]["a"]["messages"]["ask"]["headers"] == {"$ref": "#/components/schemas/RequestHeaders"}
    assert found["channels"]["a"]["messages"].keys() == {"ask"}


def test_only_a_public_channel_speaks_json_and_needs_no_header() -> None:
    found = described(unary("a", Ask, Ask, public=True))
    messages = found["channels"]["a"]["messages"]
    assert [messages[name]["contentType"] for name in ("ask", "ask.json")] == [
        "application/msgpack",
        "application/json",
    ]
    assert found["channels"]["a.reply"]["messages"].keys() == {"ask", "ask.json", "fault", "fault.json"}
    assert "required" not in found["components"]["schemas"]["PublicRequestHeaders"]
    assert found["components"]["schemas"]["RequestHeaders"]["required"] == ["Nixlbus-Protocol"]


def test_listeners_of_one_subject_are_told_each_and_instances_once() -> None:
    def listener(queue_group: str, message_type: Any) -> Channel:
        schema = json_schema(message_type)
        return Channel(name="e", address="nixlbus.v1.e", kind="event", request=schema, queue_group=queue_group)

    found = described(listener("a", Ask), listener("b", Token), listener("a", Ask), listener("b", Token))
    assert found["channels"]["e"]["messages"].keys() == {"ask", "token"}
    assert {name: each["bindings"]["nats"]["queue"] for name, each in found["operations"].items()} == {
        "e.receive": "a",
        "e.receive-2": "b",
    }
    assert found["operations"]["e.receive-2"]["messages"] == [{"$ref": "#/channels/e/messages/token"}]


def test_a_tuple_is_told_in_the_dialect_of_the_document() -> None:
    validator = payload_validator(described(unary("a", Ask, None)), "a", "ask")
    assert validator.is_valid({"type": "ask", "pair": [1, "a"]})
    assert not validator.is_valid({"type": "ask", "pair": ["a", 1]})
    assert not validator.is_valid({"type": "ask", "pair": [1, "a", 2]})


@pytest.mark.parametrize(
    ("yielded", "on_the_wire"),
    [(Token, {Token, StreamEnd}), (Token | End, {Token, End}), (Ask, {Ask}), (Token | Ask, {Token, Ask, StreamEnd})],
)
def test_a_stream_without_a_last_frame_of_its_own_ends_with_the_endpoints(yielded: Any, on_the_wire: set[type]) -> None:
    frames = frames_of(yielded)
    assert set(getattr(frames, "__args__", (frames,))) == on_the_wire


def holder(annotation: type, tag: str) -> Any:
    class Inner(Part, frozen=True, kw_only=True):
        value: annotation  # type: ignore[valid-type]

    class Outer(Message, frozen=True, kw_only=True, tag=tag):
        inner: Inner

    return Outer


def test_types_of_one_name_stay_apart_and_so_do_those_that_refer_to_them() -> None:
    texts, numbers = holder(str, "outer"), holder(int, "outer")
    found = described(unary("a", texts, None), unary("b", numbers, None), unary("c", texts, None))
    for channel, good, bad in (("a", "x", 1), ("b", 1, "x"), ("c", "x", 1)):
        validator = payload_validator(found, channel, "outer")
        assert validator.is_valid({"type": "outer", "inner": {"value": good}}), channel
        assert not validator.is_valid({"type": "outer", "inner": {"value": bad}}), channel
    assert len([name for name in found["components"]["schemas"] if name.startswith("Outer")]) == 2


def test_a_placeholder_becomes_a_parameter_and_nothing_else_does() -> None:
    subjects = Subjects()
    assert address_of(subjects.ack(placeholder("worker_id"), placeholder("operation_id"))) == (
        "nixlbus.v1.ack.{worker_id}.{operation_id}"
    )
    assert address_of(subjects.worker("worker_id", "queue")) == "nixlbus.v1.worker.worker_id.queue"
