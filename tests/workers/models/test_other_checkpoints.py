"""Models other than the packaged one: run without a branch for them, or refused with what is missing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from workers.models.packaged import digits_path
from workers.models.transformers_adapter import (
    TransformersLanguageModel,
    TransformersPromptTokenizer,
    TransformersVisionEncoder,
)
from workers.models.vision_language_model import UnsupportedModel

NUM_TOKENS = 8
TINY_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PROMPT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello"}, {"type": "image"}]},
]


@pytest.fixture(scope="module")
def tiled_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Idefics3 (SmolVLM's architecture): several tiles per image, with text between them."""
    path = tmp_path_factory.mktemp("tiled")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(digits_path())
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = (digits_path() / "chat_template.jinja").read_text()
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=template)
    config = Idefics3Config(
        vision_config=TINY_VISION,
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "eos_token_id": 2, **TINY_TEXT},
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=0,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_model_with_tiled_images_is_token_identical_to_generate(tiled_checkpoint: Path) -> None:
    tokenizer = TransformersPromptTokenizer.load(tiled_checkpoint)
    model = TransformersLanguageModel.load(tiled_checkpoint)
    images = [_noise(40, 70), _noise(64, 32)]
    prompt = tokenizer.tokenize(PROMPT, [(70, 40), (32, 64)])
    embeddings = TransformersVisionEncoder.load(tiled_checkpoint).encode(images)
    assert prompt.num_image_tokens == [20, 12]
    assert len(embeddings) == 32

    prefilled = model.prefill(prompt.input_ids, embeddings)
    cache = model.restore(prefilled.keys_values)
    answer, logits = [], prefilled.logits
    for position in range(len(prompt.input_ids), len(prompt.input_ids) + NUM_TOKENS):
        answer.append(int(logits.argmax()))
        logits = model.step(cache, answer[-1], position)

    input_ids, expected = _generated(tiled_checkpoint, images)
    assert prompt.input_ids == input_ids
    assert answer == expected


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (Qwen2VLConfig(text_config=TINY_TEXT, vision_config={"depth": 1}), "M-RoPE"),
        (Qwen3VLConfig(text_config=TINY_TEXT, vision_config={"depth": 1}), "M-RoPE"),
        (Gemma3Config(text_config=TINY_TEXT, vision_config=TINY_VISION), "token_type_ids"),
        (
            LlavaConfig(
                text_config={"model_type": "mistral", "sliding_window": 64, **TINY_TEXT},
                vision_config={"model_type": "clip_vision_model", **TINY_VISION},
            ),
            "DynamicSlidingWindowLayer",
        ),
        (LlamaConfig(**TINY_TEXT), "no image-text-to-text model"),
    ],
    ids=["qwen2_vl", "qwen3_vl", "gemma3", "sliding window", "text only"],
)
def test_a_model_that_needs_more_is_refused_before_its_weights_are_read(
    config: Any, missing: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    for piece in (TransformersPromptTokenizer, TransformersVisionEncoder, TransformersLanguageModel):
        with pytest.raises(UnsupportedModel, match=missing) as caught:
            piece.load(tmp_path)
        assert missing in caught.value.missing


def _noise(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 90).convert("RGB").save(file, format="PNG")
    return file.getvalue()


def _generated(path: Path, images: list[bytes]) -> tuple[list[int], list[int]]:
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    text = processor.apply_chat_template(PROMPT, add_generation_prompt=True)
    opened = [Image.open(io.BytesIO(image)) for image in images]
    inputs = processor(text=[text], images=[opened], return_tensors="pt")
    prompt: list[int] = inputs["input_ids"][0].tolist()
    with torch.inference_mode():
        # As many tokens on both sides, whatever they are: random weights may well say "end" early.
        output = model.generate(
            **inputs, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, eos_token_id=None, do_sample=False
        )
    return prompt, output[0, len(prompt) :].tolist()
