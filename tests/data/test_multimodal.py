from __future__ import annotations

import base64
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from veomni_data import (
    DataError,
    Generation,
    build_dataset,
    encode_multimodal_sample,
    get_chat_template,
    load_picture,
    multimodal_prompt,
)

PARTS_TEMPLATE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}
{%- if p.type == 'image' %}{{ '[<|pic|>]' }}{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def picture(height: int = 3, red: int = 9) -> Image.Image:
    return Image.new("RGB", (2, height), (red, 0, 0))


def png(height: int = 3, red: int = 9) -> bytes:
    file = io.BytesIO()
    picture(height, red).save(file, "PNG")
    return file.getvalue()


def conversation(question: Any, answer: str = "three, five") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encode(processor: Any, question: Any, images: Any, answer: str = "three, five", **kwargs: Any) -> dict[str, Any]:
    example = {
        "messages": conversation(question, answer),
        "task": "list",
        **({} if images is None else {"images": images}),
    }
    template = get_chat_template("default", processor.tokenizer)
    return encode_multimodal_sample(example, processor=processor, template=template, **{"max_seq_len": 256, **kwargs})


def text_of(processor: Any, sample: dict[str, Any]) -> tuple[str, str]:
    ids, labels = sample["input_ids"], sample["labels"]
    assert labels[labels != -100].equal(ids[labels != -100])
    return processor.tokenizer.decode(ids), processor.tokenizer.decode(ids[labels != -100])


def test_each_marker_becomes_its_pictures_tokens_and_only_the_answer_is_learnt(processor: Any) -> None:
    sample = encode(processor, "<image><image> Which digits\n<image>?", [picture(3, 1), picture(1, 2), picture(4, 3)])
    text, learnt = text_of(processor, sample)
    assert text == (
        "<|im_start|>user\n" + "<|pic|>" * 4 + " Which digits\n" + "<|pic|>" * 4 + "?<|im_end|>\n"
        "<|im_start|>assistant\nthree, five<|im_end|>\n"
    )
    assert learnt == "three, five<|im_end|>"
    assert sample["pixel_values"][:, 0].tolist() == [1, 2, 3]
    assert sorted(sample) == ["input_ids", "labels", "mm_token_type_ids", "pixel_values"]
    assert sample["mm_token_type_ids"].shape == sample["input_ids"].shape


def test_parts_say_the_same_as_markers(processor: Any) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": " Which digits\n"}, {"type": "image"}]
    images = [picture(3), picture(2)]
    by_parts, by_markers = encode(processor, parts, images), encode(processor, "<image> Which digits\n<image>", images)
    assert by_parts["input_ids"].equal(by_markers["input_ids"])
    assert by_parts["labels"].equal(by_markers["labels"])


def test_a_template_that_takes_parts_writes_what_it_wants_around_a_picture(processor: Any) -> None:
    processor.tokenizer.chat_template = PARTS_TEMPLATE
    text, learnt = text_of(processor, encode(processor, "<image> sum?", [picture(2)]))
    assert text.startswith("<|im_start|>user\n[<|pic|><|pic|>] sum?<|im_end|>")
    assert learnt == "three, five<|im_end|>"


def test_an_image_token_in_an_answer_is_never_learnt(processor: Any) -> None:
    sample = encode(processor, "Hello", [picture(2)], answer="five <image> eight")
    assert text_of(processor, sample)[1] == "five  eight<|im_end|>"


def test_a_conversation_without_pictures_has_no_pixels(processor: Any) -> None:
    for images in (None, []):
        sample = encode(processor, "What is their sum?", images)
        assert "pixel_values" not in sample
        assert text_of(processor, sample)[1] == "three, five<|im_end|>"


def test_a_picture_is_read_from_path_bytes_dict_and_image(processor: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(2, 7))
    forms = ["pictures/a.png", {"path": "pictures/a.png"}]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"messages": conversation("<image>"), "images": [form]}) + "\n" for form in forms)
    )
    rows = build_dataset(tmp_path / "rows.jsonl")
    template = get_chat_template("default", processor.tokenizer)
    samples = [encode_multimodal_sample(row, processor=processor, template=template, max_seq_len=99) for row in rows]
    for form in (png(2, 7), {"bytes": png(2, 7), "path": None}, picture(2, 7), str(tmp_path / "pictures" / "a.png")):
        samples += [encode(processor, "<image>", [form]), encode(processor, "<image>", form)]
    for sample in samples:
        assert sample["pixel_values"].tolist() == [[7, 0, 0]]
        assert sample["input_ids"].equal(samples[0]["input_ids"])


def test_a_picture_is_turned_upright_and_made_rgb() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    Image.new("L", (4, 2), 5).save(file, "JPEG", exif=exif)
    image = load_picture(file.getvalue())
    assert (image.size, image.mode) == ((2, 4), "RGB")


def test_what_is_transparent_is_white_and_16_bits_keep_their_brightness() -> None:
    def pixel(image: Image.Image) -> tuple[int, ...]:
        file = io.BytesIO()
        image.save(file, "PNG")
        found = load_picture(file.getvalue()).getpixel((0, 0))
        assert isinstance(found, tuple)
        return found

    assert pixel(Image.new("RGBA", (2, 2), (9, 9, 9, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (2, 2), (9, 9, 9, 255))) == (9, 9, 9)
    assert pixel(Image.new("LA", (2, 2), (0, 128))) == (127, 127, 127)
    assert pixel(Image.fromarray(np.full((2, 2), 40_000, np.uint16))) == (156, 156, 156)
    assert load_picture(np.zeros((2, 2, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(DataError, match="values have 32 bits"):
        load_picture(Image.new("F", (2, 2)))


@pytest.mark.parametrize(
    ("question", "images", "sentence"),
    [
        ("Which digits?", [picture()], '1 pictures in "images" but 0 places'),
        ("<image> and <image>", [picture()], '1 pictures in "images" but 2 places'),
        ("<image>", None, '0 pictures in "images" but 1 places'),
        ("<|pic|>", [picture()], 'message 1 has "<|pic|>" in its text: write <image>'),
        ("<image>", ["lost.png"], 'picture "lost.png" does not exist'),
        ("<image>", [png()[:-30]], "a picture cannot be decoded"),
        ("<image>", [{"path": "x.png", "bytes": b"not one"}], 'picture "x.png" cannot be decoded'),
        ("<image>", [7], "a picture is a int: it must be a path, bytes or base64"),
        ("<image>", [picture(300)], r"\d+ tokens, more than max_seq_len=256"),
    ],
)
def test_what_is_wrong_with_pictures_is_named(processor: Any, question: str, images: Any, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        encode(processor, question, images)
    assert error.match(sentence.replace("|", r"\|")) if "|" in sentence else error.match(sentence)


def test_a_cut_off_jpeg_is_not_read_as_half_a_picture() -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "JPEG")
    with pytest.raises(DataError, match="cannot be decoded"):
        load_picture(file.getvalue()[:-200])


def test_a_conversation_without_an_answer_is_refused(processor: Any) -> None:
    example = {"messages": conversation("Hello")[:1]}
    template = get_chat_template("default", processor.tokenizer)
    with pytest.raises(DataError, match="there is no answer"):
        encode_multimodal_sample(example, processor=processor, template=template, max_seq_len=99)


def test_a_processor_that_changes_the_text_is_refused(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = type(processor).__call__

    def shouting(self: Any, text: list[str], **kwargs: Any) -> Any:
        return whole(self, [text[0].replace("sum", "SUM")], **kwargs)

    monkeypatch.setattr(type(processor), "__call__", shouting)
    with pytest.raises(DataError, match=r"differ from the text's at token \d+"):
        encode(processor, "What is their sum? <image>", [picture()])


def test_an_error_names_file_line_and_picture(processor: Any, tmp_path: Path) -> None:
    good = {"messages": conversation("Hello")}
    bad = {"messages": conversation("<image>"), "images": ["sub/lost.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(good) + "\n\n" + json.dumps(bad) + "\n")
    template = get_chat_template("default", processor.tokenizer)
    transform = partial(encode_multimodal_sample, processor=processor, template=template, max_seq_len=99)
    rows = build_dataset(tmp_path / "rows.jsonl", transform=transform)
    assert isinstance(rows[0]["input_ids"], torch.Tensor)
    with pytest.raises(DataError, match=r'rows\.jsonl:3: picture "sub/lost\.png" does not exist'):
        rows[1]


def test_a_prompt_ends_where_the_last_answer_begins_and_keeps_the_other_columns(processor: Any) -> None:
    template = get_chat_template("default", processor.tokenizer)
    example = {"messages": conversation("<image> Which digit?", "three"), "images": [picture(5)], "task": "single"}
    prompt = multimodal_prompt(example, image_token=processor.image_token, template=template)
    assert prompt["text"] == "<|im_start|>user\n<|pic|> Which digit?<|im_end|>\n<|im_start|>assistant\n"
    assert [image.size for image in prompt["images"]] == [(2, 5)]
    assert (prompt["question"], prompt["answer"], prompt["task"]) == ("Which digit?", "three", "single")
    unanswered = {**example, "messages": example["messages"][:1]}
    assert multimodal_prompt(unanswered, image_token=processor.image_token, template=template)["answer"] == ""
    with pytest.raises(DataError, match="no message before the answer"):
        multimodal_prompt({"messages": example["messages"][1:]}, image_token="<|pic|>", template=template)


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        ({}, (60, 40)),
        ({"max_pixels": 600}, (30, 20)),
        ({"max_pixels": 2400}, (60, 40)),
        ({"max_pixel_size": 45}, (45, 30)),
        ({"scale_factor": 28}, (56, 28)),
        ({"scale_factor": 28, "max_pixels": 28 * 28}, (28, 28)),
        ({"scale_factor": 16, "max_pixel_size": 50}, (48, 32)),
        ({"scale_factor": 100}, (100, 100)),
    ],
)
def test_a_picture_is_scaled_to_the_limits(limits: dict[str, int], size: tuple[int, int]) -> None:
    image = Image.effect_noise((60, 40), 50)
    assert load_picture(image, **limits).size == size
    file = io.BytesIO()
    image.resize((480, 320)).save(file, "JPEG")
    if "max_pixels" in limits or "max_pixel_size" in limits:
        width, height = load_picture(file.getvalue(), **limits).size
        assert width * height <= limits.get("max_pixels", 1 << 20)
        assert max(width, height) <= limits.get("max_pixel_size", 1 << 20)


def test_a_photograph_scaled_down_while_decoding_is_the_same_picture() -> None:
    ramp = np.linspace(0, 255, 512 * 384 * 3).reshape(384, 512, 3).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG", quality=95)
    small = np.asarray(load_picture(file.getvalue(), max_pixels=128 * 96), int)
    plain = np.asarray(load_picture(file.getvalue()).resize((128, 96), Image.Resampling.BICUBIC), int)
    assert small.shape == plain.shape
    assert np.abs(small - plain).mean() < 2


def test_base64_and_arrays_are_pictures(processor: Any) -> None:
    text = base64.b64encode(png(2, 7)).decode()
    forms: list[Any] = [text, f"data:image/png;base64,{text}", np.asarray(picture(2, 7)), {"base64": text}]
    for form in forms:
        assert encode(processor, "<image>", [form])["pixel_values"].tolist() == [[7, 0, 0]]
    for form, sentence in (
        (text[:-7], "a picture is not whole base64"),
        ("https://x.org/a.png", 'picture "https://x.org/a.png" is a web address'),
        (np.zeros((2, 2), float), r"an array \[2, 2\] of float64"),
        ({"path": None}, "a picture has neither of bytes, path"),
    ):
        with pytest.raises(DataError, match=sentence):
            encode(processor, "<image>", [form])


def test_a_part_holds_its_picture_itself_and_others_take_theirs_from_the_column(processor: Any) -> None:
    url = "data:image/png;base64," + base64.b64encode(png(2, 3)).decode()
    parts = [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "and <image>?"},
        {"type": "image", "image": picture(1, 5)},
    ]
    sample = encode(processor, parts, [picture(1, 2), picture(1, 4)])
    assert sample["pixel_values"][:, 0].tolist() == [2, 3, 4, 5]
    assert text_of(processor, sample)[0].startswith(
        "<|im_start|>user\n<|pic|><|pic|><|pic|>and <|pic|>?<|pic|><|im_end|>"
    )


def test_layouts_of_llava_and_others_need_no_flag(processor: Any) -> None:
    template = get_chat_template("default", processor.tokenizer)
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "three"}]
    rows: list[dict[str, Any]] = [
        {"image": picture(), "conversations": turns},
        {"image": [picture()], "instruction": "<image>\nWhich?", "output": "three"},
        {"images": picture(), "prompt": "<image>\nWhich?", "completion": "three"},
    ]
    samples = [encode_multimodal_sample(row, processor=processor, template=template) for row in rows]
    other = {"q": "<image>\nWhich?", "a": "three", "p": picture()}
    columns = {"prompt": "q", "completion": "a", "images": "p"}
    samples.append(encode_multimodal_sample(other, processor=processor, template=template, columns=columns))
    for sample in samples:
        assert sample["input_ids"].equal(samples[0]["input_ids"])
        assert sample["pixel_values"].equal(samples[0]["pixel_values"])
        assert text_of(processor, sample)[1] == "three<|im_end|>"


def test_pictures_outside_the_root_are_not_read(processor: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "own.png").write_bytes(png())
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(DataError, match="leads out of the data root") as error:
            load_picture(name, tmp_path / "data", tmp_path / "data")
        assert error.value.reason == "path outside root"
    assert load_picture("own.png", tmp_path / "data", tmp_path / "data").size == (2, 3)
    (tmp_path / "data" / "rows.jsonl").write_text(
        json.dumps({"messages": conversation("<image>"), "images": ["../secret.png"]}) + "\n"
    )
    template = get_chat_template("default", processor.tokenizer)
    transform = partial(encode_multimodal_sample, processor=processor, template=template)
    rows = build_dataset(tmp_path / "data" / "rows.jsonl", transform=transform, root=tmp_path / "data")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: picture .* leads out of the data root") as error:
        rows[0]
    assert error.value.reason == "path outside root"


def test_each_fault_has_its_reason(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        ("<image>", ["lost.png"], {}, "missing file"),
        ("<image>", [png()[:-30]], {}, "broken picture"),
        ("<image> <image>", [picture()], {}, "bad row"),
        ("<image> <image>", [picture()] * 2, {"max_image_nums": 1}, "too long"),
        ("<image>", [picture(300)], {}, "too long"),
        ("Hello", None, {"answer": ""}, "no answer"),
        ([{"type": "video"}], None, {}, "broken sample"),
    ]
    for question, images, more, reason in cases:
        with pytest.raises(DataError) as error:
            encode(processor, question, images, **more)
        assert error.value.reason == reason
    unlearnt = [conversation("Hello")[0], {**conversation("")[1], "weight": 0}]
    monkeypatch.setattr(processor.tokenizer, "chat_template", UNMARKED)
    template = get_chat_template("default", processor.tokenizer)
    with pytest.raises(DataError, match="nothing to learn") as error:
        encode_multimodal_sample({"messages": unlearnt}, processor=processor, template=template)
    assert error.value.reason == "nothing to learn"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(DataError, match="decompression bomb") as error:
        load_picture(png())
    assert error.value.reason == "too many pixels"


UNMARKED = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


class Targets:
    """An image processor: the red of each picture as [n, 1, 1, 1]."""

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        return {"pixel_values": torch.tensor([[[[float(image.getpixel((0, 0))[0])]]] for image in images])}


def drawing(processor: Any, **kwargs: Any) -> Generation:
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|pic|>", "<|draw|>"]})
    return Generation(Targets(), "<|draw|>", 3, begin="<b>", end="</b>", **kwargs)


DRAW = [
    {"role": "user", "content": "<image> again"},
    {"role": "assistant", "content": "here: <image>"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " darker"}]},
    {
        "role": "assistant",
        "content": [{"type": "image", "image": picture(1, 8)}, {"type": "image", "generation": False}],
    },
]


def test_pictures_to_draw_are_kept_apart_from_pictures_to_read(processor: Any) -> None:
    generation = drawing(processor)
    row = {"messages": DRAW, "images": [picture(2, 1), picture(2, 2), picture(2, 3), picture(2, 4)]}
    template = get_chat_template("default", processor.tokenizer)
    sample = encode_multimodal_sample(row, processor=processor, template=template, generation=generation)
    assert sample["pixel_values"][:, 0].tolist() == [1, 3, 4]
    assert sample["target_pixel_values"].flatten().tolist() == [2, 8]
    text, learnt = text_of(processor, sample)
    assert text.count("<b><|draw|><|draw|><|draw|></b>") == 2
    assert learnt == "here: <b></b><|im_end|><b></b><|im_end|>"
    learning = encode_multimodal_sample(
        row, processor=processor, template=template, generation=drawing(processor, learnt=True)
    )
    assert text_of(processor, learning)[1].count("<|draw|>") == 6
    assert learning["input_ids"].equal(sample["input_ids"])


def test_a_picture_to_draw_needs_a_generation(processor: Any) -> None:
    part = [{"type": "image", "generation": True}]
    row = {"messages": [*conversation("Hello"), {"role": "assistant", "content": part}], "images": [picture()]}
    template = get_chat_template("default", processor.tokenizer)
    with pytest.raises(DataError, match="message 3 has a picture to draw, but no generation is set up"):
        encode_multimodal_sample(row, processor=processor, template=template)
    with pytest.raises(DataError, match=r'message 1 has "<\|draw\|>" in its text'):
        encode_multimodal_sample(
            {"messages": conversation("<|draw|>")},
            processor=processor,
            template=template,
            generation=drawing(processor),
        )


def test_a_pair_is_turned_around(processor: Any) -> None:
    generation = drawing(processor)
    question = [{"type": "image", "image": picture(2, 7)}, {"type": "text", "text": "what is it?"}]
    for asked, images in (("<image>what is it?", [picture(2, 7)]), (question, None)):
        sample = encode(processor, asked, images, "a cat", generation=generation, generation_ratio=1.0)
        text, learnt = text_of(processor, sample)
        assert text.startswith("<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n<b><|draw|>")
        assert learnt == "<b></b><|im_end|>"
        assert sample["target_pixel_values"].flatten().tolist() == [7]
        assert "pixel_values" not in sample
        read = encode(processor, asked, images, "a cat", generation=generation)
        assert "target_pixel_values" not in read


def test_as_many_pairs_are_turned_around_as_asked_and_the_same_ones_again(processor: Any) -> None:
    generation = drawing(processor)

    def drawn(images: list[Any]) -> list[bool]:
        options = {"generation": generation, "generation_ratio": 0.3}
        made = [encode(processor, "<image>what?", [image], f"{i % 7}", **options) for i, image in enumerate(images)]
        return ["target_pixel_values" in sample for sample in made]

    first = drawn([picture(2, i) for i in range(150)])
    assert 0.2 < sum(first) / 150 < 0.4
    assert drawn([picture(2, i) for i in range(150)]) == first
    assert sum(a != b for a, b in zip(drawn([{"bytes": png(2, i)} for i in range(150)]), first, strict=True)) > 20


@pytest.mark.parametrize(
    ("messages", "images"),
    [
        (conversation("<image><image>which?"), 2),
        ([*conversation("<image>which?"), *conversation("and now?")], 1),
        (conversation("no picture"), 0),
        (conversation("<image>again", "here: <image>"), 2),
    ],
)
def test_what_is_no_pair_stays_as_it_is(processor: Any, messages: list[Any], images: int) -> None:
    row = {"messages": messages, "images": [picture(2, i) for i in range(images)]}
    template = get_chat_template("default", processor.tokenizer)
    options = {"processor": processor, "template": template, "generation": drawing(processor)}
    turned = encode_multimodal_sample(row, **options, generation_ratio=1.0)
    assert turned["input_ids"].equal(encode_multimodal_sample(row, **options)["input_ids"])


def test_the_prompt_of_a_drawing_has_its_targets_beside_it(processor: Any) -> None:
    generation = drawing(processor)
    template = get_chat_template("default", processor.tokenizer)
    row = {"messages": DRAW[:2], "images": [picture(2, 1), picture(2, 2)]}
    prompt = multimodal_prompt(row, image_token=processor.image_token, template=template, generation=generation)
    assert prompt["text"] == "<|im_start|>user\n<|pic|> again<|im_end|>\n<|im_start|>assistant\n"
    assert [image.getpixel((0, 0))[0] for image in prompt["images"]] == [1]
    assert [image.getpixel((0, 0))[0] for image in prompt["targets"]] == [2]
    assert (prompt["question"], prompt["answer"]) == ("again", "here:")


def test_the_prompt_of_a_video_and_a_sound_is_what_its_processor_takes(processor: Any) -> None:
    template = get_chat_template("default", processor.tokenizer)
    clip, wave = np.zeros((4, 2, 2, 3), np.uint8), {"array": np.ones(8, np.float32), "sampling_rate": 100}
    row = {"messages": conversation("<video> <audio> why?"), "videos": [clip], "audios": [wave], "id": 1}
    prompt = multimodal_prompt(
        row, video_token="<|pic|>", audio_token="<|end|>", template=template, sampling_rate=100, max_frames=2
    )
    assert prompt["text"].startswith("<|im_start|>user\n<|pic|> <|end|> why?<|im_end|>")
    assert [video.shape for video in prompt["videos"]] == [(2, 2, 2, 3)]
    assert prompt["video_metadata"][0]["frames_indices"] == [0, 2]
    assert prompt["audio"][0].tolist() == [1.0] * 8
    assert (prompt["images"], prompt["question"], prompt["id"]) == ([], "why?", 1)
    assert "audios" not in prompt


def test_positions_of_the_callers_own_come_into_the_sample(processor: Any) -> None:
    def twice(sample: dict[str, Any]) -> torch.Tensor:
        return torch.arange(len(sample["input_ids"]))[None] * 2

    sample = encode(processor, "<image>", [picture()], position_ids=twice)
    assert sample["position_ids"].tolist() == list(range(0, 2 * len(sample["input_ids"]), 2))
