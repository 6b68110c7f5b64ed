"""Tiny models with experts or divided matrices, and the step that they take on one process and on many ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from tests.parallel.parity import TINY, Batch, Gradients, Stranger, pack, step_of, truth_of
from tests.parallel.parity import samples as parity_samples

MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
FOUR_OF_TWO = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2, biases, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "phi3": ("Phi3Config", {}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 6, "num_key_value_heads": 2}),
    "deepseek_v2": ("DeepseekV2Config", MLA),
    "apertus": ("ApertusConfig", {}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", FOUR_OF_TWO),
    "deepseek_v3": ("DeepseekV3Config", MLA),
    "glm4_moe": (
        "Glm4MoeConfig",
        {"n_routed_experts": 4, **{k: MLA[k] for k in MLA if "lora" not in k and "qk" not in k}},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
HEADLESS = {"deepseek_v2", "deepseek_v3", "glm4_moe"}
"""Configs whose head size is given otherwise."""


class StrangerExperts(nn.Module):
    """Experts of somebody who never heard of transformers, computed one after the other by a method of its own."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) * width**-0.5)
        self.shift = nn.Parameter(torch.randn(experts, width))

    def one(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return torch.tanh(x @ self.up[expert]) @ self.down[expert] + self.shift[expert]

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, slot = torch.where(index == expert)
            out = out.index_add(0, token, self.one(hidden[token], expert) * weights[token, slot, None])
        return out


class StrangerMixture(Stranger):
    """The decoder with hand-written blocks, and a router and experts that keep the protocol behind each."""

    def __init__(self, width: int = 32, layers: int = 2, experts: int = 4) -> None:
        super().__init__(width, layers=layers)
        self.routers = nn.ModuleList(nn.Linear(width, experts) for _ in range(layers))
        self.mixtures = nn.ModuleList(StrangerExperts(experts, width) for _ in range(layers))

    def after_block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.routers[index](x[0]).softmax(-1).topk(2, dim=-1)
        return x + self.mixtures[index](x[0], chosen, weights)[None]


def build(name: str, **changes: Any) -> nn.Module:
    """A tiny model in float32, the same on every process, with attention and routing far from uniform."""
    torch.manual_seed(0)
    if name == "stranger":
        return StrangerMixture()
    import transformers

    config_class, extra = MODELS[name]
    keys = TINY | extra | changes
    if name in HEADLESS:
        keys.pop("head_dim")
    config = getattr(transformers, config_class)(**keys)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:  # biases start at zero, where mistakes do not show
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def samples() -> list[Batch]:
    """The samples of `parity`, with a padding id among their tokens."""
    data = parity_samples()
    data[0]["input_ids"][2] = 0
    return data


@cache
def truth(name: str) -> tuple[float, Gradients]:
    """Loss and gradients of the step on one process, each sample alone through the untouched model."""
    return truth_of(build(name), samples())


def step(name: str, sizes: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    """The step of `truth` on the ranks of this process group."""
    return step_of(build(name), samples(), sizes, options)


@cache
def expert_counts(name: str) -> dict[str, list[int]]:
    """Tokens that each expert is given by the plain model, all samples."""
    model, counts = build(name), {}

    def count(name: str, index: torch.Tensor) -> None:
        counts[name] = counts.get(name, 0) + torch.bincount(index.reshape(-1), minlength=4)

    for path, module in model.named_modules():
        if path.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda m, args, path=path: count(path, args[1]))
    with torch.no_grad():
        for sample in samples():
            model(**pack([sample]))
    return {path: total.tolist() for path, total in counts.items()}
