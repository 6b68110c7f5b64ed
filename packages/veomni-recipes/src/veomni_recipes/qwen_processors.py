"""Processors of the Qwen models that see and hear, built from sizes and a tokenizer instead of a downloaded folder."""

from __future__ import annotations

from typing import Any

MEDIA_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
"""What stands in a text for pictures, videos and sounds, by the names that tokenizers have for them."""

# turns in the layout of ChatML, in which pictures, videos and sounds stand between tokens that begin and end them
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- set content -%}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'audio' -%}{{- '<|audio_start|><|audio_pad|><|audio_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}{{- content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def qwen_processor(config: Any, tokenizer: Any, *, pixels: tuple[int, int]) -> Any:
    """The processor that transformers has for the models of a config, with the sizes that the config says.

    Args:
        config: of a Qwen model that sees, or of the thinker of one that hears too.
        tokenizer: a fast one that has `MEDIA_TOKENS`; the processor's is made of it.
        pixels: the fewest and most of a picture, and of all frames of a video; others are scaled.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    kind, vision = config.model_type.removesuffix("_thinker"), config.vision_config
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    patches = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    videos = VIDEO_PROCESSOR_MAPPING_NAMES[kind]["torchvision"]
    parts = {
        "image_processor": transformers.Qwen2VLImageProcessor(**patches, size=size),
        "video_processor": getattr(transformers, videos)(**patches, size=size, cap_pixels_per_frame=False),
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            extra_special_tokens=MEDIA_TOKENS,
            chat_template=TEMPLATE,
        ),
    }
    if audio := getattr(config, "audio_config", None):
        parts["feature_extractor"] = transformers.WhisperFeatureExtractor(feature_size=audio.num_mel_bins)
    return getattr(transformers, PROCESSOR_MAPPING_NAMES[kind])(**parts, chat_template=TEMPLATE)
