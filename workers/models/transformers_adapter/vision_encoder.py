"""Encode: image files to embeddings, with the vision tower and projector of a checkpoint.

In: the bytes of images. Out: [image tokens, hidden], what the language model expects in place of its image tokens.

Leaves out: the language model, which is dropped after loading.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoProcessor

from workers.models.images import DEFAULT_LIMITS, ImageLimits, decode_image
from workers.models.transformers_adapter.checkpoint import (
    checkpoint_identity,
    drop_decoder,
    load_config,
    load_model,
)
from workers.models.vision_language_model import ModelIdentity, UnsupportedModel


class TransformersVisionEncoder:
    """A `VisionEncoder` over transformers' `get_image_features`. Build it with `load`."""

    def __init__(self, model: Any, processor: Any, identity: ModelIdentity, limits: ImageLimits) -> None:
        self._model = model
        self._image_processor = processor.image_processor
        self._identity = identity
        self._limits = limits
        # generate() selects the processor's outputs in the same way.
        self._feature_inputs = frozenset(inspect.signature(model.base_model.get_image_features).parameters)

    @classmethod
    def load(cls, path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> Self:
        """Loads the checkpoint in the folder `path`, in float32, and drops its language model.

        Raises `FileNotFoundError`, and `UnsupportedModel` for a model that needs more than embeddings.
        """
        config = load_config(path)
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        model = load_model(path, config, torch.float32)
        drop_decoder(model)
        return cls(model, processor, checkpoint_identity(path), limits)

    @property
    def identity(self) -> ModelIdentity:
        """Which model this belongs to."""
        return self._identity

    @property
    def hidden_size(self) -> int:
        """The width of an embedding: the language model's."""
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def encode(self, images: Sequence[bytes]) -> torch.Tensor:
        """The embeddings of image files, in order: [image tokens of all images, hidden], contiguous, float32.

        Raises `InvalidImage` and `ImageTooLarge`.
        """
        if not images:
            return torch.empty(0, self.hidden_size, dtype=self.dtype)
        decoded = [decode_image(image, self._limits) for image in images]
        with torch.inference_mode():
            # RGB by now, height and width first: told, because a tiny image's channels can't be guessed from its shape.
            pixels = self._image_processor(decoded, return_tensors="pt", input_data_format="channels_last")
            inputs = {name: value for name, value in pixels.items() if name in self._feature_inputs}
            output = self._model.base_model.get_image_features(**inputs)
        if getattr(output, "deepstack_features", None) is not None:
            raise UnsupportedModel(self._identity.name, "it feeds image features into several layers (deepstack)")
        # Outside inference mode: what the caller gets is an ordinary tensor, which it may write to.
        rows = [features.reshape(-1, self.hidden_size) for features in output.pooler_output]
        return torch.cat(rows).to(self.dtype).contiguous()
