"""What the tiny model is taught to say: questions about digits, their one right answer, and random conversations.

In: a seeded `random.Random`. Out: a `Conversation`, the chat messages of transformers in which each image part
stands for one entry of `labels`, in order. The answers are functions of the digits alone, so that the same
tables serve to train and to judge.

Invariants: a follow-up without an image is about the image or images of the latest turn that has some; every
answer about two images names both before it compares or adds them, so that each word follows from the ones before.

Leaves out: pixels. Which scan shows a label is chosen by the caller.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SYSTEM_PROMPTS = ("You are a helpful assistant.", "You read handwritten digits.", "Answer briefly.", "Be brief.")
_SHARE_TEXT_ONLY = 0.12
_SHARE_TWO_IMAGES = 0.30
_SHARE_SYSTEM_PROMPT = 0.12
_SHARE_TEXT_BEFORE_IMAGES = 0.25
_SHARE_NEW_IMAGE = 0.4  # of the turns after the first


@dataclass(frozen=True)
class Question:
    """A question in its wordings, the first being the documented one, and the answer as a function of the digits."""

    name: str
    wordings: tuple[str, ...]
    answer: Callable[..., str]


@dataclass(frozen=True)
class Conversation:
    """Chat messages and the digit that each of their image parts shows, in order."""

    messages: list[Message]
    labels: list[int]


def user_message(text: str, num_images: int = 0, text_first: bool = False) -> Message:
    """A user's turn in the chat format of transformers: image parts, then the text, or the other way round."""
    images: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    words = [{"type": "text", "text": text}]
    return {"role": "user", "content": words + images if text_first else images + words}


def assistant_message(text: str) -> Message:
    """The model's turn in the chat format of transformers."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _parity(digit: int) -> str:
    return "odd" if digit % 2 else "even"


def _counted(digit: int) -> str:
    return ", ".join(str(number) for number in range(digit + 1)) + "."


def _larger(first: int, second: int) -> str:
    if first == second:
        return f"{first} and {second} are equal."
    return f"Of {first} and {second}, {max(first, second)} is larger."


ONE_IMAGE = (
    Question(
        "digit",
        (
            "What digit is this?",
            "Which digit is this?",
            "What digit is shown?",
            "What digit is in the image?",
            "What number is this?",
            "Read the digit.",
            "What is this?",
        ),
        lambda digit: f"This is the digit {digit}.",
    ),
    Question(
        "parity",
        ("Is it even or odd?", "Is this digit even or odd?", "Is the digit odd or even?", "Even or odd?"),
        lambda digit: f"The digit {digit} is {_parity(digit)}.",
    ),
    Question(
        "next",
        ("What comes next?", "What number comes next?", "Which number comes after it?", "What comes after this digit?"),
        lambda digit: f"After {digit} comes {digit + 1}.",
    ),
    Question(
        "describe",
        ("Describe the image.", "Describe this image.", "Describe the picture.", "What do you see?"),
        lambda digit: f"The image shows a handwritten digit. It is {_WORDS[digit]}, an {_parity(digit)} number.",
    ),
    Question(
        "word",
        ("Write it as a word.", "Spell the digit.", "Spell it."),
        lambda digit: f"{_WORDS[digit].capitalize()}.",
    ),
    Question(
        "count",
        ("Count up to it.", "Count up to this digit.", "Count to the digit."),
        _counted,
    ),
)

TWO_IMAGES = (
    Question(
        "read both",
        ("What digits are these?", "Which digits are these?", "Read both digits.", "What do you see?"),
        lambda first, second: f"These are the digits {first} and {second}.",
    ),
    Question(
        "larger",
        ("Which digit is larger?", "Which one is larger?", "Which is larger?", "Compare them."),
        _larger,
    ),
    Question(
        "sum",
        ("What is their sum?", "Add them.", "Add the digits.", "What is the sum?"),
        lambda first, second: f"{first} + {second} = {first + second}.",
    ),
)

_NO_IMAGE = "There is no image. Please send me a handwritten digit."
_WHO = "I am a tiny vision-language model. I read handwritten digits."
TEXT_ONLY = {
    "Hello!": "Hello! Please send me a handwritten digit.",
    "Hello": "Hello! Please send me a handwritten digit.",
    "Hi": "Hello! Please send me a handwritten digit.",
    "Who are you?": _WHO,
    "What are you?": _WHO,
    "What can you do?": "I read a handwritten digit, say if it is even or odd, and count up to it.",
    "Thank you!": "You are welcome.",
    "Thanks": "You are welcome.",
    "Goodbye!": "Goodbye!",
    "What digit is this?": _NO_IMAGE,
    "Describe the image.": _NO_IMAGE,
    **{f"Count to {_WORDS[digit]}.": _counted(digit) for digit in range(10)},
    **{f"Is {digit} even or odd?": f"The digit {digit} is {_parity(digit)}." for digit in range(10)},
    **{f"What comes after {digit}?": f"After {digit} comes {digit + 1}." for digit in range(10)},
}


def random_conversation(rng: random.Random) -> Conversation:
    """A conversation of one to three turns with its answers: 12 % without images, 30 % about pairs of images."""
    messages: list[Message] = []
    if rng.random() < _SHARE_SYSTEM_PROMPT:
        messages.append({"role": "system", "content": [{"type": "text", "text": rng.choice(_SYSTEM_PROMPTS)}]})
    num_turns = rng.choices((1, 2, 3), weights=(5, 3, 2))[0]
    kind = rng.random()
    if kind < _SHARE_TEXT_ONLY:
        return _text_only(rng, messages, num_turns)
    questions, num_images = (TWO_IMAGES, 2) if kind < _SHARE_TEXT_ONLY + _SHARE_TWO_IMAGES else (ONE_IMAGE, 1)
    return _about_images(rng, messages, num_turns, questions, num_images)


def corpus() -> list[str]:
    """Every text that a conversation may hold: what the tokenizer is trained on."""
    texts = [*_SYSTEM_PROMPTS, *TEXT_ONLY, *TEXT_ONLY.values()]
    for question in ONE_IMAGE:
        texts += [*question.wordings, *(question.answer(digit) for digit in range(10))]
    for question in TWO_IMAGES:
        pairs = [(first, second) for first in range(10) for second in range(10)]
        texts += [*question.wordings, *(question.answer(*pair) for pair in pairs)]
    return texts


def _text_only(rng: random.Random, messages: list[Message], num_turns: int) -> Conversation:
    # "What digit is this?" has another answer once an image was sent, so each turn here is without one.
    for _ in range(num_turns):
        prompt = rng.choice(list(TEXT_ONLY))
        messages += [user_message(prompt), assistant_message(TEXT_ONLY[prompt])]
    return Conversation(messages, [])


def _about_images(
    rng: random.Random, messages: list[Message], num_turns: int, questions: tuple[Question, ...], num_images: int
) -> Conversation:
    labels: list[int] = []
    for turn in range(num_turns):
        sends_images = turn == 0 or rng.random() < _SHARE_NEW_IMAGE
        if sends_images:
            labels += [rng.randrange(10) for _ in range(num_images)]
        question = rng.choice(questions)
        text_first = rng.random() < _SHARE_TEXT_BEFORE_IMAGES
        messages.append(user_message(rng.choice(question.wordings), num_images * sends_images, text_first))
        messages.append(assistant_message(question.answer(*labels[-num_images:])))
    return Conversation(messages, labels)
