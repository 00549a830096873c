import json
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from schemas.codec import Encoding, encode
from schemas.json_schema import json_schema, schema_id, schema_text
from schemas.message import Message
from tests.schemas.every_message import EXAMPLES, message_types


@pytest.mark.parametrize("tag", sorted(EXAMPLES))
def test_every_message_is_valid_by_its_own_schema_and_by_no_other(tag: str) -> None:
    schema = json_schema(message_types()[tag])
    Draft202012Validator.check_schema(schema)
    sent = json.loads(encode(EXAMPLES[tag], Encoding.JSON))
    Draft202012Validator(schema).validate(sent)
    assert not Draft202012Validator(schema).is_valid({**sent, "type": "another"})


@pytest.mark.parametrize("tag", sorted(EXAMPLES))
def test_a_pattern_means_the_same_to_readers_without_python(tag: str) -> None:
    assert "\\\\Z" not in schema_text(message_types()[tag])


def test_an_id_is_the_digest_of_the_text_and_prose_is_no_part_of_it() -> None:
    def described(text: str) -> Any:
        return msgspec.defstruct(
            "Asked", [("description", str)], bases=(Message,), tag="asked", frozen=True, kw_only=True,
            namespace={"__doc__": text},
        )  # fmt: skip

    one, other = schema_text(described("One text.")), schema_text(described("Another."))
    assert one == other
    assert '"description":{"type":"string"}' in one, "a field of that name is no prose"
    assert schema_id(one) == schema_id(other)
    assert schema_id(one).startswith("sha256:")
    assert len({schema_id(schema_text(message_type)) for message_type in message_types().values()}) == len(EXAMPLES)
