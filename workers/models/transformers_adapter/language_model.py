"""Prefill and decode: token ids, embeddings and K/V to logits, with the language model of a checkpoint.

In: ids and image embeddings, or the K/V that another process computed. Out: logits, and K/V as one dense tensor.

Invariants: positions are passed explicitly, none is remembered between calls; the embeddings are put where the image
tokens are by this module, the same for every model, and the model then sees `inputs_embeds` alone.

Leaves out: the vision tower and projector, which are dropped after loading; sampling; where K/V blocks live.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import DynamicCache

from workers.models.transformers_adapter.checkpoint import (
    checkpoint_identity,
    context_tokens,
    drop_all_but_decoder,
    load_config,
    load_model,
)
from workers.models.vision_language_model import (
    InvalidPrompt,
    KvShape,
    ModelIdentity,
    Prefilled,
    PromptTooLong,
    UnsupportedModel,
)


class TransformersLanguageModel:
    """A `LanguageModel` over a transformers model and its `DynamicCache`. Build it with `load`."""

    def __init__(self, model: Any, identity: ModelIdentity) -> None:
        self._model = model
        self._identity = identity
        self._image_token_id = int(model.config.image_token_id)
        self._kv_shape = _probe_kv_shape(model, identity)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Loads the checkpoint in the folder `path`, in float32, and drops its vision tower and projector.

        Raises `FileNotFoundError`, and `UnsupportedModel` for a model that needs more than embeddings and uniform K/V.
        """
        model = load_model(path, load_config(path), torch.float32)
        drop_all_but_decoder(model)
        return cls(model, checkpoint_identity(path))

    @property
    def identity(self) -> ModelIdentity:
        """Which model this belongs to."""
        return self._identity

    @property
    def kv_shape(self) -> KvShape:
        """The layout of the K/V that `prefill` returns and `restore` takes."""
        return self._kv_shape

    @property
    def hidden_size(self) -> int:
        """The width of the embeddings that `prefill` takes."""
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return self._kv_shape.dtype

    @property
    def context_tokens(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return context_tokens(self._model.config)

    def prefill(self, input_ids: Sequence[int], embeddings: torch.Tensor | None) -> Prefilled:
        """Runs the whole prompt once; `embeddings` [image tokens, hidden] or None.

        Raises `InvalidPrompt` if there are not as many embeddings as image tokens, and `PromptTooLong`.
        """
        if not input_ids:
            raise InvalidPrompt("it has no tokens")
        if len(input_ids) >= self.context_tokens:
            raise PromptTooLong(len(input_ids), self.context_tokens)
        num_image_tokens = sum(token_id == self._image_token_id for token_id in input_ids)
        self._require_embeddings(embeddings, num_image_tokens)
        with torch.inference_mode():
            output = self._run(self._merged(input_ids, embeddings), 0, DynamicCache(config=self._model.config))
        return Prefilled(output.logits[0, -1].clone(), _stacked(output.past_key_values))

    def restore(self, keys_values: torch.Tensor) -> DynamicCache:
        """A cache to continue from, made of [layers, 2, tokens, kv_heads, head_dim]; the values are copied.

        Raises `InvalidPrompt` for another shape or dtype.
        """
        shape = self._kv_shape
        expected = (shape.num_layers, 2, shape.num_kv_heads, shape.head_dim)
        got = (*keys_values.shape[:2], *keys_values.shape[3:])
        if got != expected or keys_values.dtype != shape.dtype:
            raise InvalidPrompt(
                f"its K/V are {keys_values.dtype} {list(keys_values.shape)}, this model keeps {shape.dtype} "
                f"[{shape.num_layers}, 2, tokens, {shape.num_kv_heads}, {shape.head_dim}]: prefill and decode with "
                "one model"
            )
        cache = DynamicCache(config=self._model.config)
        # [layers, 2, tokens, heads, dim] -> [layers, 2, 1, heads, tokens, dim]; a layer's update() appends a copy.
        for layer, (keys, values) in enumerate(keys_values.transpose(2, 3).unsqueeze(2)):
            cache.update(keys, values, layer)
        return cache

    def step(self, cache: DynamicCache, token_id: int, position: int) -> torch.Tensor:
        """Appends one token to the cache and returns the logits [vocabulary] for the next."""
        with torch.inference_mode():
            embedded = self._model.get_input_embeddings()(torch.tensor([[token_id]]))
            logits: torch.Tensor = self._run(embedded, position, cache).logits[0, -1]
        return logits

    def _run(self, embedded: torch.Tensor, first_position: int, cache: DynamicCache) -> Any:
        num_tokens = embedded.shape[1]
        return self._model(
            inputs_embeds=embedded,
            position_ids=torch.arange(first_position, first_position + num_tokens).unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def _merged(self, input_ids: Sequence[int], embeddings: torch.Tensor | None) -> torch.Tensor:
        """The embedded prompt [1, tokens, hidden] with image tokens replaced, in order."""
        token_ids = torch.tensor([list(input_ids)])
        of_image = token_ids == self._image_token_id
        # An image token may lie outside of the embedding table; its row is replaced anyway.
        embedded: torch.Tensor = self._model.get_input_embeddings()(token_ids.masked_fill(of_image, 0))
        if embeddings is None:
            return embedded
        return embedded.masked_scatter(of_image.unsqueeze(-1), embeddings.to(embedded.dtype))

    def _require_embeddings(self, embeddings: torch.Tensor | None, num_image_tokens: int) -> None:
        expected = [num_image_tokens, self.hidden_size]
        got = [0, self.hidden_size] if embeddings is None else list(embeddings.shape)
        if got != expected:
            raise InvalidPrompt(
                f"its image tokens need embeddings {expected}, there are {got}: encode the images "
                "that were tokenised, with the same model"
            )


def _stacked(cache: DynamicCache) -> torch.Tensor:
    """The cache of one prompt as [layers, 2, tokens, kv_heads, head_dim]: a contiguous, ordinary tensor."""
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(layers).transpose(2, 3).contiguous()


def _probe_kv_shape(model: Any, identity: ModelIdentity) -> KvShape:
    """The K/V that the model really makes of one token: configs name these numbers in too many ways."""
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(torch.tensor([[0]]))
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=embedded, position_ids=torch.tensor([[0]]), past_key_values=cache, use_cache=True)
    shapes = {(tensor.shape, tensor.dtype) for layer in cache.layers for tensor in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise UnsupportedModel(identity.name, "its layers keep K/V of different shapes")
    (_, num_kv_heads, _, head_dim), dtype = shapes.pop()
    return KvShape(len(cache.layers), num_kv_heads, head_dim, dtype)
