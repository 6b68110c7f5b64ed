"""Tiny models of many families, each with what makes its rows hard to take apart: sinks, windows, chunks, ..."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from tests.parallel.parity import TINY, Batch, Gradients, pack, samples

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"],
}

TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, one key head": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", MIXTURE),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "head_dim": None,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "attention_chunk_size": 5,
            "no_rope_layers": [1, 0],
            "interleave_moe_layer_step": 2,
            "floor_scale": 4,
            "attn_scale": 0.5,
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 6}),
    "gemma2": ("Gemma2Config", {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
    "cohere2": ("Cohere2Config", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "qwen3_next": ("Qwen3NextConfig", {**MIXTURE, **LINEAR, "shared_expert_intermediate_size": 16}),
    "qwen3_5": ("Qwen3_5TextConfig", LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**MIXTURE, **LINEAR, "shared_expert_intermediate_size": 16}),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
    ),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "mamba": ("MambaConfig", {"state_size": 4}),
}


@cache
def _config(name: str) -> Any:
    import transformers

    config_class, keys = TEXT[name]
    keys = {key: value for key, value in {**TINY, **keys}.items() if value is not None}
    return getattr(transformers, config_class)(**keys)


def build_family(name: str, **kwargs: Any) -> nn.Module:
    """A tiny model in float32, the same on every process, with attention, gates and routing far from uniform."""
    import copy

    import transformers

    torch.manual_seed(0)
    config = copy.deepcopy(_config(name))
    # a recurrence that is far from uniform has gradients below the rounding noise of its own reference
    sharpness = 2 if "linear_attention" in (getattr(config, "layer_types", None) or ()) else 4
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(sharpness)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # sinks, norms and biases too
    return model


@cache
def truth(name: str) -> tuple[float, Gradients]:
    """Loss and gradients of the samples, each alone through the untouched model (eager attention knows everything)."""
    model, data = build_family(name, attn_implementation="eager"), samples()
    total, loss = sum(int((sample["shift_labels"] != -100).sum()) for sample in data), 0.0
    for sample in data:
        logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits
        one = nn.functional.cross_entropy(logits[0], sample["shift_labels"], reduction="sum") / total
        one.backward()
        loss += one.item()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def whole_row() -> tuple[Batch, int]:
    """All samples in one packed row, and the number of its targets."""
    row = pack(samples())
    return row, int((row["shift_labels"] != -100).sum())


def loss_of(model: nn.Module, batch: Batch, total: int) -> torch.Tensor:
    """Sum over the targets of this rank's tokens, divided by all targets."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}
    logits = model(**inputs).logits
    return nn.functional.cross_entropy(logits[0], batch["shift_labels"][0], reduction="sum") / total


def slice_row(batch: Batch, rank: int, ranks: int) -> Batch:
    """A rank's tokens of a row of any length, as `torch.tensor_split` deals them."""
    keys = ("input_ids", "position_ids", "labels", "shift_labels")
    return batch | {key: batch[key].tensor_split(ranks, dim=-1)[rank] for key in keys}
