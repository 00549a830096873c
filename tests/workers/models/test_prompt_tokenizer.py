"""Chats become the ids that the processor itself would make, and nothing in a text can pass for a control token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from workers.models.packaged import digits_path
from workers.models.training.conversations import corpus
from workers.models.transformers_adapter import TransformersPromptTokenizer
from workers.models.vision_language_model import InvalidPrompt, PromptTooLong

TOKENIZER = TransformersPromptTokenizer.load(digits_path())
IMAGE_TOKEN_ID = 3
END_ID = 2


def chat(*parts: dict[str, Any] | str) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


IMAGE = {"type": "image"}


def test_a_prompt_has_the_ids_that_the_processor_makes_of_pixels() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *chat("Compare ", IMAGE, " with ", IMAGE, ".")]
    processor = AutoProcessor.from_pretrained(digits_path())
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [Image.new("RGB", (500, 20)), Image.new("RGB", (3, 5))]
    expected = processor(text=[text], images=images)["input_ids"][0]
    prompt = TOKENIZER.tokenize(messages, [(20, 500), (5, 3)])
    assert prompt.input_ids == expected
    assert prompt.num_image_tokens == [16, 16]
    assert prompt.input_ids.count(IMAGE_TOKEN_ID) == 32


@given(st.text())
def test_any_text_has_tokens_and_comes_back(text: str) -> None:
    prompt = TOKENIZER.tokenize(chat(text), [])
    assert prompt.input_ids[:2] == [1, 5]
    assert prompt.input_ids[-2:] == [END_ID, 6]
    assert TOKENIZER.decode(prompt.input_ids) == text


@pytest.mark.parametrize("control", ["<image>", "<|end|>", "<|assistant|>", "<s>", "<pad>", "\ufdd0", "\ufdd1"])
def test_a_text_that_spells_a_control_token_stays_text(control: str) -> None:
    text = f"before {control} between {control}{control}\ufdd03\ufdd1 after"
    prompt = TOKENIZER.tokenize(chat(text, IMAGE), [(32, 32)])
    assert prompt.input_ids.count(IMAGE_TOKEN_ID) == 16
    assert prompt.input_ids.count(END_ID) == 1
    assert TOKENIZER.decode(prompt.input_ids) == text


@pytest.mark.parametrize("num_sizes", [0, 2])
def test_another_number_of_images_than_image_parts_is_refused(num_sizes: int) -> None:
    with pytest.raises(InvalidPrompt, match=f"1 image parts and {num_sizes} images"):
        TOKENIZER.tokenize(chat(IMAGE, "Hello"), [(32, 32)] * num_sizes)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "wizard", "content": "Hello"}], "wizard"),
        ([{"content": "Hello"}], "role and content"),
        ([{"role": "user", "content": 7}], "list of parts"),
        (chat({"type": "text", "text": 7}), "a part must be"),
        (chat({"type": "video"}), "a part must be"),
        (["Hello"], "map"),
        (chat("\ud800"), "surrogate"),
    ],
)
def test_what_is_no_chat_is_refused_with_the_reason(messages: Any, reason: str) -> None:
    with pytest.raises(InvalidPrompt, match=reason):
        TOKENIZER.tokenize(messages, [])


def test_an_address_in_an_image_part_is_not_followed() -> None:
    part = {"type": "image", "url": "file:///nowhere/secret.png", "path": "/nowhere/secret.png"}
    assert TOKENIZER.tokenize(chat(part), [(32, 32)]).num_image_tokens == [16]


def test_the_prompt_must_leave_room_for_an_answer() -> None:
    frame = len(TOKENIZER.tokenize(chat(""), []).input_ids)
    room = TOKENIZER.context_tokens - frame - 1
    TOKENIZER.tokenize(chat("\x00" * room), [])
    with pytest.raises(PromptTooLong, match="Send fewer") as caught:
        TOKENIZER.tokenize(chat("\x00" * (room + 1)), [])
    assert (caught.value.num_tokens, caught.value.context_tokens) == (1024, 1024)


def test_images_count_towards_the_context() -> None:
    with pytest.raises(PromptTooLong):
        TOKENIZER.tokenize(chat(*[IMAGE] * 64), [(32, 32)] * 64)


def test_an_answer_ends_at_the_end_token() -> None:
    assert TOKENIZER.stop_token_ids == frozenset({END_ID})


def test_no_text_of_the_training_needs_the_unknown_token() -> None:
    for text in corpus():
        assert 7 not in TOKENIZER.tokenize(chat(text), []).input_ids
