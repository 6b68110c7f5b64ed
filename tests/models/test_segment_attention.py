from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from veomni_models import build_foundation_model, register_segment_attention

LENGTHS = (13, 7, 20, 1, 8, 700)  # the last is long enough for the fused kernel
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
    "pad_token_id": 0,
}
MODELS = {
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 16},  # soft-capped scores
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},  # sinks; the plain model leaks
}


def packed_row() -> dict[str, object]:
    torch.manual_seed(1)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.randint(1, 128, (1, sum(LENGTHS))),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }


def sharpen(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3)  # attention far from uniform


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_gives_the_logits_of_its_samples_alone(name: str) -> None:
    model = build_foundation_model(
        None, overrides={"model_type": name, **SMALL, **MODELS[name]}, attn_implementation="segments", init_device="cpu"
    ).eval()
    sharpen(model)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    row = packed_row()
    logits = model(**row, use_cache=False).logits[0]
    samples = row["input_ids"][0].split(LENGTHS)
    alone = torch.cat([plain(input_ids=s[None], use_cache=False).logits[0] for s in samples])
    assert (logits - alone).abs().max() <= 2e-5 * alone.abs().max()


def test_segments_are_read_off_position_ids_where_cu_seq_lens_are_missing() -> None:
    model = build_foundation_model(None, overrides={"model_type": "qwen3", **SMALL}, init_device="cpu").eval()
    row = packed_row()
    whole = model(**row, use_cache=False).logits
    read_off = model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits
    assert torch.equal(whole, read_off)


def test_padded_rows_and_decoding_with_a_cache_agree_with_sdpa() -> None:
    register_segment_attention()
    config = AutoConfig.for_model("qwen3", **SMALL)
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="segments").eval()
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    plain.load_state_dict(ours.state_dict())
    ids = torch.randint(1, 128, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :2] = 0  # padded on the left
    args = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**args), plain.generate(**args))


def test_segments_that_do_not_end_with_the_row_are_refused() -> None:
    model = build_foundation_model(None, overrides={"model_type": "qwen3", **SMALL}, init_device="cpu")
    row = packed_row()
    row["cu_seq_lens_q"] = row["cu_seq_lens_q"][:-1]
    with pytest.raises(ValueError, match=r"must run from 0 to the row's 749 tokens"):
        model(**row, use_cache=False)
