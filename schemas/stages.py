"""The stage requests inside the graph: processor to decode to prefill to encode.

Each asks the next and says where its result is to be written: tensors never travel in these messages, only the
`RdmaMetadata` of the memory that waits for them. Every reply tells the hops it took, so that the caller can subtract
them from what it measured itself: no two hosts' clocks are compared.
"""

from typing import Annotated, Literal

from msgspec import Meta

from schemas.generate import Hop, RequestId
from schemas.message import Message
from schemas.operations import RdmaMetadata
from schemas.stream import Frame, LastFrame

TokenIds = Annotated[list[int], Meta(min_length=1, max_length=1_048_576)]


class StageRequest(Message, frozen=True, kw_only=True):
    """What every stage is told."""

    request_id: RequestId
    model: str
    revision: str
    """The weights that the request's tokens belong to; a worker with others refuses."""


class EncodeRequest(StageRequest, frozen=True, kw_only=True, tag="encode.request"):
    """Encode these images and write their embeddings, [sum of image tokens, hidden], to `embeddings`."""

    images: Annotated[list[bytes], Meta(min_length=1)]
    embeddings: RdmaMetadata


class EncodeReply(Message, frozen=True, kw_only=True, tag="encode.reply"):
    """The embeddings are written."""

    hops: list[Hop]
    elapsed_ms: float


class PrefillRequest(StageRequest, frozen=True, kw_only=True, tag="prefill.request"):
    """Run the prompt and write its keys and values, [layers, 2, tokens, kv_heads, head_dim], to `kv`."""

    input_ids: TokenIds
    num_image_tokens: list[int]
    images: list[bytes]
    kv: RdmaMetadata


class PrefillReply(Message, frozen=True, kw_only=True, tag="prefill.reply"):
    """The keys and values are written; `token_id` is the first token of the answer."""

    token_id: int
    hops: list[Hop]
    elapsed_ms: float


class DecodeRequest(StageRequest, frozen=True, kw_only=True, tag="decode.request"):
    """Answer this prompt token by token. `input_ids` are expanded: image tokens included."""

    input_ids: TokenIds
    num_image_tokens: list[int]
    images: list[bytes]
    max_tokens: Annotated[int, Meta(ge=1)]
    stop_token_ids: list[int]


class DecodeToken(Frame, frozen=True, kw_only=True, tag="decode.token"):
    """The next token of a stream; `seq` counts from 0."""

    token_id: int


class DecodeDone(LastFrame, frozen=True, kw_only=True, tag="decode.done"):
    """The end of a stream of `seq` tokens."""

    finish_reason: Literal["stop", "length"]
    hops: list[Hop]
    elapsed_ms: float
