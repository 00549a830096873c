"""Bytes to messages and back: msgpack for workers, JSON for people at a shell.

In: payloads from anybody. Out: a `Message`, or one of three errors and nothing else, whatever the bytes were.
A JSON object starts with `{`, which no msgpack map does, so the encoding of a payload needs no header.
msgspec packs and checks in one pass (5 µs both ways); nothing is ever unpickled.
"""

from enum import Enum
from functools import lru_cache
from types import UnionType
from typing import Any, TypeVar, get_args

import msgspec

from schemas.message import Message

M = TypeVar("M", bound=Message)


class Encoding(Enum):
    """How a payload is written. A reply is written as its request was."""

    MSGPACK = "msgpack"
    JSON = "json"


class MessageError(ValueError):
    """A payload that is not the message it should be. Attribute: `code`, the fault code that tells its sender."""

    code = "invalid_message"


class MalformedMessage(MessageError):
    """Not msgpack (or JSON), truncated, trailing bytes, or nested beyond reason."""

    code = "malformed_message"


class UnknownMessageType(MessageError):
    """A well-formed map whose `type` this endpoint doesn't take. Attributes: `expected`, the types it takes."""

    code = "unknown_message_type"

    def __init__(self, expected: tuple[str, ...], detail: str) -> None:
        self.expected = expected
        super().__init__(f"unknown message type ({detail}); expected {' or '.join(expected)}")


class InvalidMessage(MessageError):
    """A known type with a missing or ill-typed field; the text names the field."""


def encode(message: Message, encoding: Encoding = Encoding.MSGPACK) -> bytes:
    """Pack a message."""
    return _MSGPACK.encode(message) if encoding is Encoding.MSGPACK else _JSON.encode(message)


def encoding_of(payload: bytes) -> Encoding:
    """Tell which encoding a payload is in, by its first byte that isn't white space."""
    return Encoding.JSON if payload.lstrip(b" \t\r\n")[:1] == b"{" else Encoding.MSGPACK


def decode(payload: bytes, message_type: type[M] | UnionType, encoding: Encoding = Encoding.MSGPACK) -> M:
    """Unpack one message of `message_type`, a Message class or a union of them.

    Raises `MalformedMessage`, `UnknownMessageType` or `InvalidMessage`.
    """
    try:
        decoder = _msgpack_decoder if encoding is Encoding.MSGPACK else _json_decoder
        message: M = decoder(message_type).decode(payload)
    except msgspec.ValidationError as error:
        raise _validation_error(error, message_type) from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise MalformedMessage(f"the payload is not {encoding.value}: {str(error)[:200]}") from None
    return message


_MSGPACK = msgspec.msgpack.Encoder()
_JSON = msgspec.json.Encoder()


@lru_cache(maxsize=256)
def _msgpack_decoder(message_type: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(message_type)


@lru_cache(maxsize=256)
def _json_decoder(message_type: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(message_type)


def _validation_error(error: msgspec.ValidationError, message_type: Any) -> MessageError:
    text = str(error)
    if text.startswith("Expected `object`, got") and " - at" not in text:
        return MalformedMessage(f"the payload is no map: {text}")
    if text.endswith("`$.type`") or text == "Object missing required field `type`":
        return UnknownMessageType(message_tags(message_type), text[:300])
    return InvalidMessage(text[:300])


def message_tags(message_type: Any) -> tuple[str, ...]:
    """The `type` values that a Message class, or a union of them, stands for."""
    members = get_args(message_type) or (message_type,)
    return tuple(str(member.__struct_config__.tag) for member in members)
