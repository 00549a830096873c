"""OpenAI's chat completions as typed values: the request as clients send it, the responses as they expect them.

In: JSON of `POST /v1/chat/completions`. Out: a `GenerateRequest`, and the response objects and stream chunks. Unknown
fields are ignored; what this version can't honour (sampling, several choices, image URLs that must be fetched) is a
typed refusal and never silently dropped. Pure: no HTTP, no bus.
"""

import base64
import binascii
import time
from typing import Any, Literal

import msgspec

from bus import RequestRefused
from schemas.fault import Fault, FaultCode
from schemas.generate import ChatMessage, GenerateDone, GenerateRequest, ImagePart, TextPart, Usage

DATA_URL_PREFIX = "data:image/"
DEFAULT_MAX_TOKENS = 256


class ImageUrl(msgspec.Struct, frozen=True):
    """Where an image is: here a `data:` URL."""

    url: str


class TextContent(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Text of a message."""

    text: str


class ImageContent(msgspec.Struct, frozen=True, tag_field="type", tag="image_url"):
    """An image of a message."""

    image_url: ImageUrl


class ChatTurn(msgspec.Struct, frozen=True):
    """A message of the chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextContent | ImageContent]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries beside text."""

    include_usage: bool = False


class ChatCompletionRequest(msgspec.Struct, frozen=True):
    """The fields of a request that mean something here."""

    messages: list[ChatTurn]
    model: str = ""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None


def parse(body: bytes) -> ChatCompletionRequest:
    """Read a request body. Raises `RequestRefused` that names the field."""
    try:
        request = msgspec.json.decode(body, type=ChatCompletionRequest)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise RequestRefused(FaultCode.INVALID_MESSAGE, f"the request body is not valid: {str(error)[:300]}") from None
    for present, what in (
        (request.n not in (None, 1), "n other than 1"),
        (request.temperature not in (None, 0), "temperature other than 0"),
        (bool(request.stop), "stop strings"),
    ):
        if present:
            raise RequestRefused(FaultCode.UNSUPPORTED, f"{what}: not served by this version", remedy="leave it out")
    return request


def to_generate_request(request: ChatCompletionRequest) -> GenerateRequest:
    """What the graph is asked. Raises `RequestRefused` for a bad image or an empty chat."""
    if not request.messages:
        raise RequestRefused(FaultCode.INVALID_PROMPT, "a chat needs at least one message")
    given = (request.max_completion_tokens, request.max_tokens)
    max_tokens = next((number for number in given if number is not None), DEFAULT_MAX_TOKENS)
    if max_tokens < 1:
        raise RequestRefused(FaultCode.INVALID_MESSAGE, f"max_tokens is {max_tokens}; it must be at least 1")
    return GenerateRequest(
        messages=[_chat_message(turn) for turn in request.messages], model=request.model, max_tokens=max_tokens
    )


def image_from_url(url: str) -> bytes:
    """The bytes of a base64 `data:` URL. Raises `RequestRefused`."""
    head, separator, encoded = url.partition(",")
    if not (url.startswith(DATA_URL_PREFIX) and separator and head.endswith(";base64")):
        raise RequestRefused(
            FaultCode.UNSUPPORTED if url.startswith("http") else FaultCode.INVALID_IMAGE,
            "an image must be a URL of the form data:image/png;base64,… in this version",
            remedy="send the image's bytes as a data: URL",
        )
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RequestRefused(FaultCode.INVALID_IMAGE, "the image's base64 is broken") from None


def completion(completion_id: str, text: str, done: GenerateDone) -> dict[str, Any]:
    """The response of a request that isn't streamed."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": None,
        "finish_reason": done.finish_reason,
    }
    return {
        **_envelope("chat.completion", completion_id, done.model),
        "choices": [choice],
        "usage": usage(done.usage),
        "nixlbus": extension(done),
    }


def chunk(completion_id: str, model: str, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    """One event of a stream."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {**_envelope("chat.completion.chunk", completion_id, model), "choices": [choice]}


def usage_chunk(completion_id: str, done: GenerateDone) -> dict[str, Any]:
    """The event that `stream_options.include_usage` asks for, before the end."""
    return {
        **_envelope("chat.completion.chunk", completion_id, done.model),
        "choices": [],
        "usage": usage(done.usage),
    }


def extension(done: GenerateDone) -> dict[str, Any]:
    """What we add to OpenAI's objects, under the key `nixlbus`: the trace and the ledger."""
    return {
        "trace_id": done.trace_id,
        "request_id": done.request_id,
        "elapsed_ms": done.elapsed_ms,
        "ledger": msgspec.to_builtins(done.ledger),
    }


def usage(counted: Usage) -> dict[str, int]:
    """Token counts as OpenAI names them."""
    return {
        "prompt_tokens": counted.prompt_tokens,
        "completion_tokens": counted.completion_tokens,
        "total_tokens": counted.prompt_tokens + counted.completion_tokens,
    }


def error_object(fault: Fault) -> dict[str, Any]:
    """A fault as OpenAI's error object."""
    message = f"{fault.message}; {fault.remedy}" if fault.remedy else fault.message
    kind = "invalid_request_error" if fault.http_status < 500 else "server_error"
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": None,
            "code": fault.code,
            "worker_id": fault.worker_id,
            "trace_id": fault.trace_id,
        }
    }


def _chat_message(turn: ChatTurn) -> ChatMessage:
    role = "system" if turn.role == "developer" else turn.role
    if isinstance(turn.content, str):
        return ChatMessage(role=role, content=turn.content)
    parts: list[TextPart | ImagePart] = [
        TextPart(text=part.text)
        if isinstance(part, TextContent)
        else ImagePart(image=image_from_url(part.image_url.url))
        for part in turn.content
    ]
    return ChatMessage(role=role, content=parts)


def _envelope(kind: str, completion_id: str, model: str) -> dict[str, Any]:
    return {"id": completion_id, "object": kind, "created": int(time.time()), "model": model}
