"""The seam between the graph's workers and a vision-language model: tensors and tokens in, tensors and tokens out.

A model is used in pieces, each in its own process: a `PromptTokenizer` turns a chat into token ids, a
`VisionEncoder` turns images into embeddings, a `LanguageModel` turns both into logits and K/V (prefill), and
another `LanguageModel` continues from K/V that were moved to it (decode).

Invariants: the pieces of one request have the same `identity`; every tensor that crosses the seam is dense,
contiguous and laid out as its docstring says, so that it can travel as raw bytes; a piece holds no state of a
request beyond the cache it hands out. None of them is thread-safe: a worker calls its piece from one executor
thread.

Leaves out: how a model is loaded (see `workers.models.transformers_adapter`) and any third-party type but
`torch.Tensor`, which is imported for type checking alone, so that the processor can use the errors without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Messages = Sequence[Mapping[str, Any]]
"""A chat as transformers writes it: `[{"role": "user", "content": [{"type": "image"}, {"type": "text",
"text": "…"}]}]`.

Roles are system, user and assistant; `content` is a string or a list of image and text parts. Image parts stand for the
images of the request, in order, and hold no pixels and no address.
"""


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a piece belongs to: its folder's name, and 12 hex digits that change with its config or weights."""

    name: str
    revision: str


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the language model sees it.

    `input_ids` holds each image placeholder repeated to its number of image tokens; `num_image_tokens` is that
    number per image, in order: the rows that the encoder's embeddings must have.
    """

    input_ids: list[int]
    num_image_tokens: list[int]


@dataclass(frozen=True)
class KvShape:
    """The K/V of one token, the same in every layer. `num_kv_heads` are the heads stored, not the queries'."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Prefilled:
    """What prefill hands on; the caller owns both tensors.

    `logits`: [vocabulary], for the first token of the answer. `keys_values`: [layers, 2, tokens, kv_heads, head_dim],
    contiguous, keys (with their positions applied) before values, in the dtype of `LanguageModel.kv_shape`.
    """

    logits: torch.Tensor
    keys_values: torch.Tensor


class TextStream(Protocol):
    """Token ids in, text out, as early as it is certain."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens of the answer and returns the text that they complete, perhaps none.

        Never ends in half a character. Special tokens have no text.
        """
        ...

    def finish(self) -> str:
        """Returns what was held back; all the returned pieces joined are the tokenizer's decoding of all tokens."""
        ...


class PromptTokenizer(Protocol):
    """Chat to token ids, and token ids to text. Needs neither weights nor pixels."""

    @property
    def identity(self) -> ModelIdentity:
        """Which model this belongs to."""
        ...

    @property
    def context_tokens(self) -> int:
        """The most tokens that prompt and answer may have together."""
        ...

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ...

    def tokenize(self, messages: Messages, image_sizes: Sequence[tuple[int, int]]) -> TokenizedPrompt:
        """The chat as token ids, up to where the model's answer begins.

        `image_sizes` are (height, width) in pixels, one per image part, in order. Text that happens to spell a control
        token of the model stays text.

        Raises `InvalidPrompt` for what is no chat or has another number of image parts, and `PromptTooLong` if
        no token of an answer would fit.
        """
        ...

    def text_stream(self) -> TextStream:
        """A new stream for one answer."""
        ...


class VisionEncoder(Protocol):
    """Images to embeddings."""

    @property
    def identity(self) -> ModelIdentity:
        """Which model this belongs to."""
        ...

    @property
    def hidden_size(self) -> int:
        """The width of an embedding: the language model's."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings that `encode` returns."""
        ...

    def encode(self, images: Sequence[bytes]) -> torch.Tensor:
        """The embeddings of image files, in order: [image tokens of all images, hidden], contiguous, float32.

        The caller owns the tensor. The number of rows of each image is `TokenizedPrompt.num_image_tokens`.

        Raises `InvalidImage` and `ImageTooLarge`.
        """
        ...


class LanguageModel(Protocol):
    """Token ids and embeddings to logits and K/V, and K/V to further logits."""

    @property
    def identity(self) -> ModelIdentity:
        """Which model this belongs to."""
        ...

    @property
    def kv_shape(self) -> KvShape:
        """The layout of the K/V that `prefill` returns and `restore` takes."""
        ...

    @property
    def hidden_size(self) -> int:
        """The width of the embeddings that `prefill` takes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        ...

    @property
    def context_tokens(self) -> int:
        """The most tokens that prompt and answer may have together."""
        ...

    def prefill(self, input_ids: Sequence[int], embeddings: torch.Tensor | None) -> Prefilled:
        """Runs the whole prompt once.

        `embeddings` [image tokens, hidden] replace the image tokens of `input_ids`, in order; None for a prompt without
        images. They are read, not kept.

        Raises `InvalidPrompt` if there are not as many embeddings as image tokens, and `PromptTooLong`.
        """
        ...

    def restore(self, keys_values: torch.Tensor) -> Any:
        """A cache to continue from, made of [layers, 2, tokens, kv_heads, head_dim] in the dtype of `kv_shape`.

        The values are copied: the tensor's memory may be reused at once. The cache is opaque and belongs to
        this object's `step`, which extends it.

        Raises `InvalidPrompt` for another shape or dtype.
        """
        ...

    def step(self, cache: Any, token_id: int, position: int) -> torch.Tensor:
        """Appends one token to the cache and returns the logits [vocabulary] for the next.

        `position` is the number of tokens that the cache holds before the call.
        """
        ...


class ModelInputError(ValueError):
    """What was sent can't be run by this model: the text says why and what to do, the fields hold the numbers."""


class InvalidImage(ModelInputError):
    """The bytes are no image that can be read. `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the image can't be read: {reason}. Send a whole PNG, JPEG, WebP or GIF file")
        self.reason = reason


class ImageTooLarge(ModelInputError):
    """The image is over a limit: `amount` of `unit` ("bytes" or "pixels") where `limit` are allowed."""

    def __init__(self, amount: int, limit: int, unit: str) -> None:
        super().__init__(f"the image has {amount} {unit}, the limit is {limit}. Scale it down before sending it")
        self.amount = amount
        self.limit = limit
        self.unit = unit


class InvalidPrompt(ModelInputError):
    """The chat, or what belongs to it, doesn't fit together. `reason` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the prompt can't be used: {reason}")
        self.reason = reason


class PromptTooLong(ModelInputError):
    """The prompt has `num_tokens` tokens, images included, and leaves no room in a context of `context_tokens`."""

    def __init__(self, num_tokens: int, context_tokens: int) -> None:
        super().__init__(
            f"the prompt has {num_tokens} tokens, images included; the model's context of {context_tokens} must "
            "also hold the answer. Send fewer turns, less text or fewer images"
        )
        self.num_tokens = num_tokens
        self.context_tokens = context_tokens


class UnsupportedModel(Exception):
    """The checkpoint can't be run in separate pieces by this adapter. `missing` names what it would need."""

    def __init__(self, model: str, missing: str) -> None:
        super().__init__(
            f"{model} can't be split into encode, prefill and decode here: {missing}. Use a model whose language model "
            "needs nothing but image embeddings and K/V, such as LLaVA, LLaVA-OneVision or SmolVLM"
        )
        self.model = model
        self.missing = missing
