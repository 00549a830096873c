"""The tiny network and what turns text and pixels into its inputs.

Out: a `LlavaForConditionalGeneration` of about half a million parameters, a byte-level BPE tokenizer, and a
`LlavaProcessor` with the chat template. All are ordinary transformers objects: what they save is an ordinary
checkpoint, which any tool that reads LLaVA can load.

Invariants: an image of any size becomes 32x32 pixels, 4x4 patches, 16 image tokens; any UTF-8 text has tokens,
because each byte has one; `crop_size` is set though nothing is cropped, because transformers 5.23 counts LLaVA's image
tokens from it (`LlavaProcessor._get_num_multimodal_tokens`).
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from workers.models.digits_dataset import IMAGE_SIDE_PIXELS

PATCH_SIDE_PIXELS = 8
NUM_IMAGE_TOKENS = (IMAGE_SIDE_PIXELS // PATCH_SIDE_PIXELS) ** 2
MAX_VOCABULARY = 512
MAX_TOKENS = 1024
END = "<|end|>"

_SPECIAL_TOKENS = ("<pad>", "<s>", END, "<image>", "<|system|>", "<|user|>", "<|assistant|>", "<unk>")
_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' ~ message['role'] ~ ': use system, user or assistant') -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def build_processor(corpus: list[str]) -> LlavaProcessor:
    """A processor whose tokenizer is trained on `corpus`: chat template, tokens, and pixels of 32x32."""
    side = {"height": IMAGE_SIDE_PIXELS, "width": IMAGE_SIDE_PIXELS}
    image_processor = LlavaImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_build_tokenizer(corpus),
        patch_size=PATCH_SIDE_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" drops again
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The network with random weights (seed torch before), float32, in training mode."""
    tokenizer = processor.tokenizer
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIDE_PIXELS,
        patch_size=PATCH_SIDE_PIXELS,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    # generate() reads this object, not the text config: greedy, and it must know where an answer ends.
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model


def _build_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",  # noqa: S106 - tokens of a text, no passwords
        bos_token="<s>",  # noqa: S106
        eos_token=END,
        unk_token="<unk>",  # noqa: S106
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
