"""Trains the packaged checkpoint: `python -m workers.models.train_digits [--out DIR] [--seed 0]`.

In: scikit-learn's handwritten digits. Out, in `--out` (by default the packaged folder `digits/`): float16
safetensors with config, generation config, tokenizer, processor and chat template; a few held-out samples as PNG;
and the model card, whose figures are measured on the held-out digits with the files that were just written.

Takes about eight minutes on one core and needs the extra `train` (scikit-learn).
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils.logging import disable_progress_bar

from workers.models.digits_dataset import DigitSplit, assert_disjoint, load_split
from workers.models.training.architecture import build_model, build_processor
from workers.models.training.conversations import corpus
from workers.models.training.curriculum import Curriculum, Recipe
from workers.models.training.evaluation import Evaluation, answer_all
from workers.models.training.model_card import model_card

logger = logging.getLogger(__name__)

SAMPLE_LABELS = (7, 3, 0, 4)


def main() -> None:
    """Trains, saves, evaluates what was saved, and writes the card and the samples."""
    parser = argparse.ArgumentParser(description="Train the packaged digits checkpoint.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    disable_progress_bar()
    torch.set_num_threads(1)
    split = load_split()
    recipe = Recipe(seed=arguments.seed)
    started_s = time.monotonic()
    train_checkpoint(split, recipe, arguments.out)
    training_s = time.monotonic() - started_s
    evaluation = Evaluation.of(arguments.out, split.held_out)
    card = model_card(evaluation, recipe, training_s)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    save_samples(arguments.out, split)
    make_readable(arguments.out)
    logger.info("trained in %.0f s; wrote %s\n%s", training_s, arguments.out, evaluation.table())


def train_checkpoint(split: DigitSplit, recipe: Recipe, folder: Path) -> None:
    """Trains on `split.train` alone and saves the checkpoint to `folder`.

    Raises `AssertionError` if a held-out image is among the training images.
    """
    assert_disjoint(split.train, split.held_out)
    torch.manual_seed(recipe.seed)
    processor = build_processor(corpus())
    model = build_model(processor)
    Curriculum(model, processor, split.train, recipe).run()
    save_checkpoint(model, processor, folder)


def save_checkpoint(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes the model as float16, half the bytes, with its processor. The evaluation is of these files."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)


def save_samples(folder: Path, split: DigitSplit) -> None:
    """Writes the first held-out scan of some digits that the model reads rightly as `samples/digit-<label>.png`."""
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    answers = answer_all(folder, [([digit], "What digit is this?") for digit in split.held_out])
    for label in SAMPLE_LABELS:
        right = f"This is the digit {label}."
        read = [d for d, answer in zip(split.held_out, answers, strict=True) if d.label == label and answer == right]
        (samples / f"digit-{label}.png").write_bytes(read[0].png_bytes())


def make_readable(folder: Path) -> None:
    """Gives every file mode 0644: safetensors are written as 0600, which a wheel would keep."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


if __name__ == "__main__":
    main()
