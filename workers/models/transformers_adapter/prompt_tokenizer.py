"""A chat to token ids, by the checkpoint's own chat template, tokenizer and processor.

In: messages and the sizes of their images. Out: ids in which each image takes as many tokens as its
embeddings have rows.

How many tokens an image takes is asked of the checkpoint's processor, which is shown a blank image of that
size, once per size. (Its `_get_num_multimodal_tokens` computes a number without an image, but some models
write other tokens between those of an image: SmolVLM's rows and columns.)

Invariants: the text of a message can't spell a control token: it is tokenised as the text it is; a message
can't make this module open a file or an address, since only the types and texts of its parts are read.

Leaves out: pixels, weights, and fetching images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import jinja2
from PIL import Image
from transformers import AutoProcessor, GenerationConfig

from workers.models.transformers_adapter.checkpoint import checkpoint_identity, context_tokens, load_config
from workers.models.transformers_adapter.text_stream import DecodedTextStream
from workers.models.vision_language_model import (
    InvalidPrompt,
    Messages,
    ModelIdentity,
    PromptTooLong,
    TokenizedPrompt,
    UnsupportedModel,
)

ROLES = frozenset({"system", "user", "assistant"})

_REMEMBERED_SIZES = 256

# Noncharacters, which Unicode reserves for use inside a program: they enclose the number of a control token in a text.
_MARK_START, _MARK_END = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_MARK_START}([0-9]+){_MARK_END}")


class TransformersPromptTokenizer:
    """A `PromptTokenizer` over a transformers processor. Build it with `load`."""

    def __init__(self, processor: Any, identity: ModelIdentity, num_context: int, stop_ids: frozenset[int]) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._identity = identity
        self._context_tokens = num_context
        self._stop_token_ids = stop_ids
        special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        self._controls = [_MARK_START, _MARK_END, *sorted(special, key=len, reverse=True)]
        self._control_numbers = {control: number for number, control in enumerate(self._controls)}
        self._any_control = re.compile("|".join(map(re.escape, self._controls)))
        self._text_of_image = lru_cache(_REMEMBERED_SIZES)(self._ask_processor)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Loads the processor in the folder `path`; no weights are kept, though they are read once for the identity.

        Raises `FileNotFoundError`, and `UnsupportedModel` for a model that can't be split or has no chat template.
        """
        config = load_config(path)
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        identity = checkpoint_identity(path)
        if getattr(processor, "image_token", None) is None:
            raise UnsupportedModel(identity.name, "its processor has no image token")
        if processor.chat_template is None:
            raise UnsupportedModel(identity.name, "it has no chat template")
        return cls(processor, identity, context_tokens(config), _stop_token_ids(path, config, processor))

    @property
    def identity(self) -> ModelIdentity:
        """Which model this belongs to."""
        return self._identity

    @property
    def context_tokens(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self._context_tokens

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer: those of the generation config, else of the config, else the tokenizer's."""
        return self._stop_token_ids

    def tokenize(self, messages: Messages, image_sizes: Sequence[tuple[int, int]]) -> TokenizedPrompt:
        """The chat as token ids, up to where the model's answer begins; sizes are (height, width).

        Raises `InvalidPrompt` and `PromptTooLong`.
        """
        checked = [self._checked_message(message) for message in messages]
        num_images = sum(part["type"] == "image" for message in checked for part in message["content"])
        if num_images != len(image_sizes):
            raise InvalidPrompt(
                f"it has {num_images} image parts and {len(image_sizes)} images: give one image for each image part"
            )
        text, num_image_tokens = self._expand_images(self._render(checked), image_sizes)
        input_ids = self._encode(text)
        if len(input_ids) >= self._context_tokens:
            raise PromptTooLong(len(input_ids), self._context_tokens)
        return TokenizedPrompt(input_ids, num_image_tokens)

    def text_stream(self) -> DecodedTextStream:
        """A new stream for one answer."""
        return DecodedTextStream(self.decode)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _checked_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message rebuilt of nothing but what is known, its control tokens marked."""
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InvalidPrompt("a message must be a map with role and content")
        if message["role"] not in ROLES:
            raise InvalidPrompt(f"the role {message['role']!r} is unknown: use system, user or assistant")
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence):
            raise InvalidPrompt("the content of a message must be a text or a list of parts")
        return {"role": message["role"], "content": [self._checked_part(part) for part in parts]}

    def _checked_part(self, part: Mapping[str, Any]) -> dict[str, str]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            return {"type": "image"}
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": self._marked(part["text"])}
        raise InvalidPrompt('a part must be {"type": "image"} or {"type": "text", "text": "..."}')

    def _marked(self, text: str) -> str:
        """The text with each control token replaced by its number between marks, so that it survives as text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidPrompt("a text holds half a surrogate pair: send valid Unicode") from error
        return self._any_control.sub(
            lambda found: f"{_MARK_START}{self._control_numbers[found.group()]}{_MARK_END}", text
        )

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if not messages:
            raise InvalidPrompt("it has no messages")
        try:
            text: str = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise InvalidPrompt(f"the model's chat template refuses it: {error}") from error
        return text

    def _expand_images(self, text: str, image_sizes: Sequence[tuple[int, int]]) -> tuple[str, list[int]]:
        image_token = self._processor.image_token
        pieces = text.split(image_token)
        if len(pieces) != len(image_sizes) + 1:
            raise InvalidPrompt(
                f"the model's chat template wrote {len(pieces) - 1} of {len(image_sizes)} images: put them into "
                "user messages"
            )
        images = [self._text_of_image(*image_size) for image_size in image_sizes]
        expanded = "".join(piece + image for piece, image in zip(pieces, [*images, ""], strict=True))
        return expanded, [image.count(image_token) for image in images]

    def _ask_processor(self, height: int, width: int) -> str:
        """What the processor writes in place of the image token for an image of this size."""
        blank = Image.new("RGB", (width, height))
        output = self._processor(
            text=[self._processor.image_token],
            images=[blank],
            return_text_replacement_offsets=True,
            images_kwargs={"input_data_format": "channels_last"},
        )
        text: str = output["text_replacement_offsets"][0][0]["replacement"]
        return text

    def _encode(self, text: str) -> list[int]:
        """The ids of a rendered chat; a control token between marks is tokenised as plain text."""
        bos = self._tokenizer.bos_token
        pieces = _MARK.split(text)  # text, number, text, number, …, text
        # A template that doesn't write the first token leaves it to the tokenizer, as the processor does.
        input_ids: list[int] = self._tokenizer.encode(
            pieces[0], add_special_tokens=bos is None or not text.startswith(bos)
        )
        for number, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            control = self._controls[int(number)]
            input_ids += self._tokenizer.encode(control, add_special_tokens=False, split_special_tokens=True)
            input_ids += self._tokenizer.encode(piece, add_special_tokens=False)
        return input_ids


def _stop_token_ids(path: Path, config: Any, processor: Any) -> frozenset[int]:
    candidates = [config.get_text_config().eos_token_id, processor.tokenizer.eos_token_id]
    if (path / "generation_config.json").is_file():
        candidates.insert(0, GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id)
    for stop in candidates:
        if stop is not None:
            return frozenset([stop] if isinstance(stop, int) else stop)
    return frozenset()
