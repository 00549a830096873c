"""The pieces together say what transformers' own generate says, token by token, with raw bytes in between."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from workers.models.digits_dataset import Digit, held_out_digits
from workers.models.images import image_size
from workers.models.packaged import digits_path
from workers.models.transformers_adapter import (
    TransformersLanguageModel,
    TransformersPromptTokenizer,
    TransformersVisionEncoder,
)
from workers.models.vision_language_model import InvalidPrompt, LanguageModel, PromptTooLong

MAX_NEW_TOKENS = 40

Message = dict[str, Any]


def user(text: str, num_images: int = 0) -> Message:
    images: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


REQUESTS: dict[str, list[Message]] = {
    "text only": [user("Who are you?")],
    "plain strings": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count to nine."}],
    "one image": [user("What digit is this?", 1)],
    "a long answer": [user("Describe the image.", 1)],
    "an unknown question": [user("Übersetze: 三 + 四 = ?", 1)],
    "two images": [user("Which digit is larger?", 2)],
    "several turns": [
        user("What digit is this?", 1),
        assistant("This is the digit 1."),
        user("What comes next?"),
        assistant("After 1 comes 2."),
        user("Count up to it.", 1),
    ],
    "a long prompt": [user("Describe the image. " * 60, 2)],
}


@dataclass
class Pieces:
    tokenizer: TransformersPromptTokenizer
    encoder: TransformersVisionEncoder
    prefill: TransformersLanguageModel
    decode: TransformersLanguageModel
    digits: tuple[Digit, ...]


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    path = digits_path()
    return Pieces(
        TransformersPromptTokenizer.load(path),
        TransformersVisionEncoder.load(path),
        TransformersLanguageModel.load(path),
        TransformersLanguageModel.load(path),
        held_out_digits(),
    )


@pytest.fixture(scope="module")
def whole_model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(digits_path(), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", REQUESTS)
def test_split_execution_is_token_identical_to_generate(name: str, pieces: Pieces, whole_model: Any) -> None:
    messages = REQUESTS[name]
    images = _images_for(messages, pieces.digits, offset=list(REQUESTS).index(name))
    answer, logits = _split_answer(pieces, messages, images)
    expected_answer, expected_logits = _whole_answer(whole_model, messages, images)
    assert answer == expected_answer
    # A wrong position or a lost row may leave the tokens as they are; the logits tell (their deviation is about 1.5).
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-3)


def test_requests_do_not_leave_anything_behind_in_the_pieces(pieces: Pieces) -> None:
    messages = REQUESTS["one image"]
    images = _images_for(messages, pieces.digits, offset=0)
    alone, _ = _split_answer(pieces, messages, images)
    _split_answer(pieces, REQUESTS["a long prompt"], _images_for(REQUESTS["a long prompt"], pieces.digits, offset=3))
    assert _split_answer(pieces, messages, images)[0] == alone


def test_images_of_several_requests_encode_together_as_they_do_alone(pieces: Pieces) -> None:
    images = [digit.png_bytes() for digit in pieces.digits[:5]]
    together = pieces.encoder.encode(images)
    alone = torch.cat([pieces.encoder.encode([image]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_encode_returns_a_dense_float32_tensor_that_the_caller_may_write_to(pieces: Pieces) -> None:
    embeddings = pieces.encoder.encode([digit.png_bytes() for digit in pieces.digits[:3]])
    assert embeddings.shape == (48, pieces.encoder.hidden_size)
    assert embeddings.dtype == pieces.encoder.dtype == torch.float32
    assert embeddings.is_contiguous()
    embeddings.zero_()


def test_encode_of_no_images_is_empty(pieces: Pieces) -> None:
    assert pieces.encoder.encode([]).shape == (0, pieces.encoder.hidden_size)


def test_prefilled_tensors_are_dense_and_have_the_announced_bytes(pieces: Pieces) -> None:
    prompt = pieces.tokenizer.tokenize(REQUESTS["text only"], [])
    prefilled = pieces.prefill.prefill(prompt.input_ids, None)
    num_tokens = len(prompt.input_ids)
    keys_values = prefilled.keys_values
    assert keys_values.is_contiguous()
    assert keys_values.nbytes == num_tokens * pieces.prefill.kv_shape.token_bytes
    keys_values.zero_()
    prefilled.logits.zero_()


def test_kv_shape_is_what_the_config_says(pieces: Pieces) -> None:
    text = json.loads((digits_path() / "config.json").read_text())["text_config"]
    bytes_per_number = torch.zeros((), dtype=torch.float32).nbytes
    expected = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"] * bytes_per_number
    assert pieces.prefill.kv_shape.token_bytes == expected
    assert pieces.prefill.kv_shape == pieces.decode.kv_shape


def test_the_restored_cache_is_a_copy_of_what_it_was_made_from(pieces: Pieces) -> None:
    prompt = pieces.tokenizer.tokenize(REQUESTS["text only"], [])
    keys_values = pieces.prefill.prefill(prompt.input_ids, None).keys_values
    expected = pieces.decode.step(pieces.decode.restore(keys_values), 9, len(prompt.input_ids))
    cache = pieces.decode.restore(keys_values)
    keys_values.fill_(7.0)
    torch.testing.assert_close(pieces.decode.step(cache, 9, len(prompt.input_ids)), expected, rtol=0, atol=0)


def test_all_pieces_of_a_checkpoint_have_one_identity(pieces: Pieces) -> None:
    identities = {piece.identity for piece in (pieces.tokenizer, pieces.encoder, pieces.prefill, pieces.decode)}
    assert len(identities) == 1
    identity = identities.pop()
    assert identity.name == "digits"
    assert len(identity.revision) == 12


def test_each_piece_keeps_only_its_part_of_the_weights(pieces: Pieces) -> None:
    model: LanguageModel = pieces.prefill
    assert not [name for name in _parameter_names(model) if "vision" in name or "projector" in name]
    assert not [name for name in _parameter_names(pieces.encoder) if "language" in name or "lm_head" in name]
    assert _parameter_names(pieces.encoder)


def test_prefill_refuses_embeddings_of_another_number_of_image_tokens(pieces: Pieces) -> None:
    prompt = pieces.tokenizer.tokenize(REQUESTS["one image"], [(32, 32)])
    with pytest.raises(InvalidPrompt, match=r"\[16, 96\].*\[15, 96\]"):
        pieces.prefill.prefill(prompt.input_ids, torch.zeros(15, 96))
    with pytest.raises(InvalidPrompt, match=r"\[16, 96\].*\[0, 96\]"):
        pieces.prefill.prefill(prompt.input_ids, None)


def test_prefill_refuses_a_prompt_that_fills_the_context(pieces: Pieces) -> None:
    with pytest.raises(PromptTooLong) as caught:
        pieces.prefill.prefill([9] * 1024, None)
    assert (caught.value.num_tokens, caught.value.context_tokens) == (1024, 1024)
    pieces.prefill.prefill([9] * 1023, None)


@pytest.mark.parametrize("shape", [(3, 2, 5, 2, 15), (2, 2, 5, 2, 16), (3, 2, 5, 3, 16)])
def test_restore_refuses_the_kv_of_another_model(shape: tuple[int, ...], pieces: Pieces) -> None:
    with pytest.raises(InvalidPrompt, match="one model"):
        pieces.decode.restore(torch.zeros(shape))
    with pytest.raises(InvalidPrompt, match="float16"):
        pieces.decode.restore(torch.zeros(3, 2, 5, 2, 16, dtype=torch.float16))


def _images_for(messages: Sequence[Message], digits: Sequence[Digit], offset: int) -> list[bytes]:
    num_images = sum(
        part["type"] == "image"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )
    return [digit.png_bytes() for digit in digits[offset : offset + num_images]]


def _split_answer(pieces: Pieces, messages: Sequence[Message], images: list[bytes]) -> tuple[list[int], torch.Tensor]:
    """The greedy answer and the logits [tokens, vocabulary] that it was taken from."""
    prompt = pieces.tokenizer.tokenize(messages, [image_size(image) for image in images])
    embeddings = None
    if images:
        embeddings = _through_bytes(pieces.encoder.encode(images))
        assert len(embeddings) == sum(prompt.num_image_tokens)
    prefilled = pieces.prefill.prefill(prompt.input_ids, embeddings)
    cache = pieces.decode.restore(_through_bytes(prefilled.keys_values))
    logits = [prefilled.logits]
    answer = [int(logits[-1].argmax())]
    while answer[-1] not in pieces.tokenizer.stop_token_ids and len(answer) < MAX_NEW_TOKENS:
        position = len(prompt.input_ids) + len(answer) - 1
        logits.append(pieces.decode.step(cache, answer[-1], position))
        answer.append(int(logits[-1].argmax()))
    return answer, torch.stack(logits)


def _whole_answer(model: Any, messages: Sequence[Message], images: list[bytes]) -> tuple[list[int], torch.Tensor]:
    processor = AutoProcessor.from_pretrained(digits_path())
    text = processor.apply_chat_template(list(messages), add_generation_prompt=True)
    opened = [Image.open(io.BytesIO(image)) for image in images]
    inputs = processor(text=[text], images=opened or None, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, output_logits=True, return_dict_in_generate=True
        )
    answer: list[int] = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return answer, torch.cat(output.logits)


def _through_bytes(tensor: torch.Tensor) -> torch.Tensor:
    raw = bytearray(tensor.numpy().tobytes())
    return torch.frombuffer(raw, dtype=tensor.dtype).reshape(tensor.shape)


def _parameter_names(piece: Any) -> list[str]:
    return [name for name, _ in piece._model.named_parameters()]


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TransformersPromptTokenizer.load(Path("nowhere"))
