from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from veomni_data import (
    DataError,
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
        ("<image>", [7], "a picture is a int: it must be a path, bytes or an image"),
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
    with pytest.raises(DataError, match="nothing to learn"):
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
