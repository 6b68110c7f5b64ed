"""What a run of the recipe of diffusion transformers does beside learning: figures, bad steps, validations, a card."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import veomni_recipes
from huggingface_hub import ModelCard
from ranks import Ranks
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from veomni_models import add_adapters
from veomni_recipes.black_box import read_boxes
from veomni_recipes.cli import main as command
from veomni_recipes.diffusion import draw
from veomni_recipes.diffusion_data import UNCONDITIONAL, conditions_of, stack_samples, write_rows
from veomni_recipes.diffusion_flops import DiffusionFlops
from veomni_recipes.diffusion_pipeline import build_transformer
from veomni_recipes.diffusion_transformers import family_of
from veomni_recipes.meter import _without_weights
from veomni_recipes.replay import replay_step
from veomni_recipes.run_folder import VALIDATION, read_json, read_metrics
from veomni_recipes.smoke_dit import smoke_dit_config
from veomni_recipes.tasks.dit import train_dit

from tests.recipes.diffusion_parts import CONFIGS, samples

pytestmark = pytest.mark.timeout(300)
SHIPPED = Path(veomni_recipes.__file__).parent / "configs" / "dit"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
POISONED = 17


def pictures(count: int, seed: int) -> list[Tensor]:
    """Grey pictures of 8 x 8 pixels, of ten kinds."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.full((1, 8, 8), i % 10 / 5 - 1) + 0.1 * torch.randn(1, 8, 8, generator=generator) for i in range(count)
    ]


def write_folder(folder: Path, latents: list[Tensor] | None = None) -> Path:
    """A folder as `prepare_dit` writes it, of pictures or, without any, of ten prompts."""
    folder.mkdir()
    kept = [{"latents": each} for each in latents] if latents else [{"shape": torch.tensor([1, 8, 8])}] * 10
    write_rows(((NAMES[i % 10], {**each, "class_labels": torch.tensor(i % 10)}) for i, each in enumerate(kept)), folder)
    save_file({"class_labels": torch.tensor(10)}, folder / UNCONDITIONAL)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures to train on, the same with a number in one that is none, held-out ones, and prompts alone."""
    root = tmp_path_factory.mktemp("dit_loop")
    own = pictures(60, seed=0)
    write_folder(root / "whole", own)
    own[POISONED][0, 3, 5] = math.nan
    write_folder(root / "broken", own)
    write_folder(root / "held_out", pictures(9, seed=1))
    write_folder(root / "prompts")
    return root


def arguments(folder: Path, output: Path, data: str = "whole") -> list[str]:
    """The command line of a run of 6 steps of 8 pictures."""
    return [
        str(SHIPPED / "digits.yaml"),
        f"--data.train_path={folder / data}",
        "--data.eval_path=null",
        "--data.train_size=960",
        "--data.max_seq_len=64",
        f"--train.output_dir={output}",
        "--train.num_train_epochs=1",
        "--train.max_steps=6",
        "--train.num_inference_steps=2",
    ]


def train(given: list[str]) -> Any:
    """The exit code of a run."""
    try:
        train_dit.main(given)
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, validated after every other step, of which the best is exported."""
    output = tmp_path_factory.mktemp("alone") / "run"
    validated = [f"--data.eval_path={folder}/held_out", "--train.eval_steps=2", "--train.sample_steps=4"]
    best = ["--train.best_metric=loss", "--train.export_checkpoint=best", "--train.keep_last=1"]
    assert train([*arguments(folder, output), *validated, *best]) == 0
    return output


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks) -> Path:
    """The same run on two ranks, whose shards are gathered layer by layer."""
    output = tmp_path_factory.mktemp("two") / "run"
    more = ["--train.data_parallel_mode=fsdp2", f"--data.eval_path={folder}/held_out", "--train.eval_steps=2"]
    assert two_ranks.run(train, [*arguments(folder, output), *more], timeout=200) == [0, 0]
    return output


def test_the_figures_of_two_ranks_are_those_of_one(run: Path, on_two_ranks: Path) -> None:
    alone, together = read_metrics(run), read_metrics(on_two_ranks)
    assert [line["step"] for line in alone] == [line["step"] for line in together] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(alone, together, strict=True):
        assert (one["samples"], one["tokens"], one["targets"]) == (8, 8 * 16, 8 * 64)
        assert all(one[key] == two[key] for key in ("samples", "tokens", "targets", "lr", "epoch"))
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        work = [line["tflops_per_second"] * line["seconds"] * ranks for line, ranks in ((one, 1), (two, 2))]
        assert work[1] == pytest.approx(work[0])
        for line in (one, two):
            assert line["samples_per_second"] * line["seconds"] == pytest.approx(8)
            assert line["tokens_per_second"] * line["seconds"] == pytest.approx(8 * 16)
            assert 0.05 < line["peak_memory_gb"] < 20
            assert 0 <= line["data_wait_seconds"] < line["seconds"]
    assert read_json(run / "summary.json")["tokens"] == 6 * 8 * 16


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_that_torch_counts_over_the_whole_batch(name: str) -> None:
    config, model = CONFIGS[name], build_transformer(CONFIGS[name], seed=0)
    batch = stack_samples([{**each, "shape": each["latents"].shape, "input_ids": [0]} for each in samples(name)[:3]])
    time = torch.zeros(3, dtype=torch.int64)
    for adapted in (False, True)[: 1 + hasattr(model, "add_adapter")]:
        if adapted:
            add_adapters(model, {"target_modules": ["to_q", "to_v"]})
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
            out = family_of(config["_class_name"]).predict(
                model, config, batch["latents"], time, conditions_of(batch), 1.0
            )
            forward = counter.get_total_flops()
            out.sum().backward()
        meta = _without_weights(model)
        count = DiffusionFlops(config)
        assert count(meta, batch) == counter.get_total_flops()
        assert count(meta, batch, recompute=True) == counter.get_total_flops() + forward
        assert count(meta, {**batch, "latents": batch["latents"][:1]}) * 3 == counter.get_total_flops()
    assert (counter.get_total_flops() < 2.5 * forward) == adapted  # most then has no gradient


def place_of(number: int, folder: Path, data: str) -> str:
    """What a sample is called."""
    from veomni_data import build_dataset

    return str(build_dataset(str(folder / data)).sources[0].place(number))


def test_a_step_with_a_broken_latent_is_skipped_on_two_ranks_and_a_replay_names_the_sample(
    folder: Path, tmp_path: Path, two_ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    more = ["--train.bad_step=skip", "--train.data_parallel_mode=fsdp2"]
    assert two_ranks.run(train, [*arguments(folder, output, "broken"), *more], timeout=200) == [0, 0]
    lines = {line["step"]: line["loss"] for line in read_metrics(output)}
    ((step, boxes),) = read_boxes(output).items()
    assert [number for number, loss in lines.items() if math.isnan(loss)] == [step]
    assert len(lines) == 6
    assert [box["rank"] for box in boxes] == [0, 1]
    assert sum(b["samples"] for box in boxes for b in box["micro_batches"]) == 8
    made = replay_step(output)
    assert len(made.samples) == 8
    (bad,) = [each for each in made.samples if math.isnan(each.loss)]
    assert bad.place == place_of(POISONED, folder, "broken")
    assert bad.notes[0] in ('prompt "seven"', "without its prompt")
    assert made.found[0].startswith("1 NaN of ")
    assert made.found[0].endswith(" numbers in latents of the batch")
    assert "in the output of pos_embed.proj (Conv2d)" in made.found[1]
    assert made.weights.startswith("those of the step")
    assert command(["replay", str(output), "--step", str(step)]) == 0
    said = capsys.readouterr().out
    assert f"{bad.place} ({', '.join(bad.notes)})" in said


def test_a_step_with_a_broken_latent_stops_the_run_unless_it_may_be_skipped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert train(arguments(folder, output, "broken")) == 2
    (step,) = read_boxes(output)
    said = capsys.readouterr().err
    assert f"step {step} is not applied and the run ends: its loss is nan" in said
    assert f"`veomni replay {output} --step {step}` runs it again" in said


def spikes(given: list[str]) -> Any:
    """The exit code of a run that takes its first steps beyond the fourth for bad ones."""
    return train([*given, "--train.spike_sigma=1e-9", "--train.spike_window=4", "--train.lr=1"])


def assert_same_losses(output: Path) -> None:
    """What a replay on one device says of a step is what the run has seen."""
    (boxes,) = read_boxes(output).values()
    made = replay_step(output)
    assert not made.found
    assert sum(made.losses.values()) == pytest.approx(boxes[0]["loss"], rel=1e-5)
    alone = sum(each.loss * each.targets for each in made.samples) / sum(each.targets for each in made.samples)
    assert alone == pytest.approx(boxes[0]["loss"], rel=1e-5)


def test_the_losses_of_a_replay_are_those_of_the_step_by_its_weights_or_a_checkpoint(
    folder: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    output = tmp_path / "run"
    more = ["--train.data_parallel_mode=fsdp2", "--train.save_steps=1"]
    assert two_ranks.run(spikes, [*arguments(folder, output), *more], timeout=200) == [2, 2]
    assert_same_losses(output)
    (step,) = read_boxes(output)
    shutil.rmtree(output / "black_box" / f"step_{step}" / "weights")  # as where the ranks hung
    assert_same_losses(output)
    assert replay_step(output).weights == f"those of the checkpoint of step {step - 1}, 0 steps before this one began"


@pytest.mark.slow
def test_the_losses_of_a_replay_of_adapters_are_those_of_the_step(tmp_path: Path, two_ranks: Ranks) -> None:
    given = [str(smoke_dit_config([str(SHIPPED / "flux_lora.yaml")], 2, tmp_path)), "--train.max_steps=2"]
    given += ["--train.num_train_epochs=4"]
    more = ["--train.enable_mixed_precision=false", "--train.save_steps=1", "--data.eval_path=null"]
    assert two_ranks.run(spikes, [*given, *more], timeout=200) == [2, 2]
    assert_same_losses(tmp_path / "run")
    (step,) = read_boxes(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "black_box" / f"step_{step}" / "weights")
    assert_same_losses(tmp_path / "run")


def test_held_out_losses_are_those_of_each_sample_alone_on_any_number_of_ranks(
    run: Path, on_two_ranks: Path, folder: Path
) -> None:
    from diffusers import DiTTransformer2DModel
    from veomni_data import build_dataset
    from veomni_recipes.diffusion_data import read_sample

    alone, together = read_metrics(run, VALIDATION), read_metrics(on_two_ranks, VALIDATION)
    assert [line["step"] for line in alone] == [line["step"] for line in together] == [2, 4, 6]
    for one, two in zip(alone, together, strict=True):
        assert one["targets"] == two["targets"] == 9 * 64
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert alone[-1]["loss"] < alone[0]["loss"]

    model = DiTTransformer2DModel.from_pretrained(run / "hf_ckpt" / "transformer").eval()
    (best,) = [line for line in alone if line["step"] == read_json(run / "best.json")["step"]]
    for name, found in best["losses"].items():
        time, total = float(name.removeprefix("time ")), 0.0
        for sample in build_dataset(str(folder / "held_out"), transform=lambda row: read_sample(row, lambda _: 16)):
            noise = draw([sample["id"]], (1, 8, 8), seed=1, step=0).noise
            sigma = round(time * 1000) / 1000
            with torch.no_grad():
                out = model(
                    hidden_states=(1 - sigma) * sample["latents"] + sigma * noise,
                    timestep=torch.tensor([1000 * sigma]),
                    class_labels=sample["class_labels"][None],
                ).sample
            total += F.mse_loss(out, noise - sample["latents"]).item() / 9
        assert found == pytest.approx(total, rel=1e-5)
    assert best["loss"] == pytest.approx(sum(best["losses"].values()) / 4)


def test_the_best_is_kept_exported_and_told_in_a_card(run: Path) -> None:
    best = read_json(run / "best.json")
    assert best["loss"] == min(line["loss"] for line in read_metrics(run, VALIDATION))
    assert {f"global_step_{best['step']}"} <= {path.name for path in (run / "checkpoints").iterdir()}
    card = ModelCard.load(run / "hf_ckpt" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert card.data.tags == ["veomni", "class-conditional"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_type) == ("loss", "held_out")
    assert result.metric_value == pytest.approx(best["loss"], abs=1e-6)
    assert {"loss.png", "samples.png"} <= {path.name for path in (run / "hf_ckpt").iterdir()}
    best_line, ask = f"| best checkpoint | step {best['step']} (loss ", 'sample("path/to/this/folder", ["zero"])'
    drawn, about = "![Drawings of held-out prompts](samples.png)", "that draws pictures of classes"
    for said in (drawn, about, best_line, ask, "train_path: whole"):
        assert said in card.text
    assert str(run.parent) not in (run / "hf_ckpt" / "README.md").read_text()


def test_prompts_alone_are_drawn_but_not_validated_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*arguments(folder, tmp_path / "run"), f"--data.eval_path={folder}/prompts", "--train.eval_epochs=1"]
    assert train(given) == 2
    assert "holds prompts alone, which are drawn but cannot be validated on: let prepare_dit" in capsys.readouterr().err
    assert train([*arguments(folder, tmp_path / "run", "prompts"), "--train.eval_answers=3"]) == 2
    assert "a diffusion transformer draws and does not answer" in capsys.readouterr().err


def test_a_prompt_without_a_picture_is_nothing_to_learn_from(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(arguments(folder, tmp_path / "run", "prompts")) == 2
    assert "is a prompt without latents, which can be drawn but not learnt from" in capsys.readouterr().err
