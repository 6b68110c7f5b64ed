"""Whole runs of the recipe of diffusion transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import veomni_recipes
from ranks import Ranks
from safetensors.torch import load_file
from veomni_data import DataError
from veomni_recipes.configs.dit import digits, digits_judge
from veomni_recipes.diffusion_sampling import sample
from veomni_recipes.run_folder import read_metrics
from veomni_recipes.smoke_dit import smoke_dit_config
from veomni_recipes.tasks.dit import prepare_dit, train_dit

pytestmark = pytest.mark.timeout(300)
CONFIGS = Path(veomni_recipes.__file__).parent / "configs" / "dit"
LAYOUTS = {
    "ddp": ["--train.data_parallel_mode=ddp"],
    "fsdp2": ["--train.data_parallel_mode=fsdp2"],
    "fsdp2, zero 2": ["--train.data_parallel_mode=fsdp2", "--train.enable_full_shard=false"],
}


def train(arguments: list[str]) -> None:
    train_dit.main(arguments)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command line of a short run on digits, but for its output folder."""
    folder = tmp_path_factory.mktemp("dit") / "digits"
    digits.main(folder)
    given = [str(CONFIGS / "digits.yaml")]
    given += [f"--data.raw_path={folder}/train.jsonl", f"--data.train_path={folder}/encoded", "--data.num_workers=0"]
    given += [f"--data.eval_raw_path={folder}/prompts.jsonl", f"--data.eval_path={folder}/prompts"]
    prepare_dit.main([*given, "--train.output_dir=unused"])
    return [*given, "--train.num_train_epochs=1", "--train.global_batch_size=4", "--train.max_steps=6"]


@pytest.fixture(scope="module")
def alone(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    more = ["--train.num_inference_steps=2", "--train.sample_steps=4", "--train.save_steps=3"]
    train([*arguments, f"--train.output_dir={folder}", *more])
    return folder


def test_a_run_leaves_all_that_it_promises(alone: Path) -> None:
    from diffusers import DiTPipeline, DiTTransformer2DModel
    from PIL import Image

    assert {"config.yaml", "metrics.jsonl", "loss.png", "samples.png", "predictions.jsonl", "summary.json"} <= {
        path.name for path in alone.iterdir()
    }
    lines = read_metrics(alone)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second"} <= lines[0].keys()
    assert lines[-1]["loss"] < lines[0]["loss"]
    drawn = [json.loads(line) for line in (alone / "predictions.jsonl").read_text().splitlines()]
    assert len(drawn) == 200
    assert Image.open(alone / drawn[7]["drawing"]).size == (8, 8)
    assert drawn[7]["prompt"] == "seven"
    assert [path.name for path in (alone / "samples").iterdir()] == ["step_000004.png"]
    model = DiTTransformer2DModel.from_pretrained(alone / "hf_ckpt" / "transformer")
    assert sum(p.numel() for p in model.parameters()) == json.loads((alone / "summary.json").read_text())["parameters"]
    assert DiTPipeline.from_pretrained(alone / "hf_ckpt", vae=None).labels["seven"] == 7
    (seven,), (one,) = sample(alone / "hf_ckpt", ["seven", "one"], num_inference_steps=2)
    assert seven.size == one.size == (8, 8)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if "zero" in name else ()) for name in LAYOUTS]
)
def test_two_ranks_train_as_one_does(
    layout: str, arguments: list[str], alone: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    more = ["--data.eval_path=null", "--train.save_hf_weights=false", *LAYOUTS[layout]]
    two_ranks.run(train, [*arguments, f"--train.output_dir={tmp_path}", *more], timeout=200)
    for line, expected in zip(read_metrics(tmp_path), read_metrics(alone), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_run_goes_on_bitwise(arguments: list[str], alone: Path, tmp_path: Path) -> None:
    checkpoint = alone / "checkpoints" / "global_step_3"
    train([*arguments, f"--train.output_dir={tmp_path}/run", f"--train.load_checkpoint_path={checkpoint}",
           "--data.eval_path=null"])  # fmt: skip
    keys = ("step", "loss", "grad_norm", "lr")
    assert [[line[key] for key in keys] for line in read_metrics(tmp_path / "run")] == [
        [line[key] for key in keys] for line in read_metrics(alone)[3:]
    ]
    weights = [load_file(folder / "hf_ckpt/transformer/diffusion_pytorch_model.safetensors") for folder in
               (tmp_path / "run", alone)]  # fmt: skip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def smoke(name: str, processes: int, folder: Path) -> list[str]:
    return [str(smoke_dit_config([str(CONFIGS / f"{name}.yaml")], processes, folder))]


def test_adapters_of_flux_are_trained_over_two_ranks_and_loaded_by_its_pipeline(
    tmp_path: Path, two_ranks: Ranks
) -> None:
    import diffusers

    two_ranks.run(train, smoke("flux_lora", 2, tmp_path), timeout=200)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["trained_parameters"] < summary["parameters"] / 2
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "pipeline")
    before = pipe.transformer.transformer_blocks[0].attn.to_q.weight.clone()
    pipe.load_lora_weights(tmp_path / "run" / "hf_ckpt")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.lora_B["default_0"].weight.abs().sum() > 0
    assert layer.scaling["default_0"] == 1.0  # lora_alpha / r
    assert (tmp_path / "run" / "samples" / "step_000002.png").is_file()


def test_wan_is_trained_on_videos_over_two_ranks_of_a_row_and_its_pipeline_loads_the_run(
    tmp_path: Path, two_ranks: Ranks
) -> None:
    import diffusers
    from PIL import Image

    two_ranks.run(train, smoke("wan_t2v", 2, tmp_path), timeout=200)
    run = tmp_path / "run"
    losses = [line["loss"] for line in read_metrics(run)]
    train([str(tmp_path / "run.yaml"), f"--train.output_dir={tmp_path}/alone", "--train.ulysses_parallel_size=1",
           "--data.eval_path=null", "--train.enable_mixed_precision=false"])  # fmt: skip
    assert losses == pytest.approx([line["loss"] for line in read_metrics(tmp_path / "alone")], rel=2e-2)
    pipe = diffusers.WanPipeline.from_pretrained(run / "hf_ckpt")
    weights = load_file(run / "hf_ckpt/transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(pipe.transformer.proj_out.weight, weights["proj_out.weight"])
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    (film,) = {json.loads(line)["drawing"] for line in (run / "predictions.jsonl").read_text().splitlines()[:1]}
    assert Image.open(run / film).n_frames == 5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"image": "x.png"}'], r"data.jsonl:1: there is no text .prompt.*the prompt of a picture"),
        (['{"prompt": "seven"}', '{"image": "no.png", "prompt": "one"}'], r"data.jsonl:2: .*no.png. does not exist"),
        (['{"prompt": "eleven"}'], r"data.jsonl:1: 'eleven' is none of the classes zero, one"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(lines: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    given = [str(CONFIGS / "digits.yaml"), f"--data.raw_path={tmp_path}/data.jsonl", "--data.eval_raw_path=null"]
    with pytest.raises(SystemExit):
        prepare_dit.main([*given, f"--data.train_path={tmp_path}/encoded"])
    with pytest.raises(DataError, match=message):
        prepare_dit.main.__wrapped__([*given, f"--data.train_path={tmp_path}/encoded"])  # type: ignore[attr-defined]
    assert not (tmp_path / "encoded").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_digits_are_drawn_as_asked(tmp_path: Path) -> None:
    digits.main(tmp_path / "data/digits_dit")
    env: dict[str, Any] = {**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    for recipe in ("prepare_dit", "train_dit"):
        command = [sys.executable, "-m", "veomni_recipes.cli", "run", recipe, str(CONFIGS / "digits.yaml")]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    judgement = digits_judge.main(tmp_path / "outputs/digits_dit", tmp_path / "data/digits_dit")
    assert judgement["classifier_accuracy"] >= 0.99
    assert judgement["recognised"] >= 0.98
    assert judgement["variety_drawn"] > 0.5 * judgement["variety_real"]
    assert judgement["nearest_drawn"] > 0.7 * judgement["nearest_real"]
