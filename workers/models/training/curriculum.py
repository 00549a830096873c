"""The two stages of training: first to see, then to talk.

Stage 1 trains the vision tower and the projector with a throw-away linear head that names the digit. Without it the
joint training takes several times as long to discover that the image matters. Stage 2 trains everything on
conversations: the loss is on the tokens of the answers, plus a small share of stage 1's loss.

In: a model, its processor, and the digits that may be learnt from. Out: the same model, trained in place.
Invariants: float32, one device (CPU), every random choice comes from `Recipe.seed`.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from workers.models.digits_dataset import Digit
from workers.models.training.architecture import NUM_IMAGE_TOKENS
from workers.models.training.augmentation import augment
from workers.models.training.conversations import Conversation, random_conversation

logger = logging.getLogger(__name__)

_IGNORED = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. The defaults made the packaged checkpoint."""

    seed: int = 0
    stage1_steps: int = 2000
    stage1_images: int = 64
    stage1_learning_rate: float = 3e-3
    stage2_steps: int = 1200
    stage2_conversations: int = 32
    stage2_learning_rate: float = 2.5e-3
    vision_rate_factor: float = 0.2
    weight_decay: float = 0.05
    naming_loss_weight: float = 0.3
    late_naming_loss_weight: float = 0.05  # for the last 30 % of stage 2


class Curriculum:
    """One run of the recipe over one model; `run()` does both stages."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        digits: Sequence[Digit],
        recipe: Recipe,
    ) -> None:
        self._model = model
        self._processor = processor
        self._recipe = recipe
        self._rng = random.Random(recipe.seed)  # noqa: S311 - a reproducible training run, no secret
        self._noise = torch.Generator().manual_seed(recipe.seed)
        self._images = torch.stack([_unit_pixels(digit) for digit in digits])
        self._labels = torch.tensor([digit.label for digit in digits])
        self._rows_of_label = [torch.nonzero(self._labels == label).flatten().tolist() for label in range(10)]
        self._naming_head = nn.Linear(model.config.text_config.hidden_size, 10)

    def run(self) -> None:
        """Trains the model in place and leaves it in evaluation mode."""
        self._model.train()
        self._learn_to_see()
        self._learn_to_talk()
        self._model.eval()

    def _learn_to_see(self) -> None:
        recipe = self._recipe
        optimizer = self._optimizer(recipe.stage1_learning_rate, 1.0, language=False)
        for step in _scheduled(optimizer, recipe.stage1_steps):
            rows = torch.randint(len(self._images), (recipe.stage1_images,), generator=self._noise)
            loss = self._naming_loss(self._features(rows.tolist()), self._labels[rows])
            self._update(optimizer, loss)
            if step % 250 == 0:
                logger.info("stage 1, step %d: loss %.3f", step, loss.item())

    def _learn_to_talk(self) -> None:
        recipe = self._recipe
        optimizer = self._optimizer(recipe.stage2_learning_rate, recipe.vision_rate_factor, language=True)
        for step in _scheduled(optimizer, recipe.stage2_steps):
            batch = [random_conversation(self._rng) for _ in range(recipe.stage2_conversations)]
            late = step >= 0.7 * recipe.stage2_steps
            weight = recipe.late_naming_loss_weight if late else recipe.naming_loss_weight
            talking_loss, naming_loss = self._talking_losses(batch)
            self._update(optimizer, talking_loss + weight * naming_loss)
            if step % 50 == 0:
                logger.info("stage 2, step %d: loss %.4f, naming %.4f", step, talking_loss.item(), naming_loss.item())

    def _talking_losses(self, batch: list[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = [label for conversation in batch for label in conversation.labels]
        rows = [self._rng.choice(self._rows_of_label[label]) for label in labels]
        features = self._features(rows)
        input_ids, attention_mask, targets = tokenize_batch(batch, self._processor)
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(features))},
            use_cache=False,
        )
        predicted = output.logits[:, :-1].flatten(0, 1)
        talking_loss = functional.cross_entropy(predicted, targets[:, 1:].flatten(), ignore_index=_IGNORED)
        return talking_loss, self._naming_loss(features, torch.tensor(labels))

    def _features(self, rows: list[int]) -> torch.Tensor:
        """Image features [images, tokens, hidden] of augmented digits."""
        pixels = augment(self._images[rows], self._noise) * 2 - 1  # the processor's mean and std are 0.5
        output = self._model.model.get_image_features(pixel_values=pixels.expand(-1, 3, -1, -1))
        return torch.stack(list(output.pooler_output))

    def _naming_loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self._naming_head(features.mean(dim=1)), labels)

    def _optimizer(self, learning_rate: float, vision_factor: float, language: bool) -> torch.optim.Optimizer:
        inner = self._model.model
        seeing = [inner.vision_tower, inner.multi_modal_projector, self._naming_head]
        groups = [{"params": [p for part in seeing for p in part.parameters()], "lr": learning_rate * vision_factor}]
        if language:
            groups.append({"params": list(inner.language_model.parameters()), "lr": learning_rate})
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=self._recipe.weight_decay)

    def _update(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()


def tokenize_batch(
    batch: Sequence[Conversation], processor: LlavaProcessor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The conversations as (input_ids, attention_mask, targets), each an int64 tensor [conversations, tokens].

    Padded on the right. `targets` holds the tokens of the answers with their end, and -100 elsewhere.
    """
    tokenizer = processor.tokenizer
    texts = [
        processor.apply_chat_template(conversation.messages, tokenize=False).replace(
            processor.image_token, processor.image_token * NUM_IMAGE_TOKENS
        )
        for conversation in batch
    ]
    tokens = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    assistant_id = tokenizer.convert_tokens_to_ids("<|assistant|>")
    answers = [_answer_mask(row, assistant_id, tokenizer.eos_token_id) for row in tokens["input_ids"].tolist()]
    targets = tokens["input_ids"].masked_fill(~torch.tensor(answers), _IGNORED)
    return tokens["input_ids"], tokens["attention_mask"], targets


def _answer_mask(token_ids: list[int], assistant_id: int, end_id: int) -> list[bool]:
    mask, answering = [], False
    for token_id in token_ids:
        mask.append(answering)
        if token_id == assistant_id:
            answering = True
        elif token_id == end_id:
            answering = False
    return mask


def _scheduled(optimizer: torch.optim.Optimizer, num_steps: int) -> Iterator[int]:
    """The steps of a stage; sets the learning rates before each: 50 steps up, then half a cosine down to zero."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(num_steps):
        factor = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        yield step


def _unit_pixels(digit: Digit) -> torch.Tensor:
    return torch.from_numpy(np.array(digit.image)).float().div(255).unsqueeze(0)
