"""Samples by the processors of real models, made here with small sizes and a tokenizer of single bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from veomni_data import ChatTemplate, DataError, PackingCollator, encode_multimodal_sample

pytest.importorskip("torchvision")

TEMPLATE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}
{%- if p.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif p.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif p.type == 'audio' %}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}
{%- else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL += ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<image>", "<start_of_image>", "<end_of_image>", "<soft>")
SMALL = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}}
SMALL_VIDEO = {**SMALL, "cap_pixels_per_frame": False}

RANDOM = np.random.default_rng(0)
PICTURE = Image.fromarray(RANDOM.integers(0, 255, (70, 90, 3), np.uint8))
CLIP = RANDOM.integers(0, 255, (4, 56, 56, 3), np.uint8)
SOUND = {"array": np.sin(np.arange(8000) / 20).astype(np.float32), "sampling_rate": 16_000}


def tokenizer(**names: str) -> Any:
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>", extra_special_tokens=names or None
    )


def qwen2_vl() -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    return Qwen2VLProcessor(Qwen2VLImageProcessor(**SMALL), tokenizer(), Qwen2VLVideoProcessor(**SMALL_VIDEO))


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**SMALL), tokenizer(), Qwen2VLVideoProcessor(**SMALL_VIDEO))


def qwen3_vl() -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 64}
    video = Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**SMALL, patch_size=16), tokenizer(), video)


def qwen2_audio() -> Any:
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=5), tokenizer())


def qwen2_5_omni() -> Any:
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    names = {"image_token": "<|image_pad|>", "audio_token": "<|AUDIO|>", "video_token": "<|video_pad|>"}
    names |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    names |= {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    return Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(**SMALL),
        Qwen2VLVideoProcessor(**SMALL_VIDEO),
        WhisperFeatureExtractor(feature_size=16, chunk_length=5),
        tokenizer(**names),
    )


def llava() -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(images, tokenizer(), 14, "default", num_additional_image_tokens=1)


def gemma_3() -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<soft>"}
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return Gemma3Processor(images, tokenizer(**names), image_seq_length=4)


def conversation(question: str, **columns: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": question}
    return {
        "messages": [asked, {"role": "assistant", "content": "eight"}, asked, {"role": "assistant", "content": "é"}]
    } | {key: values * 2 for key, values in columns.items()}


def encode(processor: Any, example: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    return encode_multimodal_sample(
        example, processor=processor, template=ChatTemplate(TEMPLATE, processor.tokenizer), **kwargs
    )


@pytest.mark.parametrize(
    ("make", "question", "keys"),
    [
        (qwen2_vl, "<image> a <video> b <image>", {"pixel_values", "pixel_values_videos", "mm_token_type_ids"}),
        (qwen2_5_vl, "<video> a <image> b <image>", {"pixel_values", "pixel_values_videos", "second_per_grid_ts"}),
        (qwen3_vl, "<image> a <video> b <image>", {"pixel_values", "pixel_values_videos", "mm_token_type_ids"}),
        (qwen2_audio, "<audio> a <audio>", {"input_features", "feature_attention_mask"}),
        (qwen2_5_omni, "<audio> a <image> b <video>", {"pixel_values", "input_features", "video_second_per_grid"}),
        (llava, "<image> a <image>", {"pixel_values"}),
        (gemma_3, "<image> a <image>", {"pixel_values", "token_type_ids"}),
    ],
)
def test_of_any_models_conversation_exactly_the_answers_are_learnt(
    make: Callable[[], Any], question: str, keys: set[str]
) -> None:
    processor = make()
    media = {"image": "images", "video": "videos", "audio": "audios"}
    values = {"image": PICTURE, "video": CLIP, "audio": SOUND}
    columns = {column: [values[kind]] * question.count(f"<{kind}>") for kind, column in media.items()}
    sample = encode(processor, conversation(question, **{key: held for key, held in columns.items() if held}))
    ids, labels = sample["input_ids"], sample["labels"]
    assert processor.tokenizer.decode(ids[labels != -100]) == "eight<|im_end|>é<|im_end|>"
    assert keys <= set(sample)
    for kind in media:
        if f"<{kind}>" in question:
            # Gemma repeats another token than the one that stands for the picture
            token = "<soft>" if make is gemma_3 else getattr(processor, f"{kind}_token")
            repeated = ids == processor.tokenizer.convert_tokens_to_ids(token)
            assert repeated.sum() >= 2 * 4 * question.count(f"<{kind}>")
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in sample:
            assert sample[key].shape == ids.shape
            assert sample[key].any()


def test_the_processors_own_numbers_of_placeholders_fit_what_it_gives() -> None:
    processor = qwen2_5_vl()
    sample = encode(processor, conversation("<image> <video>", images=[PICTURE], videos=[CLIP]))
    for token, grid in ((processor.image_token_id, "image_grid_thw"), (processor.video_token_id, "video_grid_thw")):
        assert (sample["input_ids"] == token).sum() == sample[grid].prod(1).sum() // 4
    assert sample["pixel_values"].shape[0] == sample["image_grid_thw"].prod(1).sum()


def test_the_model_is_told_when_the_frames_were_taken() -> None:
    example = conversation("<video>", videos=[CLIP])
    assert encode(qwen2_5_vl(), example, fps=4.0)["second_per_grid_ts"].tolist() == [0.5, 0.5]
    assert encode(qwen2_5_omni(), example, fps=4.0)["video_second_per_grid"].tolist() == [0.5, 0.5]
    processor = qwen3_vl()
    text = processor.tokenizer.decode(encode(processor, example, fps=1.0)["input_ids"])
    assert text.count("<0.5 seconds>") == text.count("<2.5 seconds>") == 2  # between each two of four frames


@pytest.mark.parametrize("make", [qwen2_5_vl, qwen3_vl])
def test_positions_are_made_by_the_models_own_function_before_packing(make: Callable[[], Any]) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen3VLConfig, Qwen3VLModel

    processor = make()
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 300}
    tiny |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config, model_class = (
        (Qwen2_5_VLConfig(text_config=tiny), Qwen2_5_VLModel)
        if make is qwen2_5_vl
        else (Qwen3VLConfig(text_config=tiny), Qwen3VLModel)
    )
    with torch.device("meta"):
        model = model_class(config)

    def position_ids(sample: dict[str, Any]) -> torch.Tensor:
        grids = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        given = {key: sample[key] for key in grids if key in sample}
        return model.get_rope_index(sample["input_ids"][None], sample["mm_token_type_ids"][None], **given)[0]

    example = conversation("<image> then <video>", images=[PICTURE], videos=[CLIP])
    sample = encode(processor, example, position_ids=position_ids)
    positions, length = sample["position_ids"], len(sample["input_ids"])
    assert (positions.shape, positions.dtype) == ((3, length), torch.int64)
    assert positions.equal(position_ids(sample)[:, 0])
    assert not positions[0].equal(positions[1])
    assert positions[:, -1].unique().numel() == 1
    assert int(positions.max()) < length - 1  # pictures take fewer positions than tokens
    batch = PackingCollator(text_positions=False)([sample, sample])
    assert batch["position_ids"].shape == (3, 1, 2 * length)
    assert batch["position_ids"][:, 0, length:].equal(positions)


def test_positions_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match=r"position_ids gave positions \[2\] for a sample of \d+ tokens"):
        encode(llava(), conversation("Hello"), position_ids=lambda sample: torch.zeros(2))


def test_a_sound_longer_than_the_model_hears_is_refused_unless_it_is_cut() -> None:
    long = {"array": np.zeros(16_000 * 6, np.float32), "sampling_rate": 16_000}
    processor = qwen2_audio()
    example = conversation("<audio>", audios=[long])
    with pytest.raises(DataError, match=r"sound of 6.0 s is longer than the 5 s that the model hears") as error:
        encode(processor, example)
    assert error.value.reason == "too long"
    assert encode(processor, example, max_seconds=5)["feature_attention_mask"].sum() == 2 * 500


def test_what_a_processor_refuses_is_an_error_of_the_sample() -> None:
    thin = Image.new("RGB", (600, 1))
    with pytest.raises(DataError, match=r"the processor cannot take this sample: .*aspect ratio"):
        encode(qwen2_vl(), conversation("<image>", images=[thin]))


def test_a_kind_that_the_processor_does_not_take_is_named() -> None:
    with pytest.raises(DataError, match='a column "audios", but the processor takes no audio'):
        encode(llava(), conversation("Hello", audios=[SOUND]))
    part = [{"type": "video", "video": "a.mp4"}]
    with pytest.raises(DataError, match="message 1 has a video, which the processor does not take"):
        encode(llava(), {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": "x"}]})
    # to a model that takes pictures alone, the marker of another kind is a word
    sample = encode(llava(), conversation("what is <video> in HTML?"))
    assert "<video> in HTML" in llava().tokenizer.decode(sample["input_ids"])
