"""Keys of the omni recipe that say how pictures are drawn and by what they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Ranks
from veomni_config import OmniRecipeConfig, parse_args
from veomni_data import DataDescription
from veomni_data.pipeline import build_pipeline
from veomni_models import OmniModel, OmniProcessor, register_omni_model
from veomni_recipes.launch import USER_ERROR
from veomni_recipes.run_folder import read_metrics
from veomni_recipes.tasks.omni import train_omni_model
from veomni_recipes.training_data import describe_data

FLOW = {
    "model_type": "flow_decoder",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_tokens": 2,
}
CODES = {
    "model_type": "janus_vqgan",
    "num_embeddings": 16,
    "embed_dim": 4,
    "num_patches": 4,
    "channel_multiplier": [1, 1],
    "base_channels": 32,
    "latent_channels": 8,
    "num_res_blocks": 1,
}


def draws(arguments: list[str], decoder: dict[str, Any], folder: Path, *changes: str) -> list[str]:
    """Command line of a short run of the digits recipe that draws too."""
    decoders = json.dumps({"image": decoder})
    options = ["--train.max_steps=2", "--train.num_train_epochs=1", "--data.max_seq_len=128"]
    return [*arguments, *options, f"--train.output_dir={folder}", f"--model.decoders={decoders}", *changes]


def train(arguments: list[str]) -> None:
    train_omni_model.main(arguments)


def test_a_share_of_the_pictures_is_drawn_and_a_replay_draws_the_same(arguments: list[str], tmp_path: Path) -> None:
    command = draws(arguments, FLOW, tmp_path, "--data.generation_ratio=0.5")
    cfg = parse_args(OmniRecipeConfig, command)
    _, data, _ = train_omni_model.read_data(cfg)
    rows = [json.loads(line) for line in Path(str(cfg.data.train_path)).read_text(encoding="utf-8").splitlines()]
    single = [i for i, row in enumerate(rows[:400]) if row["task"] == "single_picture"]
    drawn = ["target_pixel_values" in data[i] for i in single]
    assert 0.4 < sum(drawn) / len(drawn) < 0.6
    first = data[single[drawn.index(True)]]
    assert "pixel_values" not in first
    assert first["target_pixel_values"].shape == (1, 3, 8, 8)
    train(command)
    assert len(read_metrics(tmp_path)) == 2
    # what `veomni-data replay` goes by
    register_omni_model()
    again = DataDescription.from_dict(describe_data(cfg, tmp_path / "model_assets", 0))
    samples = build_pipeline(again).dataset()
    assert ["target_pixel_values" in samples[i] for i in single] == drawn


def test_a_frozen_decoder_keeps_its_weights(arguments: list[str], tmp_path: Path) -> None:
    options = ["--train.save_initial_model=true", "--train.save_hf_weights=true", "--data.generation_ratio=0.5"]
    train(draws(arguments, FLOW, tmp_path, *options, "--train.freeze_decoder=true"))
    before, after = (OmniModel.from_pretrained(tmp_path / name).state_dict() for name in ("initial_model", "hf_ckpt"))
    learnt = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert learnt == {"foundation", "encoders", "projectors"}
    assert OmniProcessor.from_pretrained(tmp_path / "initial_model").generation["tokens"] == 2


def test_pictures_are_read_by_the_decoder(arguments: list[str], tmp_path: Path, two_ranks: Ranks) -> None:
    config = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8"))
    del config["model"]["encoders"]
    config["model"] |= {"input_encoder": "decoder", "encode_target": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    arguments = [str(tmp_path / "run.yaml"), *arguments[1:]]
    options = ["--data.generation_ratio=0.5", "--train.save_hf_weights=true"]
    train(draws(arguments, CODES, tmp_path / "one", *options))
    two_ranks.run(train, draws(arguments, CODES, tmp_path / "two", *options), timeout=110)
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert max(abs(a - b) / a for a, b in zip(one, two, strict=True)) <= 1e-5
    exported = OmniModel.from_pretrained(tmp_path / "two" / "hf_ckpt")
    assert exported.config.input_encoder == "decoder"
    assert not exported.encoders


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--data.generation_ratio=0.5", "data.generation_ratio: pictures are drawn by a decoder, and the model has"),
        ("--model.input_encoder=decoder", "model.input_encoder: 'decoder' needs a discrete model.decoders.image"),
        ("--model.output_encoder=encoder", "model.output_encoder: an encoder's features"),
        ("--model.encode_target=true", "model.encode_target: only a discrete model.decoders.image"),
    ],
)
def test_what_needs_a_decoder_says_so(
    change: str, said: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train([*arguments, f"--train.output_dir={tmp_path}/run", change])
    assert ended.value.code == USER_ERROR
    assert said in capsys.readouterr().err
