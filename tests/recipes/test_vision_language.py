"""The recipes of vision-language models and of omni thinkers: exact, frozen where they should be, and loadable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from veomni_config import ConfigError, VLRecipeConfig, parse_args
from veomni_data import PackingCollator, PaddingCollator, multimodal_prompt
from veomni_models import build_processor
from veomni_parallel import build_parallelize_model, init_parallel_state
from veomni_recipes.black_box import read_boxes
from veomni_recipes.evaluation import generate, load_exported, prompt_options
from veomni_recipes.replay import replay_step
from veomni_recipes.run_folder import read_metrics
from veomni_recipes.smoke import smoke_config, tiny_tokenizer
from veomni_recipes.smoke_data import texts
from veomni_recipes.smoke_vision import save_tiny_model
from veomni_recipes.supported import VISION_LANGUAGE, refuse_without_effect
from veomni_recipes.tasks.omni import train_qwen_omni, train_qwen_vl

pytest.importorskip("torchvision")

CONFIGS = Path(train_qwen_vl.__file__).parents[2] / "configs" / "multimodal"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(texts()[:200], 500)


def conversation(question: str, answer: str, **media: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **media}


def write_data(folder: Path, sounds: bool) -> None:
    """Two pictures of different sizes; a picture, a video and a sound; text alone."""
    rng = np.random.default_rng(0)
    sizes = {"a": (32, 48), "b": (64, 32), "c": (32, 32), **{f"frame_{i}": (48, 32) for i in range(6)}}
    for name, (height, width) in sizes.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    heard: dict[str, Any] = {}
    if sounds:
        wave = np.sin(np.arange(9_000) / 20)
        heard = {"audios": [{"array": wave.tolist(), "sampling_rate": 16_000}]}
    clip = [f"frame_{i}.png" for i in range(6)]
    question = "<video> and then <image>" + ("<audio>" if sounds else "")
    rows = [
        conversation("<image>What is <image> here?", "a cat and a dog", images=["a.png", "b.png"]),
        conversation(question, "some words", images=["c.png"], videos=[clip], **heard),
        conversation("Only text?", "some other words"),
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def configured(folder: Path, *changes: str) -> VLRecipeConfig:
    return parse_args(
        VLRecipeConfig,
        [
            f"--model.model_path={folder}/model",
            f"--data.train_path={folder}/train.jsonl",
            "--train.output_dir=unused",
            "--train.init_device=cpu",
            *changes,
        ],
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_recipes_data_have_the_loss_and_gradients_of_each_sample_alone(
    family: str, tmp_path: Path, tokenizer: Any
) -> None:
    hears = "audio" in save_tiny_model(family, tokenizer, tmp_path / "model")
    write_data(tmp_path, sounds=hears)
    cfg = configured(tmp_path, "--data.fps=3")  # thirds of a second, which Qwen3-Omni puts between two positions
    processor, data, _ = train_qwen_vl.read_data(cfg)
    model = train_qwen_vl.build_model(cfg, processor, torch.device("cpu"))
    with torch.no_grad():  # away from what is small or zero at the start
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("eager")

    samples = [data[i] for i in range(3)]
    assert samples[1]["position_ids"].is_floating_point() == (family == "qwen3_omni_moe_thinker")
    targets = sum(int((sample["labels"][1:] != -100).sum()) for sample in samples)
    truth = 0.0
    for sample in samples:
        tokens = {key: sample[key][None] for key in ("input_ids", "labels", "mm_token_type_ids") if key in sample}
        media = {key: value for key, value in sample.items() if key not in (*tokens, "position_ids")}
        mask = torch.ones_like(tokens["input_ids"])
        loss = plain(**tokens, **media, attention_mask=mask, num_items_in_batch=targets, use_cache=False).loss
        loss.backward()
        truth += loss.item()

    wrapped = build_parallelize_model(model, init_parallel_state(), mode="ddp")
    for collator in (PackingCollator, PaddingCollator):
        wrapped.zero_grad()
        batch = collator(processor.tokenizer.pad_token_id)(samples)
        loss = wrapped(**batch, num_items_in_batch=targets, use_cache=False).loss
        loss.backward()
        assert loss.item() == pytest.approx(truth, rel=1e-5)
        compared = 0
        for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            if expected.grad is not None:
                assert parameter.grad is not None, name
                worst = (parameter.grad - expected.grad).abs().max()
                assert worst <= 1e-5 * expected.grad.abs().max() + 1e-9, name  # keys' biases have a gradient of zero
                compared += 1
        assert compared > 40


@pytest.fixture(scope="module")
def frozen_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen3-VL model, data, and a run of four steps with a frozen vision encoder."""
    folder = tmp_path_factory.mktemp("frozen")
    config = smoke_config("train_qwen_vl", [f"{CONFIGS}/qwen3_vl.yaml"], 1, folder)
    train_qwen_vl.main([str(config), "--train.freeze_vit", "--train.max_steps=4"])
    return folder


def test_a_frozen_vision_encoder_keeps_its_weights_and_the_rest_learns(frozen_run: Path) -> None:
    before, after = weights_of(frozen_run / "model"), weights_of(frozen_run / "run" / "hf_ckpt")
    assert before.keys() == after.keys()
    kept = {name for name in before if before[name].equal(after[name])}
    assert kept == {name for name in before if ".visual." in name}


def test_a_run_that_goes_on_ends_with_the_same_bits(frozen_run: Path, tmp_path: Path) -> None:
    checkpoint = frozen_run / "run" / "checkpoints" / "global_step_2"
    changes = [f"--train.output_dir={tmp_path}", f"--train.load_checkpoint_path={checkpoint}", "--train.max_steps=4"]
    train_qwen_vl.main([f"{frozen_run}/run.yaml", "--train.freeze_vit", *changes])
    whole, resumed = weights_of(frozen_run / "run" / "hf_ckpt"), weights_of(tmp_path / "hf_ckpt")
    assert all(whole[name].equal(resumed[name]) for name in whole)
    losses = [[line["loss"] for line in read_metrics(folder)[-2:]] for folder in (frozen_run / "run", tmp_path)]
    assert losses[0] == losses[1]


def test_what_is_exported_loads_in_transformers_with_its_processor(frozen_run: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    exported = frozen_run / "run" / "hf_ckpt"
    model = AutoModelForImageTextToText.from_pretrained(exported)
    assert all(value.equal(model.state_dict()[name]) for name, value in weights_of(exported).items())
    processor = AutoProcessor.from_pretrained(exported)
    shown = {"type": "image", "image": Image.new("RGB", (64, 32))}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": "Which digit is this?"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 2
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_the_vision_encoder_has_a_learning_rate_of_its_own(frozen_run: Path, tmp_path: Path) -> None:
    changes = [f"--train.output_dir={tmp_path}", "--train.vit_lr=1.0e-3", "--train.max_steps=1", "--train.save_steps=0"]
    constant = ["--train.lr_decay_style=constant", "--train.lr_warmup_ratio=0"]
    train_qwen_vl.main([f"{frozen_run}/run.yaml", *changes, *constant])
    before, after = weights_of(frozen_run / "model"), weights_of(tmp_path / "hf_ckpt")
    # the first step of AdamW moves what has a gradient by the learning rate
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    seen = max(value for name, value in moved.items() if ".visual." in name)
    assert seen == pytest.approx(1e-3, rel=0.02)
    assert max(value for name, value in moved.items() if ".visual." not in name) == pytest.approx(1e-5, rel=0.02)


def test_a_replay_of_a_bad_step_has_its_loss_positions_included(frozen_run: Path, tmp_path: Path) -> None:
    changes = [f"--train.output_dir={tmp_path}", "--train.save_steps=0", "--train.max_steps=8", "--train.lr=1"]
    rule = ["--train.spike_sigma=1e-9", "--train.spike_window=4"]
    with pytest.raises(SystemExit, match="2"):
        train_qwen_vl.main([f"{frozen_run}/run.yaml", *changes, *rule])
    (boxes,) = read_boxes(tmp_path).values()
    made = replay_step(tmp_path)
    assert sum(made.losses.values()) == pytest.approx(boxes[0]["loss"], rel=1e-5)
    alone = sum(sample.loss * sample.targets for sample in made.samples)
    assert alone / sum(sample.targets for sample in made.samples) == pytest.approx(boxes[0]["loss"], rel=1e-5)


def test_videos_of_different_rates_are_answered_together_as_alone(tmp_path: Path, tokenizer: Any) -> None:
    save_tiny_model("qwen2_5_vl", tokenizer, tmp_path / "model")
    write_data(tmp_path, sounds=False)
    model, processor = load_exported(tmp_path / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    cfg = configured(tmp_path)
    _, data, _ = train_qwen_vl.read_data(cfg)
    template = data.sources[0].transform.keywords["template"]
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[1])
    row["images"] = [str(tmp_path / name) for name in row["images"]]
    row["videos"] = [[str(tmp_path / name) for name in clip] for clip in row["videos"]]
    prompts = [
        multimodal_prompt(row, template=template, **prompt_options(processor), fps=fps) for fps in (1.0, 1.0, 0.2)
    ]
    together = generate(model, processor, prompts, max_new_tokens=8)
    alone = [generate(model, processor, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone
    assert together[0] == together[1] != together[2]  # seconds between frames are a part of their positions


def test_what_does_not_belong_together_is_refused_in_one_sentence(tmp_path: Path, tokenizer: Any) -> None:
    save_tiny_model("qwen3_vl", tokenizer, tmp_path / "model")
    write_data(tmp_path, sounds=False)
    cfg = configured(tmp_path, "--train.freeze_audio_tower")
    processor, _, _ = train_qwen_vl.read_data(cfg)
    with pytest.raises(ConfigError, match=r"train.freeze_audio_tower.*Qwen3VLForConditionalGeneration has no such"):
        train_qwen_vl.build_model(cfg, processor, torch.device("cpu"))
    answers = ["--train.train_architecture=lora", "--train.eval_answers=5", "--train.eval_epochs=1"]
    adapted = configured(tmp_path, *answers, f"--data.eval_path={tmp_path}/train.jsonl")
    with pytest.raises(ConfigError, match=r"train.eval_answers: a model with adapters is exported at the end alone"):
        refuse_without_effect(adapted, VISION_LANGUAGE)
    tokenizer.save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match="holds no processor of pictures"):
        train_qwen_vl.read_data(configured(tmp_path, f"--model.tokenizer_path={tmp_path}/text"))
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace(f'"image_token_id": {processor.image_token_id}', '"image_token_id": 77'))
    with pytest.raises(ConfigError, match=r'image_token_id=77, but the processor has 5 for "<\|image_pad\|>"'):
        train_qwen_vl.read_data(configured(tmp_path))


def test_of_a_whole_omni_models_folder_the_thinker_is_taken(tmp_path: Path, tokenizer: Any) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig, Qwen3OmniMoeConfig

    folder = tmp_path / "model"
    save_tiny_model("qwen3_omni_moe_thinker", tokenizer, folder)
    thinker = weights_of(folder)
    whole = {**{f"thinker.{name}": value for name, value in thinker.items()}, "talker.weight": torch.zeros(3)}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    Qwen3OmniMoeConfig(thinker_config=AutoConfig.from_pretrained(folder).to_dict()).save_pretrained(folder)
    cfg = configured(tmp_path)
    processor = build_processor(folder)
    model = train_qwen_omni.build_model(cfg, processor, torch.device("cpu"))
    assert type(model).__name__ == "Qwen3OmniMoeThinkerForConditionalGeneration"
    assert model.model.audio_tower.conv2d1.bias.equal(thinker["audio_tower.conv2d1.bias"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_small_model_reads_digits(tmp_path: Path) -> None:
    environment = {**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, f"{CONFIGS}/qwen3_vl_digits.py"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "veomni_recipes.cli", "run", "train_qwen_vl", f"{CONFIGS}/qwen3_vl_digits.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "outputs" / "qwen3_vl_digits" / "summary.json").read_text())
    assert summary["all_accuracy"] > 0.95
    assert summary["single_picture_accuracy"] > 0.97
