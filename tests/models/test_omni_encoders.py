"""Towers of every kind in an omni model: a packed row is each input alone through the untouched transformers parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from veomni_data import PackingCollator
from veomni_models import ModelError, OmniProcessor, build_omni_model, build_omni_processor
from veomni_models.towers import tower_class

from .omni_parts import PICTURES, SOUNDS, assemble, encoders_of, picture, sample, save_tokenizer, sound
from .test_initialization import PARTS

TINY_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 9,
}


def samples_of(processor: OmniProcessor) -> list[tuple[dict[str, torch.Tensor], list[Any]]]:
    """Samples with the inputs of each: two with several of them, one without any."""
    if processor.image_token:
        sizes = [(16, 24), (30, 12), (8, 8)]
        first, *rest = (picture(h, w, i) for i, (h, w) in enumerate(sizes))
        return [
            (sample(processor, "what is <image> this one", images=[first]), [first]),
            (sample(processor, "<image> two <image> three picture", images=rest), rest),
            (sample(processor, "one two three"), []),
        ]
    first, *rest = (sound(samples, i) for i, samples in enumerate((9_000, 15_000, 5_600)))
    return [
        (sample(processor, "what is <audio> this one", audio=[first]), [first]),
        (sample(processor, "<audio> two <audio> three sound", audio=rest), rest),
        (sample(processor, "one two three"), []),
    ]


def features_of_one(tower: Any, processor: OmniProcessor, item: Any) -> torch.Tensor:
    """[..., C]: what a plain tower of transformers gives for one input that its own processor made."""
    if processor.audio_token:
        extractor = processor.feature_extractor
        made = extractor(item, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
        if "input_values" in made:
            return tower(made["input_values"]).last_hidden_state[0]
        out = tower(made["input_features"]).last_hidden_state.reshape(-1, tower.config.hidden_size)
        frames = made["attention_mask"].sum() + 1
        return out[: frames // 2 if len(out) == 50 else ((frames // 2) - 2) // 2 + 1]
    made = processor.image_processor([item], return_tensors="pt")
    kind = tower.config.model_type
    if kind.startswith("qwen"):
        return tower(made["pixel_values"], grid_thw=made["image_grid_thw"]).pooler_output
    if kind == "pixtral":
        height, width = (int(side) // tower.config.patch_size for side in made["image_sizes"][0])
        return tower(**made).last_hidden_state[0].view(height, width, -1)
    if kind.startswith("siglip2"):
        return tower(**made).last_hidden_state[0][made["pixel_attention_mask"][0].bool()]
    out = tower(**made).last_hidden_state[0]
    if out.ndim == 3:
        return out.permute(1, 2, 0)
    grid = 4
    return out[-grid * grid :].view(grid, grid, -1)


def merged(features: torch.Tensor, size: int) -> torch.Tensor:
    """Plain loops over neighbourhoods; what is missing at an edge is zero."""
    if features.ndim == 2:
        rows = list(features) + [torch.zeros_like(features[0])] * (-len(features) % size)
        return torch.stack([torch.cat(rows[i : i + size]) for i in range(0, len(rows), size)])
    height, width, channels = features.shape
    full = torch.zeros(height + -height % size, width + -width % size, channels)
    full[:height, :width] = features
    return torch.stack(
        [
            torch.cat([full[y + i, x + j] for i in range(size) for j in range(size)])
            for y in range(0, len(full), size)
            for x in range(0, full.shape[1], size)
        ]
    )


def loss_and_gradients(model: torch.nn.Module, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("name", [*PICTURES, *SOUNDS])
def test_a_packed_row_is_each_input_alone_through_the_plain_parts(name: str, tmp_path: Path) -> None:
    omni, processor = assemble(encoders_of(name), tmp_path)
    (modality,) = omni.config.encoders
    data = samples_of(processor)
    row = PackingCollator()([one for one, _ in data])
    total = int((row["shift_labels"] != -100).sum())
    got, got_gradients = loss_and_gradients(omni, omni(**row, num_items_in_batch=total, use_cache=False).loss)

    encoder, token = omni.config.encoders[modality], omni.config.__dict__[f"{modality}_token_id"]
    plain = copy.deepcopy(omni)
    plain.foundation = AutoModelForCausalLM.from_config(
        copy.deepcopy(omni.config.text_config), attn_implementation="eager"
    )
    plain.foundation.load_state_dict(omni.foundation.state_dict())
    cls = tower_class(encoder["config"])
    plain.encoders[modality] = cls._from_config(copy.deepcopy(encoder["config"]))
    plain.encoders[modality].load_state_dict(omni.encoders[modality].state_dict(), strict=False)
    plain.train()
    loss: Any = 0.0
    for one, items in data:
        embeds = plain.foundation.get_input_embeddings()(one["input_ids"]).clone()
        parts = [features_of_one(plain.encoders[modality], processor, item) for item in items]
        merge = encoder["merge_size"]
        parts = [merged(p, merge) if merge > 1 else p.reshape(-1, p.shape[-1]) for p in parts]
        if parts:
            embeds[one["input_ids"] == token] = torch.cat([plain.projectors[modality](p, [len(p)]) for p in parts])
        loss = (
            loss
            + plain.foundation(
                inputs_embeds=embeds[None], labels=one["labels"][None], num_items_in_batch=total, use_cache=False
            ).loss
        )
    want, want_gradients = loss_and_gradients(plain, loss)
    assert got == pytest.approx(want, rel=1e-5)
    largest = max(g.abs().max() for g in want_gradients.values())
    assert any(n.startswith("encoders") and g.abs().max() > 1e-4 * largest for n, g in want_gradients.items())
    for name, gradient in want_gradients.items():
        difference = (got_gradients[name] - gradient).abs().max()
        assert difference <= 2e-5 * largest, f"{name} is off by {difference:.1e}"


def test_a_whole_whisper_folder_gives_its_encoder_and_its_feature_extractor(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SOUNDS["whisper"].items() if key != "merge_size"}
    config = WhisperConfig(
        **sizes, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, vocab_size=20, pad_token_id=0
    )
    whole = WhisperModel(config)
    whole.save_pretrained(tmp_path / "whisper")
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1, dither=0.5)
    extractor.save_pretrained(tmp_path / "whisper")
    encoders = {"audio": {"model_path": tmp_path / "whisper"}}
    processor = build_omni_processor(save_tokenizer(tmp_path / "text"), encoders=encoders)
    assert processor.feature_extractor.dither == 0.5
    omni = build_omni_model(
        foundation=PARTS["foundation"], encoders=encoders, vocab_size=41, audio_token_id=5, init_device="cpu"
    )
    own, theirs = omni.encoders["audio"].state_dict(), whole.encoder.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_a_folder_without_such_a_tower_is_refused(tmp_path: Path) -> None:
    AutoModel.from_config(AutoConfig.for_model("llama", **TINY_TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model.encoders.audio: encoder 'llama': LlamaModel takes input_ids"):
        build_omni_model(
            foundation=PARTS["foundation"],
            encoders={"audio": {"model_path": tmp_path}},
            vocab_size=41,
            audio_token_id=5,
            init_device="cpu",
        )


SIGLIP = {"model_type": "siglip_vision_model", **PICTURES["siglip_vision_model"]}
WHISPER = {"model_type": "whisper", **SOUNDS["whisper"]}


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        ({"image": {**SIGLIP, "projector": "perciever"}}, r"image: projector 'perciever' is unknown: use one of"),
        (
            {"image": {**SIGLIP, "projector": {"type": "mlp", "depth": 2}}},
            "projector mlp has no option 'depth'",
        ),
        ({"image": {**SIGLIP, "projector": {"num_tokens": 2}}}, "has no type: write for example"),
        ({"image": {**SIGLIP, "projector": {"type": "perceiver", "num_heads": 3}}}, "num_heads=3 does not divide the"),
        ({"image": {**SIGLIP, "merge_size": 0}}, "image: merge_size=0 must be a whole number of at least 1"),
        ({"video": {"share": "image"}}, "video.share: there is no model.encoders.image to share"),
        ({"image": SIGLIP, "audio": {"share": "image"}}, "audio: .* cannot be shared: only video has"),
        ({"video": {"model_type": "pixtral"}}, "video: a pixtral encoder does not take video inputs"),
        ({"audio": SIGLIP}, "audio: a siglip_vision_model encoder does not take audio inputs"),
        ({"audio": {"model_type": "parakeet_encoder"}}, "audio: encoder 'parakeet_encoder': ParakeetEncoder takes"),
        ({"audio": {"model_type": "qwen2_5_omni_audio_encoder"}}, "no model that AutoModel builds from this config"),
    ],
)
def test_encoders_that_cannot_be_built_are_one_sentence(encoders: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        build_omni_model(
            foundation=PARTS["foundation"],
            encoders=encoders,
            vocab_size=41,
            image_token_id=5,
            video_token_id=6,
            audio_token_id=7,
        )
    assert "\n" not in str(error.value)


def test_an_encoder_without_a_placeholder_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model.encoders.audio: no audio_token_id was given"):
        build_omni_model(foundation=PARTS["foundation"], encoders={"audio": WHISPER}, vocab_size=41, image_token_id=5)


def test_a_log_mel_encoder_of_no_whole_seconds_needs_another_size(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"max_source_positions=60 is no whole number of seconds: .*multiple of 50"):
        build_omni_processor(
            save_tokenizer(tmp_path), encoders={"audio": {**WHISPER, "max_source_positions": 60, "merge_size": 1}}
        )


def test_inputs_that_the_model_does_not_take_are_refused(tmp_path: Path) -> None:
    omni, processor = assemble({"audio": WHISPER}, tmp_path)
    made = sample(processor, "<audio> one", audio=[sound(9_000)])
    ids = made["input_ids"][None]
    with pytest.raises(ValueError, match="pixel_values was given, but the model has no image encoder"):
        omni(input_ids=ids, pixel_values=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"takes \['feature_attention_mask'\] too"):
        omni(input_ids=ids, input_features=made["input_features"])
    with pytest.raises(ValueError, match="placeholder tokens in input_ids for 8 features of 1 audio inputs"):
        omni(input_ids=ids[:, 1:], **{k: made[k] for k in ("input_features", "feature_attention_mask")})
    with pytest.raises(ValueError, match="image inputs were given, but the model has no image encoder"):
        processor(text=["one"], images=[picture(8, 8)])
    with pytest.raises(ValueError, match=r"a sound of 1.5 s is longer than the 1 s that the model hears"):
        processor(text=["<audio>"], audio=[sound(24_000)])
