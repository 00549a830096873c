"""Runs a checkpoint in the format of Hugging Face transformers as the pieces of `workers.models.vision_language_model`.

Reading order: `checkpoint` (what a folder holds and whether it can be split), `prompt_tokenizer` and
`text_stream` (text in and out), `vision_encoder` (encode), `language_model` (prefill and decode).

Invariants: no branch for a family of models, only for what a model has or lacks; nothing is fetched from the
network; no tensor operation at import, so that a fork server may preload this package.

Source: transformers 5.23, whose `generate` the pieces together reproduce token by token.
"""

from workers.models.transformers_adapter.language_model import TransformersLanguageModel
from workers.models.transformers_adapter.prompt_tokenizer import TransformersPromptTokenizer
from workers.models.transformers_adapter.text_stream import DecodedTextStream
from workers.models.transformers_adapter.vision_encoder import TransformersVisionEncoder

__all__ = [
    "DecodedTextStream",
    "TransformersLanguageModel",
    "TransformersPromptTokenizer",
    "TransformersVisionEncoder",
]
