"""Pictures that are read by the discrete decoder which draws, and choices of what encodes pictures that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from veomni_models import ModelError, OmniModel, OmniProcessor, build_omni_model, build_omni_processor, reply

from tests.parallel.parity import worst

from .drawing_parts import DECODERS, DRAWN, END, IMAGE, START, TOKENS, alone, count, pack, samples
from .omni_parts import picture, save_tokenizer
from .test_initialization import PARTS

OPTIONS: dict[str, Any] = {
    "foundation": PARTS["foundation"],
    "vocab_size": PARTS["vocab_size"],
    "image_gen_token_id": DRAWN,
    "image_gen_start_token_id": START,
    "image_gen_end_token_id": END,
    "init_device": "cpu",
}


def build() -> OmniModel:
    decoders = {"image": DECODERS["codes"]}
    return build_omni_model(**OPTIONS, decoders=decoders, image_token_id=IMAGE, input_encoder="decoder")


def test_pictures_that_are_read_are_their_codes() -> None:
    model, sample = build().eval(), samples()[4]
    tokenizer, first = model.decoders["image"], model.config.first_code_id
    assert "image" not in model.encoders
    ids = sample["input_ids"].clone()
    ids[ids == IMAGE] = tokenizer.codes(sample["pixel_values"]).flatten() + first
    ids[ids == DRAWN] = tokenizer.codes(sample["target_pixel_values"]).flatten() + first
    expected = model.foundation(input_ids=ids[None]).logits
    given = {key: value for key, value in alone(sample).items() if key != "labels"}
    assert torch.equal(model(**given).logits, expected)


def test_a_packed_row_is_its_samples_alone() -> None:
    data, model, single = samples(), build(), build()
    loss = model(**pack(data), num_items_in_batch=count(data)).loss
    loss.backward()
    expected = torch.stack([single(**alone(sample), num_items_in_batch=count(data)).loss for sample in data]).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients, wanted = (
        {name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in (model, single)
    )
    assert worst(gradients, wanted)[0] <= 1e-5


def test_more_places_than_pictures_are_refused() -> None:
    row = pack(samples())
    with pytest.raises(ValueError, match=r"12 tokens of pictures to read in input_ids for 2 .* pixel_values.* have 8"):
        build()(**{**row, "pixel_values": row["pixel_values"][:2]})


def test_the_processor_and_a_saved_model_read_so_too(tmp_path: Path) -> None:
    decoders = {"image": DECODERS["codes"]}
    processor = build_omni_processor(save_tokenizer(tmp_path), decoders=decoders, input_encoder="decoder")
    model = build_omni_model(
        foundation=PARTS["foundation"],
        decoders=decoders,
        vocab_size=len(processor.tokenizer),
        **processor.placeholder_ids,
        input_encoder="decoder",
        init_device="cpu",
    ).eval()
    processor.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    inputs = processor(text=["what is <image> this"], images=[picture(9, 12)], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == TOKENS
    assert inputs["pixel_values"].shape == (1, 3, 8, 8)
    again, restored = OmniProcessor.from_pretrained(tmp_path / "saved"), OmniModel.from_pretrained(tmp_path / "saved")
    same = again(text=["what is <image> this"], images=[picture(9, 12)], return_tensors="pt")
    keys = ("input_ids", "attention_mask", "pixel_values")
    options = {"eos_token_id": 1, "pad_token_id": 0, "max_new_tokens": 5, "unconditional_ids": torch.tensor([3])}
    (ours,), (theirs,) = (
        reply(each, {key: given[key] for key in keys}, **options)
        for each, given in ((model, inputs), (restored.eval(), same))
    )
    assert ours.token_ids == theirs.token_ids
    assert restored.config.input_encoder == "decoder"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input_encoder": "decoder"}, "model.input_encoder: 'decoder' needs a discrete .*, but there is none"),
        ({"input_encoder": "decoder", "decoders": {"image": DECODERS["flow"]}}, "a flow_decoder has no codes"),
        (
            {"input_encoder": "decoder", "decoders": {"image": DECODERS["codes"]}, "encoders": PARTS["encoders"]},
            "'decoder' has no use for model.encoders.image: leave one of them out",
        ),
        ({"input_encoder": "vae"}, "model.input_encoder: 'vae' must be 'encoder' or 'decoder'"),
        (
            {"output_encoder": "encoder", "decoders": {"image": DECODERS["codes"]}},
            "model.output_encoder: .*show the model what it is to draw: leave it at 'decoder'",
        ),
        ({"encode_target": True, "decoders": {"image": DECODERS["flow"]}}, "model.encode_target: only a discrete"),
    ],
)
def test_what_cannot_encode_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        build_omni_model(**{**OPTIONS, "image_token_id": IMAGE, **options})


def test_a_discrete_decoder_encodes_its_targets() -> None:
    decoders = {"image": DECODERS["codes"]}
    model = build_omni_model(**OPTIONS, **{"encoders": PARTS["encoders"]}, decoders=decoders, image_token_id=IMAGE)
    asked = build_omni_model(
        **OPTIONS, encoders=PARTS["encoders"], decoders=decoders, image_token_id=IMAGE, encode_target=True
    )
    row = pack(samples())
    assert torch.equal(model(**row).loss, asked(**row).loss)


@pytest.mark.parametrize(("name", "kernel"), [("eager", "eager"), ("fused", "grouped_mm"), (None, "grouped_mm")])
def test_experts_of_the_foundation_are_computed_as_asked(name: str | None, kernel: str) -> None:
    foundation = {
        **PARTS["foundation"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    model = build_omni_model(
        **{**OPTIONS, "foundation": foundation, "init_device": "meta"},
        encoders=PARTS["encoders"],
        image_token_id=IMAGE,
        moe_implementation=name,
    )
    assert model.foundation.config._experts_implementation == kernel
