"""A checkpoint's folder: its identity, its configuration, its weights, and whether it can be run in pieces.

In: a local folder as `save_pretrained` writes it. Out: a `ModelIdentity`, a config, a loaded model in evaluation mode.

Invariants: nothing is fetched (a hub id must be downloaded to a folder before) and no code of the checkpoint is run; a
model is judged by what its class and config declare, before its weights are read.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from workers.models.vision_language_model import ModelIdentity, UnsupportedModel

_REVISION_DIGITS = 12

# What else a language model may ask for at prefill. The seam carries ids and embeddings alone.
_OTHER_PREFILL_INPUTS = {
    "mm_token_type_ids": "its positions or its attention depend on which tokens are of an image (mm_token_type_ids)",
    "token_type_ids": "its attention depends on which tokens are of an image (token_type_ids)",
    "cross_attention_mask": "it looks at images by cross-attention",
}


def checkpoint_identity(path: Path) -> ModelIdentity:
    """The folder's name and a digest of `config.json` and the safetensors, read whole (a second or so per GB)."""
    digest = hashlib.sha256()
    for file in [path / "config.json", *sorted(path.glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return ModelIdentity(path.resolve().name, digest.hexdigest()[:_REVISION_DIGITS])


def load_config(path: Path) -> Any:
    """The checkpoint's config, a `PreTrainedConfig`.

    Raises `FileNotFoundError` if the folder holds no config, `UnsupportedModel` if the model can't be split.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json: give the folder of a downloaded checkpoint")
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    _require_splittable(config, path.resolve().name)
    return config


def load_model(path: Path, config: Any, dtype: torch.dtype) -> Any:
    """The whole model with its weights as `dtype`, in evaluation mode."""
    # The dtype is given because the default follows the file, and float16 is slow or missing on a CPU.
    with _no_progress_bar():
        model = AutoModelForImageTextToText.from_pretrained(path, config=config, dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)


def drop_all_but_decoder(model: Any) -> None:
    """Frees the vision tower and whatever lies between it and the language model."""
    decoder = model.get_decoder()
    for name, module in list(model.base_model.named_children()):
        if module is not decoder:
            setattr(model.base_model, name, None)


def drop_decoder(model: Any) -> None:
    """Frees the language model and the output head."""
    dropped = (model.get_decoder(), model.get_output_embeddings())
    for owner in (model.base_model, model):
        for name, module in list(owner.named_children()):
            if any(module is unused for unused in dropped):
                setattr(owner, name, None)


def context_tokens(config: Any) -> int:
    """The most tokens that the language model has positions for."""
    return int(config.get_text_config().max_position_embeddings)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A worker's standard error is its log: no bars are drawn into it."""
    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            enable_progress_bar()


def _require_splittable(config: Any, name: str) -> None:
    missing = _what_is_missing(config)
    if missing:
        raise UnsupportedModel(f"{name} ({config.model_type})", missing)


def _what_is_missing(config: Any) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, whose cross-attention K/V are not moved"
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except ValueError:
        return "transformers knows no image-text-to-text model for it"
    if not hasattr(model.base_model, "get_image_features"):
        return "its class has no get_image_features"
    if hasattr(model.base_model, "get_rope_index"):
        return "its positions are three-dimensional (M-RoPE, get_rope_index) and don't travel with the K/V"
    if getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None):
        return "it feeds image features into several layers (deepstack)"
    inputs = inspect.signature(model.base_model.forward).parameters
    for parameter, missing in _OTHER_PREFILL_INPUTS.items():
        if parameter in inputs:
            return missing
    return _missing_of_cache(config)


def _missing_of_cache(config: Any) -> str | None:
    layers = DynamicCache(config=config).layers
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if others:
        return f"not every layer keeps the K/V of every token ({', '.join(others)}: a window or a recurrent state)"
    return None
