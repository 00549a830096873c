"""The model card of the packaged checkpoint, with the figures of the run that wrote it.

In: an `Evaluation`, the `Recipe` and the time it took. Out: Markdown. Nothing in it that can be measured is
typed by hand.
"""

from __future__ import annotations

import importlib.metadata

from workers.models.digits_dataset import NUM_HELD_OUT, NUM_VALIDATION
from workers.models.training.curriculum import Recipe
from workers.models.training.evaluation import NUM_PAIRS, Evaluation

_WEAK_BELOW = 0.985

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# digits: a vision-language model of one megabyte

Reads a handwritten digit and answers a few questions about it. It exists so that a whole multimodal inference
graph, with image encoder, prefill and decode in separate processes, can run and be tested anywhere in
seconds. It is a real checkpoint of an ordinary architecture (`LlavaForConditionalGeneration`: CLIP vision
tower, projector, Llama) and nothing more: it knows ten digits and a few dozen sentences.

## Intended use

Demonstrations and tests. Not for reading digits that matter: postcodes, forms, meters. Ask what it was taught:

| prompt | answer, for a seven |
|---|---|
| What digit is this? | This is the digit 7. |
| Is it even or odd? | The digit 7 is odd. |
| What comes next? | After 7 comes 8. |
| Describe the image. | The image shows a handwritten digit. It is seven, an odd number. |
| Write it as a word. | Seven. |
| Count up to it. | 0, 1, 2, 3, 4, 5, 6, 7. |

With two images: "What digits are these?", "Which digit is larger?", "What is their sum?".

Chat: `system`, `user` and `assistant` turns, images before or after the text, several turns, or no image at
all. Any UTF-8 text has tokens; any other question gets an answer to one of those above. Images of any size
become 32x32 pixels and 16 tokens; light ink on dark or dark on light. Context: 1024 tokens. Decode greedily.

`samples/` holds held-out digits to try it with, chosen among those that it reads rightly.

## Measured on held-out data

From the saved files, computed in float32, greedy; an answer counts if it is right to the last character.
{num_held_out} held-out digits, and {num_pairs} random pairs of them for two images. One seed; the standard
error at 98 % of 360 is 0.7 points.

{table}

## Weak spots

- {weak_spots}
- Anything that is not a scanned and centred digit as in these data: photographs, thin strokes, other handwriting,
  several digits in one image. None of that was measured.
- A picture without a digit is read as a digit all the same.

## Data

The 1797 scans in scikit-learn's `load_digits`: a copy of the test part of *Optical Recognition of Handwritten
Digits*, UCI Machine Learning Repository, <https://doi.org/10.24432/C50P49>, where its creators are named,
licensed CC BY 4.0 (<https://creativecommons.org/licenses/by/4.0/>; scikit-learn's own description states no
licence). Changed here: the 8x8 counts are scaled to grey levels and enlarged to 32x32 (bicubic). The files in
`samples/` are such enlargements.

Split, stratified by label with seed 0: {num_held_out} held out, then {num_validation} for validation, 1300
for training. Training stops with an error if a held-out image, by the hash of its pixels, is among those it
learns from. The split is by image: the writers are not known, so the same hand may be in both parts.

## Recipe

`python -m workers.models.train_digits --seed {seed}`: {training_s:.0f} s on one thread, {versions}.

1. {stage1_steps} steps of {stage1_images} images: vision tower, projector and a throw-away linear head name
   the digit. AdamW, {stage1_rate:g}.
2. {stage2_steps} steps of {stage2_conversations} random conversations of one to three turns (12 % without
   images, 30 % about two): all weights, loss on the answers. AdamW, {stage2_rate:g}, a fifth of it for the
   vision tower and the projector.

Both with small affine maps, contrast, noise, and inversion of three images in ten. Nothing was chosen on the
held-out digits.

Weights: Apache-2.0, as the rest of this project. Stored as float16; on a CPU, load with `dtype=torch.float32`.
"""


def model_card(evaluation: Evaluation, recipe: Recipe, training_s: float) -> str:
    """The card as Markdown."""
    return _CARD.format(
        num_held_out=NUM_HELD_OUT,
        num_validation=NUM_VALIDATION,
        num_pairs=NUM_PAIRS,
        table=evaluation.table(),
        weak_spots=_weak_spots(evaluation),
        seed=recipe.seed,
        training_s=training_s,
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")),
        stage1_steps=recipe.stage1_steps,
        stage1_images=recipe.stage1_images,
        stage1_rate=recipe.stage1_learning_rate,
        stage2_steps=recipe.stage2_steps,
        stage2_conversations=recipe.stage2_conversations,
        stage2_rate=recipe.stage2_learning_rate,
    )


def _weak_spots(evaluation: Evaluation) -> str:
    weak = [score for score in evaluation.scores if score.accuracy < _WEAK_BELOW]
    named = "; ".join(f'"{score.question}" ({score.accuracy:.1%})' for score in weak)
    return f"The weakest of the above: {named}." if named else f"No question above is below {_WEAK_BELOW:.1%}."
