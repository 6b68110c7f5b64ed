"""A whole run of `train_torch` with adapters on two ranks: what it trains, leaves, and goes on from."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from ranks import Ranks
from transformers import AutoModelForCausalLM
from veomni_recipes.run_folder import read_metrics

from tests.recipes.text_run import prepare, train

LORA = "--model.lora_config={r: 1, lora_alpha: 8, target_modules: [q_proj, down_proj]}"


def test_adapters_learn_go_on_and_merge_into_the_same_logits(tmp_path: Path, two_ranks: Ranks) -> None:
    arguments = prepare(tmp_path)
    arguments += ["--train.train_architecture=lora", LORA, "--train.save_hf_weights=true", "--train.save_steps=4"]
    two_ranks.run(train, arguments)
    run, cut = tmp_path / "run", tmp_path / "cut"
    whole = [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run)]
    assert len(whole) == 8
    assert whole[-1][1] < whole[0][1]

    # from the checkpoint in the middle: the very numbers, on adapters alone
    more = [f"--train.output_dir={cut}", f"--train.load_checkpoint_path={run}/checkpoints/global_step_4"]
    two_ranks.run(train, [*arguments, *more])
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(cut)] == whole[4:]

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    learns = sum(
        p.numel()
        for p in peft.PeftModel.from_pretrained(base, run / "adapter", is_trainable=True).parameters()
        if p.requires_grad
    )
    total = json.loads((run / "summary.json").read_text())["parameters"]
    assert 0 < learns < 0.02 * total
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run / "hf_ckpt")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=ids).logits
        expected, logits = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits - plain).abs().max() > 1e-2
