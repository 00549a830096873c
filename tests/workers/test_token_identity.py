"""The graph's tokens against `model.generate` of the same checkpoint in one process."""

import asyncio
import io
import random
from typing import Any

import pytest
import torch
from PIL import Image

from bus import Bus
from schemas.generate import ChatMessage, ImagePart
from tests.graph_fixture import RunningGraph, ask, client_config, user
from workers.models.digits_dataset import held_out_pngs
from workers.models.packaged import digits_path

NUM_REQUESTS = 64
MAX_TOKENS = 24
QUESTIONS = (
    "What digit is this?",
    "Is it even or odd?",
    "Which digit comes next?",
    "Describe the picture.",
    "hello",
    "Zähle bis drei, bitte! 你好",
)


def requests() -> list[list[ChatMessage]]:
    """Mixed chats, the same in every run: 0, 1 and 2 images, 1 to 3 turns, some 5 to 400 tokens of text."""
    rng = random.Random(0)
    pictures = [png for png, _ in held_out_pngs()]
    chats = []
    for index in range(NUM_REQUESTS):
        images = [rng.choice(pictures) for _ in range(index % 3)]
        filler = "the " * (0 if index % 4 else rng.randrange(1, 380))
        chat = [user(filler + rng.choice(QUESTIONS), *images)]
        for _ in range(index % 3 if index % 2 else 0):
            chat += [ChatMessage(role="assistant", content="This is the digit 7."), user(rng.choice(QUESTIONS))]
        chats.append(chat)
    return chats


@pytest.fixture(scope="module")
def generated() -> list[list[int]]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(digits_path())
    model = AutoModelForImageTextToText.from_pretrained(digits_path(), dtype=torch.float32).eval()
    answers = []
    for chat in requests():
        prompt = processor.apply_chat_template([_template(message) for message in chat], add_generation_prompt=True)
        images = [_picture(part.image) for message in chat for part in message.content if isinstance(part, ImagePart)]
        inputs = processor(text=prompt, images=images or None, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


async def test_the_graph_gives_generate_s_tokens(graph: RunningGraph, generated: list[list[int]]) -> None:
    limit = asyncio.Semaphore(8)

    async def through_the_graph(bus: Bus, chat: list[ChatMessage]) -> tuple[int, list[int]]:
        async with limit:
            answer = await ask(bus, chat, max_tokens=MAX_TOKENS)
        return answer.done.usage.prompt_tokens, answer.token_ids

    async with Bus.open(client_config(graph), data_plane=False) as bus:
        answers = await asyncio.gather(*(through_the_graph(bus, chat) for chat in requests()))
    lengths = [length for length, _ in answers]
    assert min(lengths) < 20
    assert max(lengths) > 300
    assert [tokens for _, tokens in answers] == generated


def _template(message: ChatMessage) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.content
    ]
    return {"role": message.role, "content": parts}


def _picture(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")
