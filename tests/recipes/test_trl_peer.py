"""The peer: TRL's trainers on the very batches of our recipes give the same losses, step by step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from veomni_config import DPORecipeConfig, RecipeConfig, parse_args
from veomni_data import build_dataloader
from veomni_recipes.run_folder import read_metrics
from veomni_recipes.smoke import tiny_tokenizer
from veomni_recipes.smoke_data import texts, write_conversations, write_preferences
from veomni_recipes.tasks import train_dpo, train_torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer(texts(), 500)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=12, vocab_size=len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(model: Path, data: Path, output: Path, steps: int, *more: str) -> list[str]:
    return [
        f"--model.model_path={model}",
        f"--data.train_path={data}",
        "--data.max_seq_len=384",
        "--data.num_workers=0",
        f"--train.output_dir={output}",
        f"--train.max_steps={steps}",
        "--train.enable_mixed_precision=false",
        "--train.init_device=cpu",
        "--train.lr=1e-3",
        "--train.lr_decay_style=constant",
        "--train.weight_decay=0",
        "--train.save_hf_weights=false",
        "--train.save_epochs=0",
        *more,
    ]


def steps_of(cfg: RecipeConfig, dataset: Any, steps: int) -> list[list[list[dict[str, Any]]]]:
    """The samples of each micro-batch of each step of a run on one rank."""
    loader = build_dataloader(
        dataset,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=cfg.train.micro_batch_size,
        global_batch_size=cfg.train.global_batch_size or 1,
        max_seq_len=cfg.data.max_seq_len,
        packing=cfg.train.dyn_bsz,
        buffer_size=cfg.train.dyn_bsz_buffer_size,
        seed=cfg.train.seed,
        collate=lambda samples: samples,
    )
    return [micro_batches for _, micro_batches in zip(range(steps), loader, strict=False)]


def options(folder: Path, steps: int) -> dict[str, Any]:
    """Of a trainer that takes its rows in their order."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }


def test_train_torch_has_the_loss_curve_of_sft_trainer(model_folder: Path, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data, steps = tmp_path / "data.jsonl", 50
    write_conversations(data, None)
    argv = arguments(model_folder, data, tmp_path / "run", steps, "--train.global_batch_size=2")
    train_torch.main(argv)
    ours = [line["loss"] for line in read_metrics(tmp_path / "run")]

    cfg = parse_args(RecipeConfig, argv)
    made = steps_of(cfg, train_torch.read_data(cfg)[1], steps)
    rows = [
        {
            "input_ids": torch.cat([sample["input_ids"] for sample in row]).tolist(),
            "labels": torch.cat([sample["labels"] for sample in row]).tolist(),
            "seq_lengths": [len(sample["input_ids"]) for sample in row],
        }
        for micro_batches in made
        for row in micro_batches
    ]
    losses: list[float] = []

    class InOrder(trl.SFTTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            losses.append((result[0] if isinstance(result, tuple) else result).item())
            return result

    trainer = InOrder(
        AutoModelForCausalLM.from_pretrained(model_folder),
        trl.SFTConfig(
            **options(tmp_path / "trl", steps),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            padding_free=True,
            max_length=None,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    trainer.train()
    theirs = [a + b for a, b in zip(losses[0::2], losses[1::2], strict=True)]
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"SFTTrainer: largest difference of {steps} losses {worst:.1e}, from {ours[0]:.4f} to {ours[-1]:.4f}")
    assert len(ours) == steps
    assert ours[-1] < ours[0] - 0.5
    assert worst <= 1e-4, (ours, theirs)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_train_dpo_has_the_losses_of_dpo_trainer(kind: str, model_folder: Path, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data, steps = tmp_path / "data.jsonl", 15
    write_preferences(data, None)
    more = ["--train.micro_batch_size=3", "--train.global_batch_size=3", "--train.dyn_bsz=false"]
    argv = arguments(model_folder, data, tmp_path / "run", steps, f"--train.dpo_loss={kind}", *more)
    train_dpo.main(argv)
    metrics = read_metrics(tmp_path / "run")

    cfg = parse_args(DPORecipeConfig, argv)
    made = steps_of(cfg, train_torch.read_data(cfg)[1], steps)
    rows = [as_trl(sample) for micro_batches in made for batch in micro_batches for sample in batch]
    losses: list[float] = []

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            losses.append((result[0] if isinstance(result, tuple) else result).item())
            return result

    trainer = InOrder(
        AutoModelForCausalLM.from_pretrained(model_folder),
        None,
        trl.DPOConfig(
            **options(tmp_path / "trl", steps),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=1,
            loss_type=kind,
            beta=0.1,
            remove_unused_columns=False,
            max_length=None,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    trainer.train()
    ours = [line["loss"] for line in metrics]
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, losses, strict=True))
    print(f"DPOTrainer ({kind}): largest relative difference of {steps} losses {worst:.1e}, to {ours[-1]:.4f}")
    assert ours[-1] < ours[0]
    assert worst <= 1e-4, (ours, losses)


def as_trl(sample: dict[str, Any]) -> dict[str, list[int]]:
    """A pair without what stands behind its answers, which no target sees."""
    pair = {}
    parts = zip(sample["input_ids"].split(sample["seq_lens"]), sample["labels"].split(sample["seq_lens"]), strict=True)
    for name, (ids, labels) in zip(("chosen_ids", "rejected_ids"), parts, strict=True):
        learnt = (labels != -100).nonzero().flatten()
        first, last = int(learnt[0]), int(learnt[-1])
        assert len(learnt) == last - first + 1
        pair |= {"prompt_ids": ids[:first].tolist(), name: ids[first : last + 1].tolist()}
    return pair
