"""JSON schemas of messages, for readers that have no Python: service discovery and AsyncAPI documents.

In: a `Message` class, or a union of them. Out: its schema (JSON Schema 2020-12, self-contained), and an id that changes
when what may be sent changes. In a schema bytes are base64 text, which they are in JSON; in msgpack they are bytes.
Prose is no part of the id: the id is the digest of the schema's canonical text, which leaves descriptions out.
"""

import hashlib
import json
from functools import lru_cache
from typing import Any

import msgspec

Schema = dict[str, Any]
_ID_HEX_DIGITS = 16
"""64 bits: ids are compared among the messages of one bus, not looked up among all."""


def json_schema(message_type: Any) -> Schema:
    """The schema of a message class or a union of them; descriptions are the classes' docstrings.

    Raises `TypeError` for a field that has no counterpart in JSON Schema.
    """
    schema: Schema = _portable(msgspec.json.schema(message_type))
    return schema


@lru_cache(maxsize=1024)
def schema_text(message_type: Any) -> str:
    """The schema without its prose, as compact JSON with sorted keys. Raises `TypeError` as `json_schema` does."""
    return json.dumps(_without_prose(json_schema(message_type)), sort_keys=True, separators=(",", ":"))


def schema_id(text: str) -> str:
    """The id of a schema's text, `sha256:` and 16 hex digits, which whoever has the text can check."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:_ID_HEX_DIGITS]}"


def _portable(schema: Any) -> Any:
    r"""Patterns as every dialect reads them: `\Z` is Python's, and a plain Z elsewhere."""
    if isinstance(schema, list):
        return [_portable(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: part.replace(r"\Z", "$") if name == "pattern" and isinstance(part, str) else _portable(part)
        for name, part in schema.items()
    }


def _without_prose(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_prose(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: _without_prose(part)
        for name, part in schema.items()
        if not (name == "description" and isinstance(part, str))  # a field of that name is a schema: a dict
    }
