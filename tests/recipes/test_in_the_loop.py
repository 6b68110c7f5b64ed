"""What a run does beside learning: validations, the best checkpoint, traces, garbage, determinism, the model card."""

from __future__ import annotations

import gc
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from ranks import Ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from veomni_config import ConfigError, RecipeConfig, TrainConfig, parse_args
from veomni_recipes.determinism import make_deterministic
from veomni_recipes.memory import tidied_together
from veomni_recipes.report import read_run
from veomni_recipes.run_folder import VALIDATION, Metrics, read_metrics
from veomni_recipes.supported import TEXT, refuse_without_effect

from tests.recipes.text_run import prepare, texts, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def validated(folder: Path) -> list[str]:
    return [*prepare(folder), f"--data.eval_path={folder}/held_out.jsonl", "--train.eval_steps=3"]


@pytest.fixture(scope="module")
def run(folder: Path, validated: list[str]) -> Path:
    """A run of 8 steps, validated after the third and the sixth, of which the latter is exported."""
    best = ["--train.best_metric=loss", "--train.export_checkpoint=best", "--train.save_hf_weights=true"]
    traced = ["--train.enable_profiling=true", "--train.profile_start_step=3", "--train.profile_end_step=5"]
    train([*validated, *best, *traced, "--train.keep_last=1", "--train.save_steps=4", "--train.gc_steps=2"])
    return folder / "run"


def alone(model_folder: Path) -> tuple[float, int]:
    """The mean loss of the held-out texts, each alone, in float32 through the plain model; and their targets."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    total, targets = 0.0, 0
    for text in texts(40, seed=len("held_out")):
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids, num_items_in_batch=1).loss.item()
        targets += ids.numel() - 1
    return total / targets, targets


def test_the_held_out_loss_is_that_of_each_sample_alone_and_the_best_is_exported(run: Path) -> None:
    figures = read_metrics(run, VALIDATION)
    assert [line["step"] for line in figures] == [3, 6]
    assert figures[1]["loss"] < figures[0]["loss"]
    best = json.loads((run / "best.json").read_text())
    assert best == {"step": 6, "loss": figures[1]["loss"]}
    loss, targets = alone(run / "hf_ckpt")
    assert figures[1]["targets"] == targets
    assert figures[1]["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_best_checkpoint_outlives_newer_ones(run: Path) -> None:
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["global_step_6", "global_step_8"]


@pytest.mark.parametrize(
    "layout", [[], pytest.param(["--train.ulysses_parallel_size=2"], marks=pytest.mark.slow)], ids=str
)
def test_two_ranks_see_the_same_held_out_losses(
    layout: list[str], run: Path, validated: list[str], tmp_path: Path, two_ranks: Ranks
) -> None:
    two_ranks.run(train, [*validated, f"--train.output_dir={tmp_path}/run", *layout], timeout=200)
    ours, theirs = ([line["loss"] for line in read_metrics(path, VALIDATION)] for path in (tmp_path / "run", run))
    assert ours == pytest.approx(theirs, rel=1e-5)
    again, first = ([line["loss"] for line in read_metrics(path)] for path in (tmp_path / "run", run))
    assert again == pytest.approx(first, rel=1e-5)  # and training is not disturbed by them


def test_a_trace_has_the_steps_that_were_asked_for(run: Path) -> None:
    (file,) = (run / "trace").iterdir()
    assert file.name == "rank_0_steps_3_to_4.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert len([name for name in names if str(name).startswith("ProfilerStep#")]) == 2
    assert {"aten::mm", "autograd::engine::evaluate_function: MmBackward0"} & names


def test_the_card_has_valid_metadata_figures_and_pictures(run: Path) -> None:
    card = ModelCard.load(run / "hf_ckpt" / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["tags"]) == ("transformers", "text-generation", ["veomni"])
    assert "base_model" not in data  # a folder is no model of the hub
    assert card.data.model_name == "run"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_type) == ("loss", "held_out.jsonl")
    assert result.metric_value == pytest.approx(read_metrics(run, VALIDATION)[-1]["loss"], abs=1e-6)
    assert "![Loss over steps](loss.png)" in card.text
    assert (run / "hf_ckpt" / "loss.png").read_bytes() == (run / "loss.png").read_bytes()
    assert "| best checkpoint | step 6 (loss " in card.text
    assert "train_path: train.jsonl" in card.text
    assert str(run.parent) not in (run / "hf_ckpt" / "README.md").read_text()  # no paths of this machine


def test_the_report_shows_the_series_of_the_loop(run: Path) -> None:
    shown = read_run(run, "run")
    series = {"tflops_per_second", "peak_memory_gb", "data_wait_seconds", "samples_per_second", "validation: loss"}
    assert series <= shown.curves.keys()
    assert shown.curves["validation: loss"][0] == [3, 6]
    assert {"peak memory of a rank, GB", "waited for data", "validation loss (least)"} <= shown.figures.keys()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["--train.eval_steps=3"], "train.eval_steps.*set data.eval_path to held-out data"),
        (["--data.eval_path=x"], "data.eval_path.*set train.eval_epochs to 1"),
    ],
)
def test_a_validation_needs_data_and_data_a_validation(keys: list[str], said: str, tmp_path: Path) -> None:
    base = ["--model.config_path=c", "--data.train_path=d", f"--train.output_dir={tmp_path}"]
    with pytest.raises(ConfigError, match=said):
        refuse_without_effect(parse_args(RecipeConfig, [*base, *keys]), TEXT)


def test_garbage_is_collected_in_the_steps_that_are_named_and_by_itself_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collected: list[int] = []
    at = 0
    with tidied_together(TrainConfig(output_dir=Path("x"), gc_steps=3)) as tidy:
        assert not gc.isenabled()
        monkeypatch.setattr(gc, "collect", lambda: collected.append(at))
        for at in range(1, 8):
            tidy(at)
    assert collected == [3, 6]
    assert gc.isenabled()
    with tidied_together(TrainConfig(output_dir=Path("x"), gc_steps=0)) as tidy:
        assert gc.isenabled()
        tidy(1)


def test_full_determinism_refuses_what_has_no_deterministic_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
    make_deterministic(TrainConfig(output_dir=Path("x")))
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        make_deterministic(TrainConfig(output_dir=Path("x"), enable_full_determinism=True, seed=3))
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
            torch.zeros(2).put_(torch.tensor([0]), torch.tensor([2.0]))
    finally:
        torch.use_deterministic_algorithms(False)


def weights(arguments: list[str], folder: Path) -> dict[str, Any]:
    train([*arguments, f"--train.output_dir={folder}", "--train.save_hf_weights=true", "--train.max_steps=3"])
    return load_file(folder / "hf_ckpt" / "model.safetensors")


@pytest.mark.slow
def test_a_deterministic_run_repeats_bit_by_bit(folder: Path, validated: list[str], tmp_path: Path) -> None:
    try:
        first, second = (weights([*validated, "--train.enable_full_determinism=true"], tmp_path / n) for n in "ab")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_metrics_are_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    line = {"step": 1, "loss": math.nan, "losses": {"text": math.inf, "pictures": 2.0}, "mark": None}
    for step in (0, 1):  # the second run goes on behind the line
        Metrics(tmp_path, step).write({**line, "step": step + 1})
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert text[0] == '{"step": 1, "loss": null, "losses": {"text": null, "pictures": 2.0}, "mark": null}'
    assert text[1] == text[0].replace('"step": 1', '"step": 2')
    assert math.isnan(read_metrics(tmp_path)[1]["loss"])


@pytest.mark.gpu
def test_on_a_gpu_lines_come_a_step_later_and_memory_is_written_down(tmp_path: Path) -> None:
    traced = ["--train.enable_profiling=true", "--train.profile_start_step=3", "--train.profile_end_step=5"]
    train([*prepare(tmp_path), *traced, "--train.save_steps=4"])
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [*range(1, 9)]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert 0 < lines[-1]["peak_memory_gb"] < 1
    files = sorted(path.name for path in (tmp_path / "run" / "trace").iterdir())
    assert files == ["rank_0_steps_3_to_4.json.gz", "rank_0_steps_3_to_4.memory.pickle"]
