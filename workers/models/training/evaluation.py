"""Held-out accuracy of a saved checkpoint: the share of answers that are right to the last character.

In: a checkpoint's folder and digits it never saw. Out: `Evaluation`, the counts per question. The files are read
back and run as anybody would: transformers' `generate`, greedy, float32, images through the processor as PIL images.

Invariants: the pairs of digits are drawn with a fixed seed; an answer counts if the whole text is equal to
the expected one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

from workers.models.digits_dataset import Digit
from workers.models.training.conversations import ONE_IMAGE, TEXT_ONLY, TWO_IMAGES, user_message

NUM_PAIRS = 200
MAX_NEW_TOKENS = 48

_PAIR_SEED = 0
_BATCH = 40

Prompt = tuple[Sequence[Digit], str]


@dataclass(frozen=True)
class Score:
    """How many of the answers to one question were right."""

    question: str
    num_right: int
    num_asked: int

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 to 1."""
        return self.num_right / self.num_asked


@dataclass(frozen=True)
class Evaluation:
    """The scores of a checkpoint, in the order in which they are shown."""

    scores: tuple[Score, ...]

    @classmethod
    def of(cls, folder: Path, digits: Sequence[Digit]) -> Evaluation:
        """Runs the checkpoint in `folder` over every question and all `digits`: about ten seconds for 360."""
        return cls((*_one_image_scores(folder, digits), *_pair_scores(folder, digits), _text_score(folder)))

    def table(self) -> str:
        """The scores as rows of a Markdown table."""
        rows = [f"| {s.question} | {s.num_right} / {s.num_asked} | {s.accuracy:.1%} |" for s in self.scores]
        return "\n".join(["| question | right | share |", "|---|---|---|", *rows])


def answer_all(folder: Path, prompts: Sequence[Prompt]) -> list[str]:
    """The checkpoint's greedy answers to prompts of one user turn, each with its images before the text."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    answers: list[str] = []
    for start in range(0, len(prompts), _BATCH):
        answers += _answer_batch(model, processor, prompts[start : start + _BATCH])
    return answers


def _one_image_scores(folder: Path, digits: Sequence[Digit]) -> list[Score]:
    scores = []
    for question in ONE_IMAGE:
        asked = [([digit], question.wordings[0], question.answer(digit.label)) for digit in digits]
        scores.append(_score(folder, question.wordings[0], asked))
    naming = ONE_IMAGE[0]
    wordings = [
        ([digit], naming.wordings[row % len(naming.wordings)], naming.answer(digit.label))
        for row, digit in enumerate(digits)
    ]
    scores.append(_score(folder, "the same as the first, in all its wordings", wordings))
    varied = [([_inverted(digit)], naming.wordings[0], naming.answer(digit.label)) for digit in digits]
    scores.append(_score(folder, "the first, dark ink on white, 140x140 RGB", varied))
    return scores


def _pair_scores(folder: Path, digits: Sequence[Digit]) -> list[Score]:
    rng = random.Random(_PAIR_SEED)  # noqa: S311 - fixed pairs, no secret
    pairs = [(rng.choice(digits), rng.choice(digits)) for _ in range(NUM_PAIRS)]
    return [
        _score(
            folder,
            f"two images: {question.wordings[0]}",
            [(pair, question.wordings[0], question.answer(*(digit.label for digit in pair))) for pair in pairs],
        )
        for question in TWO_IMAGES
    ]


def _text_score(folder: Path) -> Score:
    asked: list[tuple[Sequence[Digit], str, str]] = [([], prompt, answer) for prompt, answer in TEXT_ONLY.items()]
    return _score(folder, "text only (the prompts of the training)", asked)


def _score(folder: Path, name: str, asked: Sequence[tuple[Sequence[Digit], str, str]]) -> Score:
    answers = answer_all(folder, [(digits, text) for digits, text, _ in asked])
    right = [answer == expected for answer, (_, _, expected) in zip(answers, asked, strict=True)]
    return Score(name, sum(right), len(right))


@torch.inference_mode()
def _answer_batch(model: torch.nn.Module, processor: object, prompts: Sequence[Prompt]) -> list[str]:
    conversations = [[user_message(text, num_images=len(digits))] for digits, text in prompts]
    texts = [processor.apply_chat_template(c, add_generation_prompt=True) for c in conversations]  # type: ignore[attr-defined]
    images = [digit.image for digits, _ in prompts for digit in digits]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")  # type: ignore[operator]
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)  # type: ignore[operator]
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    answers: list[str] = processor.batch_decode(new_tokens, skip_special_tokens=True)  # type: ignore[attr-defined]
    return answers


def _inverted(digit: Digit) -> Digit:
    large = ImageOps.invert(digit.image).resize((140, 140), Image.Resampling.BICUBIC)
    return Digit(large.convert("RGB"), digit.label)
