"""Conversations with pictures, videos and sounds into samples, by a model's own processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .chat_template import ChatTemplate, Span, content_text, mask_outside
from .collators import IGNORED_LABEL, TOKEN_KEYS, Sample
from .errors import DataError
from .image_text_pairs import drawn_instead
from .layouts import normalize_example
from .pictures import load_picture
from .placeholders import KINDS, Generation, Placed, place_media, without_markers
from .sound import Wave, load_sound
from .text import checked_answers, checked_sample, conversation_columns
from .video import DEFAULT_FPS, Video, load_video

_NO_TENSORS = ("input_ids", "attention_mask", "offset_mapping")


def encode_multimodal_sample(
    example: Mapping[str, Any],
    *,
    processor: Any,
    template: ChatTemplate,
    max_seq_len: int | None = None,
    text_keys: str = "messages",
    image_keys: str = "images",
    video_keys: str = "videos",
    audio_keys: str = "audios",
    columns: Mapping[str, str] | None = None,
    max_image_nums: int | None = None,
    max_pixels: int | None = None,
    max_pixel_size: int | None = None,
    scale_factor: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    video_max_pixels: int | None = None,
    max_seconds: float | None = None,
    generation: Generation | None = None,
    generation_ratio: float = 0.0,
    position_ids: Callable[[Sample], Tensor] | None = None,
) -> Sample:
    """A conversation with any number of pictures, videos and sounds, of which the assistant's turns are learnt.

    Args:
        example: a row in any layout of `normalize_example`. Where something is to be seen or heard stands an image,
            video or audio part, or in the text `<image>`, `<video>` or `<audio>`; what it is, stands in the part, or
            is the next of the column of its kind. Paths start from the data file's folder.
        processor: has `tokenizer` and `image_token` (`video_token`, `audio_token`), and `processor(text=[str],
            images=[PIL], videos=[uint8 [T, H, W, 3]], audio=[float32 [N]], return_tensors="pt")` gives `input_ids`
            [1, T], in which each placeholder is repeated as often as the model wants it, and tensors for the model such
            as `pixel_values` [n, ...]. Any transformers processor of one placeholder token a kind is like that.
        template: made with the processor's tokenizer, see `get_chat_template`.
        max_seq_len: the most tokens that a sample may have; None is no limit.
        text_keys, image_keys, video_keys, audio_keys: the columns, if they have other names; a column "image", "video"
            or "audio" is found too.
        columns: our names of columns to the row's, for any other layout, see `normalize_example`.
        max_image_nums: the most pictures of a sample.
        max_pixels, max_pixel_size, scale_factor: limits of pictures that are read, see `load_picture`.
        fps: frames a second of a video that are taken; None is what the video processor says, or 2.
        max_frames: the most frames of a video, see `load_video`.
        video_max_pixels: larger frames are scaled down to about as many pixels.
        max_seconds: the rest of a longer sound is cut off.
        generation: how pictures that the model is to draw are written; None reads all.
        generation_ratio: share of the pairs of a picture and an answer about it that are turned around, see
            `drawn_instead`; needs `generation`.
        position_ids: makes of the sample its positions [T], or [3, T] for M-RoPE: the model's own function, such as
            `get_rope_index` in transformers. They are made before packing, in which each sample keeps its own.

    Returns:
        `input_ids` and `labels`, int64 [T]; `position_ids` if asked for, int64, or float32 if not all are whole;
        `target_pixel_values` [n, C, H, W] of pictures to draw; and the processor's other tensors as they are (without
        `attention_mask`). Placeholders are never learnt, but those of pictures to draw if `generation` says so.

    Raises:
        DataError: what `process_sft_example`, `load_picture`, `load_video` and `load_sound` raise; more or fewer places
            than pictures ("bad row"); a processor that changes more of the text than its placeholders.
    """
    row = normalize_example(example, conversation_columns(text_keys, columns))
    keys = {"image": image_keys, "video": video_keys, "audio": audio_keys}
    tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in KINDS}
    messages, columns_of_kinds = checked_answers(row), _columns(row, keys, tokens)
    if generation_ratio and generation is not None:
        messages = drawn_instead(messages, columns_of_kinds.get("image", ("", []))[1], generation_ratio)
    placed = place_media(messages, columns_of_kinds, tokens, template, generation)
    pictures = len(placed.media["image"]) + len(placed.targets)
    if max_image_nums is not None and pictures > max_image_nums:
        raise DataError(f"{pictures} pictures are more than max_image_nums={max_image_nums}", reason="too long")
    text, spans = template.render_with_spans(placed.messages, tools=row.get("tools"))
    placed.check(text, tokens)
    scaling = {"max_pixels": max_pixels, "max_pixel_size": max_pixel_size, "scale_factor": scale_factor}
    video_fps = fps or getattr(getattr(processor, "video_processor", None), "fps", None) or DEFAULT_FPS
    media = _load(
        placed,
        example,
        scaling,
        {"fps": video_fps, "max_frames": max_frames, "max_pixels": video_max_pixels},
        getattr(getattr(processor, "feature_extractor", None), "sampling_rate", None),
        max_seconds,
    )
    _check_audible(media.get("audio", ()), processor)

    outputs = _process(processor, text, media)
    labels, ids = _labels(outputs, text, spans, processor.tokenizer, [token for token in tokens.values() if token])
    sample: Sample = {"input_ids": ids, "labels": labels}
    for key, value in outputs.items():
        if key not in _NO_TENSORS and isinstance(value, Tensor):
            sample[key] = value[0] if key in TOKEN_KEYS else value
    if generation is not None:
        if not generation.learnt:
            labels[ids == processor.tokenizer.convert_tokens_to_ids(generation.token)] = IGNORED_LABEL
        if placed.targets:
            drawn = [load_picture(picture, *_place(example)) for picture in placed.targets]
            sample["target_pixel_values"] = generation.image_processor(images=drawn, return_tensors="pt")[
                "pixel_values"
            ]
    if position_ids is not None:
        sample["position_ids"] = _positions(position_ids(sample), len(ids))
    return checked_sample(sample, max_seq_len)


def multimodal_prompt(
    example: Mapping[str, Any],
    *,
    image_token: str | None = None,
    video_token: str | None = None,
    audio_token: str | None = None,
    template: ChatTemplate,
    text_keys: str = "messages",
    image_keys: str = "images",
    video_keys: str = "videos",
    audio_keys: str = "audios",
    columns: Mapping[str, str] | None = None,
    max_pixels: int | None = None,
    max_pixel_size: int | None = None,
    scale_factor: int | None = None,
    fps: float = DEFAULT_FPS,
    max_frames: int | None = None,
    video_max_pixels: int | None = None,
    sampling_rate: int = 16_000,
    max_seconds: float | None = None,
    generation: Generation | None = None,
) -> dict[str, Any]:
    """A conversation as the prompt of its last answer, for generation; the arguments as in `encode_multimodal_sample`.

    Args:
        image_token, video_token, audio_token: the processor's placeholders; None if it takes none of the kind.
        sampling_rate: that of the processor's feature extractor.

    Returns:
        `text`, which ends where the assistant is to speak, with a placeholder for each of `images` (PIL, RGB); if there
        are any, `videos` (uint8 [T, H, W, 3]) with `video_metadata`, and `audio` (float32 [N]); `question`, the text of
        the last message before that; `answer`, the text of the last message if the assistant said it, else "";
        `targets`, the pictures (PIL) that the answer draws, if it does; and the row's other columns.

    Raises:
        DataError: as `encode_multimodal_sample`.
    """
    row = normalize_example(example, conversation_columns(text_keys, columns))
    messages = row["messages"]
    answered = messages[-1]["role"] == "assistant"
    if len(messages) == answered:
        raise DataError(f'"{text_keys}" has no message before the answer', reason="bad row")
    keys = {"image": image_keys, "video": video_keys, "audio": audio_keys}
    tokens = {"image": image_token, "video": video_token, "audio": audio_token}
    placed = place_media(messages, _columns(row, keys, tokens), tokens, template, generation)
    before = messages[:-1] if answered else messages
    # what the answer shows comes last, and is no part of the prompt
    prompt = _beginning(placed, place_media(before, {}, tokens, template, generation))
    text = template.render(prompt.messages, tools=row.get("tools"), add_generation_prompt=True)
    prompt.check(text, tokens)
    scaling = {"max_pixels": max_pixels, "max_pixel_size": max_pixel_size, "scale_factor": scale_factor}
    frames = {"fps": fps, "max_frames": max_frames, "max_pixels": video_max_pixels}
    media = _load(prompt, example, scaling, frames, sampling_rate, max_seconds)
    answer = content_text(messages[-1]["content"]) if answered else ""
    rest = {key: value for key, value in example.items() if key not in (text_keys, *keys.values(), *KINDS)}
    targets = [load_picture(picture, *_place(example)) for picture in placed.targets[len(prompt.targets) :]]
    return {
        **rest,
        "images": [],
        **media,
        "text": text,
        "question": without_markers(content_text(before[-1]["content"])),
        "answer": without_markers(answer) if targets else answer,
        **({"targets": targets} if targets else {}),
    }


def _beginning(whole: Placed, beginning: Placed) -> Placed:
    """The beginning of a conversation with the media that belong to it."""
    media = {kind: whole.media[kind][: len(values)] for kind, values in beginning.media.items()}
    return Placed(beginning.messages, media, whole.targets[: len(beginning.targets)])


def _place(example: Mapping[str, Any]) -> tuple[Any, Any]:
    """The folder and root of a row."""
    return getattr(example, "folder", None), getattr(example, "root", None)


def _columns(
    row: Mapping[str, Any], keys: Mapping[str, str], tokens: Mapping[str, str | None]
) -> dict[str, tuple[str, list[Any]]]:
    """Kind to the column of a row that holds it, and its values; kinds that the processor takes."""
    columns = {}
    for kind, key in keys.items():
        name = key if row.get(key) is not None or row.get(kind) is None else kind
        values = row.get(name)
        if values is not None and not isinstance(values, (list, tuple)):
            values = [values]
        if values and not tokens[kind]:
            raise DataError(f'there is a column "{name}", but the processor takes no {kind}')
        if tokens[kind]:
            columns[kind] = (name, list(values or ()))
    return columns


def _load(
    placed: Placed,
    example: Mapping[str, Any],
    scaling: Mapping[str, Any],
    frames: Mapping[str, Any],
    sampling_rate: int | None,
    max_seconds: float | None,
) -> dict[str, Any]:
    """What a processor is called with beside the text."""
    place = _place(example)
    media: dict[str, Any] = {}
    if placed.media["image"]:
        media["images"] = [load_picture(picture, *place, **scaling) for picture in placed.media["image"]]
    if placed.media["video"]:
        videos = [load_video(video, *place, **frames) for video in placed.media["video"]]
        media["videos"] = [video.frames for video in videos]
        media["video_metadata"] = [_metadata(video) for video in videos]
    if placed.media["audio"]:
        if sampling_rate is None:
            raise DataError("the processor has no feature extractor that says its sampling rate")
        media["audio"] = [
            load_sound(sound, *place, sampling_rate=sampling_rate, max_seconds=max_seconds)
            for sound in placed.media["audio"]
        ]
    return media


def _metadata(video: Video) -> dict[str, Any]:
    """As `transformers.video_utils.VideoMetadata` has it."""
    return {
        "total_num_frames": video.total,
        "fps": video.fps,
        "frames_indices": video.indices,
        "duration": video.total / video.fps,
        "height": video.frames.shape[1],
        "width": video.frames.shape[2],
    }


def _check_audible(sounds: Sequence[Wave], processor: Any) -> None:
    """Feature extractors cut a sound off at what the model hears, without a word."""
    extractor = getattr(processor, "feature_extractor", None)
    most, rate = getattr(extractor, "n_samples", None), getattr(extractor, "sampling_rate", 1)
    for sound in sounds:
        if most is not None and len(sound) > most:
            raise DataError(
                f"a sound of {len(sound) / rate:.1f} s is longer than the {most / rate:g} s that the model hears: set "
                f"max_seconds to cut it off",
                reason="too long",
            )


def _process(processor: Any, text: str, media: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs: dict[str, Any] = {"text": [text], "return_tensors": "pt", **media}
    if processor.tokenizer.num_special_tokens_to_add():
        inputs["add_special_tokens"] = False  # the template has written them into the text
    if hasattr(processor, "get_text_with_replacements"):  # transformers tells what it put in the placeholders' place
        inputs |= {"return_text_replacement_offsets": True, "return_offsets_mapping": True}
    if "videos" in media:
        inputs["do_sample_frames"] = False
        metadata = media["video_metadata"]
        taken = {len(m["frames_indices"]) / m["total_num_frames"] * m["fps"] for m in metadata}
        if len(taken) == 1:
            inputs["fps"] = taken.pop()
    if "audio" in media:
        inputs["sampling_rate"] = processor.feature_extractor.sampling_rate
    try:
        outputs: Mapping[str, Any] = processor(**inputs)
    except ValueError as error:
        raise DataError(f"the processor cannot take this sample: {error}") from error
    return outputs


def _labels(
    outputs: Mapping[str, Any], text: str, spans: Sequence[Span], tokenizer: Any, placeholders: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Labels and ids, int64 [T]: the ids of tokens that begin within the spans of the text and are no placeholders."""
    ids = outputs["input_ids"][0].to(torch.int64)
    replaced = outputs.get("text_replacement_offsets")
    if replaced is None or "offset_mapping" not in outputs:
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        labels = mask_outside(spans, tokens["input_ids"], tokens["offset_mapping"])
        known = set(tokenizer.convert_tokens_to_ids(placeholders))
        return torch.tensor(expand_labels(tokens["input_ids"], labels, ids.tolist(), known), dtype=torch.int64), ids
    replaced = replaced[0] if replaced else []
    # in numpy, which costs less than torch on arrays of this size
    begins, ends = outputs["offset_mapping"].numpy()[0].T
    learnt = np.full(len(ids), IGNORED_LABEL, np.int64)

    def token_at(character: int) -> int:
        at = int(begins.searchsorted(character))
        while at < len(ends) and ends[at] <= character:  # blanks that a tokenizer leaves out
            at += 1
        return at

    def moved(character: int) -> int:
        """Where a place of the text is in the text with the placeholders repeated."""
        return character + sum(len(r["replacement"]) - len(r["text"]) for r in replaced if r["span"][1] <= character)

    for begin, end in spans:
        first, last = token_at(moved(begin)), int(begins.searchsorted(moved(end)))
        learnt[first:last] = ids.numpy()[first:last]
    for r in replaced:
        begin, end = r["new_span"]
        learnt[token_at(begin) : int(begins.searchsorted(end))] = IGNORED_LABEL
    return torch.from_numpy(learnt), ids


def expand_labels(ids: Sequence[int], labels: Sequence[int], expanded: Sequence[int], known: set[int]) -> list[int]:
    """Labels of `expanded`, in which each placeholder of `ids` is repeated: those of `ids`, -100 for placeholders.

    Args:
        ids: T tokens of a text.
        labels: T.
        expanded: the tokens that a processor made of the text.
        known: ids of placeholders.

    Raises:
        DataError: `expanded` is not `ids` with repeated placeholders.
    """
    result: list[int] = []
    at = 0  # in ids
    while at < len(ids) or len(result) < len(expanded):
        wanted, given = _run(ids, at, known), _run(expanded, len(result), known)
        if wanted and given >= wanted:
            result += [IGNORED_LABEL] * given
            at += wanted
        elif not wanted and not given and at < len(ids) and ids[at : at + 1] == expanded[len(result) : len(result) + 1]:
            result.append(labels[at])
            at += 1
        else:
            raise DataError(
                f"the processor's tokens differ from the text's at token {len(result)} in more than repeated "
                f"placeholders, so that the part to learn cannot be found"
            )
    return result


def _run(ids: Sequence[int], at: int, known: set[int]) -> int:
    end = at
    while end < len(ids) and ids[end] in known:
        end += 1
    return end - at


def _positions(positions: Tensor, length: int) -> Tensor:
    """int64 [T] or [axes, T], of what may have a dimension of one for the batch; float32 if not all are whole."""
    if positions.dim() == 3 and positions.shape[1] == 1:
        positions = positions[:, 0]
    elif positions.dim() == 2 and positions.shape[0] == 1:
        positions = positions[0]
    if positions.dim() not in (1, 2) or positions.shape[-1] != length:
        raise DataError(
            f"position_ids gave positions {list(positions.shape)} for a sample of {length} tokens: they must be [T] or "
            f"[3, T]"
        )
    # Qwen3-Omni puts frames between two positions
    return positions if positions.is_floating_point() and positions.frac().any() else positions.to(torch.int64)
