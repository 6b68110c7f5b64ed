from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPConfig, CLIPModel, SiglipVisionModel
from veomni_models import ModelError, OmniModel, build_omni_model, plan_for

from .test_initialization import PARTS

IMAGE = PARTS["image_token_id"]
SAMPLES = {"pictures": (1, 2, 0), "lengths": (12, 17, 9)}  # pictures and tokens of each sample


def row() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(6, 41, (1, sum(SAMPLES["lengths"])))
    start = 0
    for pictures, length in zip(SAMPLES["pictures"], SAMPLES["lengths"], strict=True):
        for i in range(pictures):
            ids[0, start + 1 + 5 * i : start + 5 + 5 * i] = IMAGE
        start += length
    cu = torch.tensor([0, *SAMPLES["lengths"]]).cumsum(0).to(torch.int32)
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in SAMPLES["lengths"]])[None],
        "cu_seq_lens_q": cu,
        "pixel_values": torch.randn(3, 3, 8, 8),
    }


def model(seed: int = 0) -> OmniModel:
    return build_omni_model(**PARTS, init_device="cpu", seed=seed)


def test_a_packed_row_is_the_plain_transformers_parts_on_each_sample_alone() -> None:
    omni, inputs = model(), row()
    tower = SiglipVisionModel(omni.config.encoders["image"]["config"])
    tower.load_state_dict(omni.encoders["image"].state_dict())
    text = AutoModelForCausalLM.from_config(copy.deepcopy(omni.config.text_config), attn_implementation="eager")
    text.load_state_dict(omni.foundation.state_dict())
    patches = tower(inputs["pixel_values"]).last_hidden_state.view(3, 4, 4, 16)  # [pictures, height, width, C]
    corners = [patches[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    features = omni.projectors["image"](torch.cat(corners, dim=-1).flatten(1, 2))
    logits = omni(**inputs, use_cache=False).logits[0].split(SAMPLES["lengths"])
    first = 0
    ids = inputs["input_ids"][0].split(SAMPLES["lengths"])
    for own, pictures, got in zip(ids, SAMPLES["pictures"], logits, strict=True):
        embeds = text.get_input_embeddings()(own).clone()
        embeds[own == IMAGE] = features[first : first + pictures].flatten(0, 1)
        first += pictures
        alone = text(inputs_embeds=embeds[None], use_cache=False).logits[0]
        assert (got - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_generation_with_a_cache_is_generation_without() -> None:
    omni, inputs = model().eval(), row()
    ids, pixels = inputs["input_ids"][:, :12], inputs["pixel_values"][:1]
    made = omni.generate(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    for _ in range(6):
        following = omni(input_ids=ids, pixel_values=pixels, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
    assert torch.equal(made, ids)


def test_a_saved_model_loads_in_a_fresh_process_and_gives_the_same_logits(tmp_path: Path) -> None:
    omni, inputs = model().eval(), row()
    torch.save((inputs, omni(**inputs, use_cache=False).logits), tmp_path / "want.pt")
    omni.save_pretrained(tmp_path / "model")
    script = """
import sys, torch
from transformers import AutoModelForImageTextToText
from veomni_models import register_omni_model
register_omni_model()
inputs, want = torch.load(sys.argv[1] + "/want.pt")
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1] + "/model").eval()
torch.testing.assert_close(model(**inputs, use_cache=False).logits, want, rtol=0, atol=2e-6)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_a_row_without_pictures_still_runs_the_encoder_in_training() -> None:
    omni, inputs = model(), row()
    ids = inputs["input_ids"][:, -9:]
    omni(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    grads = [p.grad for p in omni.encoders.parameters()]
    assert all(g is not None and not g.any() for g in grads)
    assert omni.foundation.lm_head.weight.grad.any()


@pytest.mark.parametrize("extra", [-4, 4])
def test_placeholders_that_do_not_fit_the_pictures_are_refused(extra: int) -> None:
    omni, inputs = model(), row()
    inputs["input_ids"][0, 0 if extra > 0 else 1 : 1 if extra > 0 else 5] = IMAGE if extra > 0 else 7
    with pytest.raises(ValueError, match="placeholder tokens in input_ids for 12 features of 3 image inputs"):
        omni(**inputs, use_cache=False)


def test_the_plan_names_the_blocks_of_all_parts() -> None:
    assert {"Qwen3DecoderLayer", "SiglipEncoderLayer"} <= set(plan_for(build_omni_model(**PARTS))["shard_units"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "/no/such/folder"}, "/no/such/folder: no such folder"),
        ({"encoders": {"smell": {}}}, r"model.encoders.smell: unknown modality"),
        ({"encoders": {"image": {**PARTS["encoders"]["image"], "merge_size": 3}}}, "merge_size=3 must divide"),
        ({"encoders": {"image": {"model_type": "nothing"}}}, "model.encoders.image: model_type 'nothing' is not known"),
        ({"foundation": {**PARTS["foundation"], "vocab_size": 40}}, "vocab_size=40 is smaller than the tokenizer"),
        ({"foundation": {"hidden_size": 8}}, "no model_type to start from"),
        (
            {"foundation": {**PARTS["foundation"], "hiden_size": 8}},
            "hiden_size: a qwen3 config has no such key, did you",
        ),
        (
            {"foundation": {**PARTS["foundation"], "num_attention_heads": 5}},
            "=5 is no multiple of num_key_value_heads=2",
        ),
        ({"attn_implementation": "flash_atention_2"}, "not registered in transformers, did you mean flash_attention_2"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        build_omni_model(**{**PARTS, **change})
    assert "\n" not in str(error.value)


def pretrained(folder: Path) -> dict[str, object]:
    """A foundation and an encoder whose names on disk are not those in memory, saved as anybody would."""
    torch.manual_seed(3)
    sizes = {k: v for k, v in PARTS["foundation"].items() if k != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", vocab_size=41, **sizes)).save_pretrained(
        folder / "text"
    )
    sizes = {k: v for k, v in PARTS["encoders"]["image"].items() if k not in ("model_type", "merge_size")}
    AutoModel.from_config(AutoConfig.for_model("dinov2", **sizes)).save_pretrained(folder / "tower")
    return {
        "weights_path": folder / "text",
        "encoders": {"image": {"model_path": folder / "tower", "merge_size": 2}},
        "vocab_size": 41,
        "image_token_id": IMAGE,
    }


def test_parts_start_from_pretrained_folders(tmp_path: Path) -> None:
    omni = build_omni_model(**pretrained(tmp_path), init_device="cpu", seed=1)
    for part, plain in (
        (omni.foundation, AutoModelForCausalLM.from_pretrained(tmp_path / "text")),
        (omni.encoders["image"], AutoModel.from_pretrained(tmp_path / "tower")),
    ):
        assert all(
            torch.equal(a, b) for a, b in zip(part.state_dict().values(), plain.state_dict().values(), strict=True)
        )
    again = build_omni_model(**pretrained(tmp_path), init_device="cpu", seed=2)
    assert not torch.equal(omni.projectors["image"].up.weight, again.projectors["image"].up.weight)


def test_a_vocabulary_that_is_full_grows_for_the_placeholder(tmp_path: Path) -> None:
    parts = {**pretrained(tmp_path), "vocab_size": 43}
    omni = build_omni_model(**parts, init_device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert omni.config.text_config.vocab_size == omni.foundation.lm_head.out_features == 43
    assert torch.equal(omni.foundation.lm_head.weight[:41], plain.lm_head.weight)
    with pytest.raises(ModelError, match=r"vocab_size=41 is smaller .*set train.init_device to cpu"):
        build_omni_model(**parts)


def test_a_whole_clip_folder_gives_its_vision_tower(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 2}
    clip = CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 50}, vision_config=vision, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    parts = {**PARTS, "encoders": {"image": {"model_path": tmp_path / "clip", "merge_size": 2}}}
    omni = build_omni_model(**parts, init_device="cpu")
    own, theirs = omni.encoders["image"].state_dict(), clip.vision_model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(own.values(), theirs.values(), strict=True))


def test_a_saved_omni_model_is_built_again_from_its_folder(tmp_path: Path) -> None:
    omni = model(seed=5)
    omni.save_pretrained(tmp_path)
    again = build_omni_model(weights_path=tmp_path, vocab_size=41, image_token_id=IMAGE, init_device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(omni.state_dict().values(), again.state_dict().values(), strict=True))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    parts = pretrained(tmp_path)
    parts["encoders"] = {"image": {"model_path": tmp_path / "tower", "merge_size": 2, "num_hidden_layers": 3}}
    with pytest.raises(ModelError, match=r"model.encoders.image: .*tower lacks 18 weights of the model"):
        build_omni_model(**parts, init_device="cpu")
