"""The central claim: how samples are spread over ranks, rows and micro-batches does not change the training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from transformers import AutoModelForCausalLM, SiglipVisionModel
from veomni_config import OmniRecipeConfig, parse_args
from veomni_data import build_dataloader, build_dataset, encode_multimodal_sample, get_chat_template
from veomni_models import build_omni_model, build_omni_processor
from veomni_recipes.optimization import learning_rate
from veomni_recipes.run_folder import read_metrics
from veomni_recipes.tasks.omni import train_omni_model

STEPS = 10


@pytest.fixture(scope="module")
def true_losses(arguments: list[str]) -> list[float]:
    """Ten steps of one process: each sample alone, in float32, through the plain transformers parts."""
    cfg = parse_args(OmniRecipeConfig, [*arguments, "--train.output_dir=unused", f"--train.max_steps={STEPS}"])
    processor = build_omni_processor(cfg.model.tokenizer_path, encoders=cfg.model.encoders)
    template = get_chat_template("default", processor.tokenizer)
    dataset = build_dataset(
        cfg.data.train_path,
        transform=lambda row: encode_multimodal_sample(
            row, processor=processor, template=template, max_seq_len=cfg.data.max_seq_len
        ),
    )
    loader = build_dataloader(
        dataset,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=4,
        global_batch_size=4,
        max_seq_len=cfg.data.max_seq_len,
        seed=cfg.train.seed,
        collate=lambda samples: samples,
    )
    omni = build_omni_model(
        foundation=cfg.model.foundation,
        encoders=cfg.model.encoders,
        vocab_size=len(processor.tokenizer),
        image_token_id=processor.image_token_id,
        init_device="cpu",
        seed=cfg.train.seed,
    )
    tower = SiglipVisionModel(omni.config.encoders["image"]["config"])
    tower.load_state_dict(omni.encoders["image"].state_dict())
    text = AutoModelForCausalLM.from_config(copy.deepcopy(omni.config.text_config), attn_implementation="eager")
    text.load_state_dict(omni.foundation.state_dict())
    projector = omni.projectors["image"]
    parameters = [p for part in (tower, projector, text) for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=cfg.train.weight_decay)

    losses: list[float] = []
    for step, (samples,) in zip(range(1, STEPS + 1), loader, strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, cfg.train)
        targets = sum(int((sample["labels"][1:] != -100).sum()) for sample in samples)
        total = 0.0
        for sample in samples:
            embeds = text.get_input_embeddings()(sample["input_ids"])
            patches = tower(sample["pixel_values"]).last_hidden_state.unflatten(1, (4, 4))  # [n, height, width, C]
            corners = [patches[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
            features = projector(torch.cat(corners, dim=-1)).flatten(0, 2)
            pictures = (sample["input_ids"] == processor.image_token_id).nonzero().flatten()
            logits = text(inputs_embeds=embeds.index_copy(0, pictures, features)[None], use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[:-1], sample["labels"][1:], reduction="sum") / targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def train(arguments: list[str]) -> None:
    train_omni_model.main(arguments)


ONE_RANK = {
    "accumulation 4": [],
    "accumulation 1": ["--train.micro_batch_size=4"],
    "padded": ["--train.rmpad=false", "--train.micro_batch_size=2"],
    "padded, restarting at each sample by position ids": ["--train.rmpad=false", "--train.rmpad_with_pos_ids=true"],
    "checkpointing": ["--train.enable_gradient_checkpointing=true"],
}
TWO_RANKS = {
    "fsdp2": [],
    "fsdp2, zero 2": ["--train.enable_full_shard=false", "--train.micro_batch_size=2"],
    "ddp": ["--train.data_parallel_mode=ddp", "--train.init_device=cpu"],
    "fsdp1": ["--train.data_parallel_mode=fsdp1", "--train.init_device=cpu"],
    "ulysses": ["--train.ulysses_parallel_size=2"],
    "ulysses, one micro-batch, workers": [
        "--train.ulysses_parallel_size=2",
        "--train.micro_batch_size=4",
        "--data.num_workers=1",
    ],
}


@pytest.mark.parametrize("layout", ONE_RANK)
def test_one_rank_has_the_losses_of_each_sample_alone(
    layout: str, arguments: list[str], true_losses: list[float], tmp_path: Path
) -> None:
    train([*arguments, f"--train.output_dir={tmp_path}", f"--train.max_steps={STEPS}", *ONE_RANK[layout]])
    check(tmp_path, true_losses)


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_have_the_losses_of_each_sample_alone(
    layout: str, arguments: list[str], true_losses: list[float], tmp_path: Path, two_ranks: Ranks
) -> None:
    two_ranks.run(
        train, [*arguments, f"--train.output_dir={tmp_path}", f"--train.max_steps={STEPS}", *TWO_RANKS[layout]]
    )
    check(tmp_path, true_losses)


def check(folder: Path, true_losses: list[float]) -> None:
    losses = [line["loss"] for line in read_metrics(folder)]
    worst = max(abs(a - b) / b for a, b in zip(losses, true_losses, strict=True))
    assert worst <= 1e-5, (worst, losses, true_losses)
