"""Tiny models with experts or divided matrices, and the step that they take on one process and on many ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from veomni_parallel import (
    ParallelPlan,
    build_parallelize_model,
    clip_grad_norm_,
    count_targets,
    global_sum,
    init_parallel_state,
    loss_scale,
    tokens_per_expert,
)

from tests.parallel.parity import VOCABULARY, Batch, Gradients, StrangerBlock, StrangerOutput, cut, gradients_of, pack
from tests.parallel.parity import samples as parity_samples

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "use_cache": False,
    "pad_token_id": 0,
}
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


class StrangerMixture(nn.Module):
    """A decoder with hand-written blocks, a router and experts that keep the protocol."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2, experts: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(StrangerBlock(width, heads, None) for _ in range(layers))
        self.routers = nn.ModuleList(nn.Linear(width, experts) for _ in range(layers))
        self.mixtures = nn.ModuleList(StrangerExperts(experts, width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        shift_labels: torch.Tensor,
        cu_seq_lens_q: torch.Tensor,
        num_items_in_batch: int,
        **_: Any,
    ) -> Any:
        whole = int(cu_seq_lens_q[-1])
        of = torch.searchsorted(cu_seq_lens_q[1:].long(), torch.arange(whole), right=True)
        mask = (of[:, None] == of[None]).tril()
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block, router, experts in zip(self.blocks, self.routers, self.mixtures, strict=True):
            x = block(x, mask)
            weights, index = router(x[0]).softmax(-1).topk(2, dim=-1)
            x = x + experts(x[0], index, weights)[None]
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum") / num_items_in_batch
        return StrangerOutput(loss, logits)


def build(name: str, **changes: Any) -> nn.Module:
    """A tiny model in float32, the same on every process, with attention and routing far from uniform."""
    torch.manual_seed(0)
    if name == "stranger":
        return StrangerMixture()
    import transformers

    config_class, extra = MODELS[name]
    keys = SMALL | extra | changes
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
    model, data = build(name), samples()
    total, loss = sum(int((sample["shift_labels"] != -100).sum()) for sample in data), 0.0
    for sample in data:
        one = model(**pack([sample]), num_items_in_batch=total).loss
        one.backward()
        loss += one.item()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def step(name: str, sizes: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    """The step of `truth` on the ranks of this process group, in two uneven micro-batches per data-parallel rank."""
    state = init_parallel_state(**sizes, device_type="cpu")
    model = build(name)
    if name == "stranger":
        for block in model.blocks:
            block.group = state.sp.get_group()
    if isinstance(plan := options.get("plan"), dict):
        options = options | {"plan": ParallelPlan(**plan)}
    model = build_parallelize_model(model, state, **options)
    own = samples()[state.dp.get_local_rank() :: state.dp.size()]
    micro_batches = [pack(own[:1]), pack(own[1:])]
    total, loss = global_sum(count_targets(micro_batches), state.dp), torch.zeros(())
    for batch in micro_batches:
        batch = cut(batch, state.sp.get_local_rank(), state.sp.size())
        part = model(**batch, num_items_in_batch=total).loss
        (part * loss_scale(state)).backward()
        loss += part.detach()
    gradients = gradients_of(model)
    norm = clip_grad_norm_(model, 0.5, state)
    clipped = gradients_of(model)  # collective, so on all ranks
    counts = tokens_per_expert(model, state)
    return {
        "loss": float(global_sum(loss, state.loss)),
        "gradients": gradients if state.rank == 0 else {},
        "norm": norm,
        "clipped": clipped if state.rank == 0 else {},
        "counts": counts,
    }


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
