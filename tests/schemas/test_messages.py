import json
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.codec import (
    Encoding,
    InvalidMessage,
    MalformedMessage,
    MessageError,
    UnknownMessageType,
    decode,
    encode,
    encoding_of,
)
from schemas.generate import GenerateChunk, GenerateDone, GenerateRequest
from schemas.message import Message
from schemas.operations import RdmaMetadata
from tests.schemas.every_message import EXAMPLES, message_types, struct_values

GOLDEN: dict[str, str] = json.loads(Path(__file__).with_name("golden.json").read_text())


def golden_of_version(number: int) -> dict[str, str]:
    found: dict[str, str] = json.loads(Path(__file__).with_name(f"golden_of_version_{number}.json").read_text())
    return found


@pytest.mark.parametrize("number", [1, 2])
def test_the_messages_of_earlier_versions_stay_readable(number: int) -> None:
    for tag, golden in golden_of_version(number).items():
        decode(bytes.fromhex(golden), type(EXAMPLES[tag]))


@pytest.mark.parametrize("tag", golden_of_version(2))
def test_nothing_that_the_version_before_says_is_lost(tag: str) -> None:
    payload = bytes.fromhex(golden_of_version(2)[tag])
    assert msgpack.unpackb(encode(decode(payload, type(EXAMPLES[tag])))) == msgpack.unpackb(payload)


def test_every_message_has_an_example_and_golden_bytes() -> None:
    assert set(message_types()) == set(EXAMPLES) == set(GOLDEN)


@pytest.mark.parametrize("tag", sorted(EXAMPLES))
def test_the_bytes_on_the_wire_do_not_change_unnoticed(tag: str) -> None:
    assert encode(EXAMPLES[tag]).hex() == GOLDEN[tag]
    assert decode(bytes.fromhex(GOLDEN[tag]), type(EXAMPLES[tag])) == EXAMPLES[tag]


@pytest.mark.parametrize("tag", sorted(EXAMPLES))
def test_our_bytes_are_plain_msgpack(tag: str) -> None:
    unpacked = msgpack.unpackb(encode(EXAMPLES[tag]))
    assert unpacked["type"] == tag
    assert unpacked == msgspec.to_builtins(EXAMPLES[tag], builtin_types=(bytes,))
    assert decode(msgpack.packb(unpacked), type(EXAMPLES[tag])) == EXAMPLES[tag]


@pytest.mark.parametrize("tag", sorted(EXAMPLES))
@settings(max_examples=30)
@given(data=st.data())
def test_every_message_survives_a_round_trip(tag: str, data: st.DataObject) -> None:
    message = data.draw(struct_values(message_types()[tag]))
    assert decode(encode(message), type(message)) == message


@pytest.mark.parametrize("message_type", [GenerateRequest, GenerateChunk, GenerateDone])
@settings(max_examples=30)
@given(data=st.data())
def test_the_public_messages_survive_json(message_type: type[Message], data: st.DataObject) -> None:
    message = data.draw(struct_values(message_type))
    payload = encode(message, Encoding.JSON)
    assert encoding_of(payload) is Encoding.JSON
    assert decode(payload, message_type, Encoding.JSON) == message


@pytest.mark.parametrize("tag", sorted(EXAMPLES))
def test_a_truncated_message_is_malformed_at_every_length(tag: str) -> None:
    payload = encode(EXAMPLES[tag])
    for length in range(len(payload)):
        with pytest.raises(MalformedMessage):
            decode(payload[:length], type(EXAMPLES[tag]))


@settings(max_examples=400)
@given(payload=st.binary(max_size=200), encoding=st.sampled_from(Encoding))
def test_arbitrary_bytes_give_a_message_error_and_nothing_else(payload: bytes, encoding: Encoding) -> None:
    for message_type in (GenerateRequest, RdmaMetadata):
        with pytest.raises(MessageError):
            decode(payload, message_type, encoding)


@settings(max_examples=200)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary() | st.floats(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["type", "messages"]), inner),
    )
)
def test_any_other_msgpack_value_gives_a_message_error_and_nothing_else(value: Any) -> None:
    with pytest.raises(MessageError):
        decode(msgpack.packb(value), RdmaMetadata)


@pytest.mark.parametrize(
    "payload",
    [b"\x91" * 100_000, b"\x81\xa1a" * 50_000, b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xd9\x02\xff\xff"],
)
def test_nesting_and_huge_declared_lengths_cost_nothing(payload: bytes) -> None:
    with pytest.raises(MessageError):
        decode(payload, GenerateRequest)
    with pytest.raises(MessageError):
        decode(b'{"a":' * 100_000, GenerateRequest, Encoding.JSON)


def test_errors_name_the_type_or_the_field() -> None:
    grant = msgpack.unpackb(encode(EXAMPLES["operation.grant"]))
    with pytest.raises(UnknownMessageType, match=r"expected operation\.grant"):
        decode(msgpack.packb({**grant, "type": "operation.gift"}), RdmaMetadata)
    with pytest.raises(InvalidMessage, match="`lease_ms`"):
        decode(msgpack.packb({name: grant[name] for name in grant if name != "lease_ms"}), RdmaMetadata)
    with pytest.raises(InvalidMessage, match=r"`\$\.memory\[0\]\.region`"):
        decode(msgpack.packb({**grant, "memory": [{**grant["memory"][0], "region": "one"}]}), RdmaMetadata)
    with pytest.raises(InvalidMessage, match="operation_id"):
        decode(msgpack.packb({**grant, "operation_id": "../../x"}), RdmaMetadata)


def test_an_unknown_field_is_ignored_and_a_default_is_left_out() -> None:
    grant = msgpack.unpackb(encode(EXAMPLES["operation.grant"]))
    assert "token" not in grant
    assert decode(msgpack.packb({**grant, "added_later": 1}), RdmaMetadata) == EXAMPLES["operation.grant"]
