"""The public face of a graph: a request to generate, and the frames that stream back to its reply subject.

Frames are numbered from 0. The last is `GenerateDone`, whose `seq` is the number of frames before it, so that a
missing frame is noticed; or a `Fault`. Nothing follows either.
"""

from typing import Annotated, Literal

from msgspec import Meta

from schemas.message import Message, Part
from schemas.stream import Frame, LastFrame

RequestId = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
MAX_MESSAGES = 256
MAX_IMAGES = 64


class TextPart(Part, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Text of a chat message."""

    text: str


class ImagePart(Part, frozen=True, kw_only=True, tag_field="type", tag="image"):
    """An encoded image (PNG, JPEG, WebP, GIF): bytes in msgpack, base64 in JSON."""

    image: bytes


class ChatMessage(Part, frozen=True, kw_only=True):
    """One turn. `content` is text, or text and images in the order that the model sees them."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart | ImagePart]


class GenerateRequest(Message, frozen=True, kw_only=True, tag="generate.request"):
    """Ask a graph for an answer. Only `messages` is required."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: str = ""
    """Empty: the model that the graph serves."""
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    ignore_eos: bool = False
    request_id: RequestId | None = None
    """Chosen by the graph if absent."""


class GenerateChunk(Frame, frozen=True, kw_only=True, tag="generate.chunk"):
    """A piece of the answer."""

    text: str
    token_ids: list[int]


class Usage(Part, frozen=True, kw_only=True):
    """Tokens, image tokens included."""

    prompt_tokens: int
    completion_tokens: int


class Hop(Part, frozen=True, kw_only=True):
    """One line of the ledger: what a part of the request's way carried and how long it took."""

    name: str
    bytes: int
    ms: float


class GenerateDone(LastFrame, frozen=True, kw_only=True, tag="generate.done"):
    """The end of an answer, with the ledger of its hops; their milliseconds add up to `elapsed_ms`."""

    finish_reason: Literal["stop", "length"]
    model: str
    usage: Usage
    ledger: list[Hop]
    elapsed_ms: float
    request_id: str
    trace_id: str = ""
