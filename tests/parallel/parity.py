"""Tiny models, the step that they take on one process sample by sample, and the same step on many ranks."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from veomni_parallel import (
    ParallelPlan,
    build_parallelize_model,
    clip_grad_norm_,
    count_targets,
    global_sum,
    gradient_sync,
    init_parallel_state,
    loss_scale,
    tokens_per_expert,
    ulysses_attention,
)

LENGTHS = (13, 7, 20, 5, 9, 11, 17, 3)
"""85 tokens in all, so that no row of one data-parallel rank is divisible by two."""
VOCABULARY = 64
TOLERANCE = 1e-5
"""Of a loss, and of a gradient's largest value."""

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}
"""Keys of a decoder's config."""

Batch = dict[str, Any]
Gradients = dict[str, torch.Tensor]


class StrangerBlock(nn.Module):
    def __init__(self, width: int, heads: int, group: Any) -> None:
        super().__init__()
        self.heads, self.group = heads, group
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

        def attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        out = ulysses_attention(q, k, v, self.group, attn)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class StrangerOutput(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class Stranger(nn.Module):
    """A decoder of somebody who never heard of transformers; it is told the group that shares its rows."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(StrangerBlock(width, heads, None) for _ in range(layers))
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
        for index, block in enumerate(self.blocks):
            x = self.after_block(index, block(x, mask))
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum") / num_items_in_batch
        return StrangerOutput(loss, logits)

    def after_block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        return x


class Omni(nn.Module):
    """A tower merged into a transformers decoder: pictures replace the embeddings of token 1."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.projector = nn.Linear(8, 32)
        self.unused = nn.Linear(8, 8)
        self.foundation = build("qwen3")

    def get_decoder(self) -> nn.Module:
        return self.foundation.get_decoder()

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        embeds = self.foundation.get_input_embeddings()(input_ids)
        x = pixel_values
        for layer in self.tower:
            x = torch.tanh(layer(x))
        embeds = embeds.masked_scatter((input_ids == 1)[..., None], self.projector(x))
        return self.foundation(inputs_embeds=embeds, **kwargs)


def build(name: str, **changes: Any) -> nn.Module:
    """A tiny model in float32, the same on every process, with attention far from uniform."""
    import transformers

    torch.manual_seed(0)
    if name == "omni":
        return Omni()
    if name == "stranger":
        model: nn.Module = Stranger()
    else:
        config_class = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "mistral": "MistralConfig"}[name]
        keys = {
            **TINY,
            **({"sliding_window": 6} if name == "mistral" else {}),
            **({"tie_word_embeddings": True} if name == "qwen3" else {}),
            **changes,
        }
        config = getattr(transformers, config_class)(**keys)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def samples(pictures: bool = False) -> list[Batch]:
    """Samples of uneven length; the first third has no target; with pictures, token 1 stands where one belongs."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for length in LENGTHS:
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
        targets = torch.cat([ids[1:], torch.tensor([-100])])
        targets[: length // 3] = -100
        sample = {"input_ids": ids, "shift_labels": targets}
        if pictures:
            ids[0] = 1
            sample["pixel_values"] = torch.randn(1, 8, generator=generator)
        out.append(sample)
    return out


def pack(row: list[Batch]) -> Batch:
    """Samples joined into one row [1, T]."""
    lengths = [len(sample["input_ids"]) for sample in row]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    batch = {
        "input_ids": torch.cat([sample["input_ids"] for sample in row])[None],
        "shift_labels": torch.cat([sample["shift_labels"] for sample in row])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends.clone(),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    batch["labels"] = batch["shift_labels"]  # transformers computes a loss only where labels are given
    if "pixel_values" in row[0]:
        batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in row])
    return batch


def cut(batch: Batch, rank: int, ranks: int) -> Batch:
    """A rank's slice of a packed row, padded by a segment of its own; with pictures, only targets are sliced."""
    padding = -batch["input_ids"].shape[1] % ranks
    if padding:
        batch = dict(batch)
        for key, value in {"input_ids": 0, "position_ids": 0, "labels": -100, "shift_labels": -100}.items():
            batch[key] = F.pad(batch[key], (0, padding), value=value)
        for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
            batch[key] = torch.cat([batch[key], batch[key][-1:] + padding])
    keys = ["labels", "shift_labels"] + ([] if "pixel_values" in batch else ["input_ids", "position_ids"])
    return batch | {key: batch[key].chunk(ranks, dim=1)[rank] for key in keys}


@cache
def truth(name: str) -> tuple[float, Gradients]:
    """Loss and gradients of the step on one process, each sample alone."""
    return truth_of(build(name), samples(pictures=name == "omni"))


def truth_of(model: nn.Module, data: list[Batch]) -> tuple[float, Gradients]:
    """Loss and gradients of samples on one process, each alone through a plain model."""
    total, loss = sum(int((sample["shift_labels"] != -100).sum()) for sample in data), 0.0
    for sample in data:
        one = model(**pack([sample]), num_items_in_batch=total).loss
        one.backward()
        loss += one.item()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def gradients_of(model: nn.Module) -> Gradients:
    """All gradients whole, by the names of the unwrapped model."""
    whole = {}
    fsdp1 = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True) if fsdp1 else nullcontext():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                whole[name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")] = grad.detach().clone()
    return whole


def step(name: str, sizes: dict[str, int], options: dict[str, Any], accumulate_locally: bool = False) -> Batch:
    """The step of `truth` on the ranks of this process group."""
    return step_of(build(name), samples(pictures=name == "omni"), sizes, options, accumulate_locally)


def step_of(
    model: nn.Module,
    data: list[Batch],
    sizes: dict[str, int],
    options: dict[str, Any],
    accumulate_locally: bool = False,
) -> Batch:
    """The step of `truth_of` on the ranks of this process group, in two uneven micro-batches per data-parallel rank."""
    state = init_parallel_state(**sizes, device_type="cpu")
    for module in model.modules():
        if isinstance(module, StrangerBlock):
            module.group = state.sp.get_group()
    if isinstance(plan := options.get("plan"), dict):
        options = options | {"plan": ParallelPlan(**plan)}
    model = build_parallelize_model(model, state, **options)
    own = data[state.dp.get_local_rank() :: state.dp.size()]
    micro_batches = [pack(own[:1]), pack(own[1:])]
    total, loss = global_sum(count_targets(micro_batches), state.dp), torch.zeros(())
    for index, batch in enumerate(micro_batches):
        batch = cut(batch, state.sp.get_local_rank(), state.sp.size())
        with gradient_sync(model, not accumulate_locally or index == len(micro_batches) - 1):
            part = model(**batch, num_items_in_batch=total).loss
            (part * loss_scale(state)).backward()
        loss += part.detach()
    gradients = gradients_of(model)
    norm = clip_grad_norm_(model, 0.5, state)
    clipped = gradients_of(model)  # collective, so on all ranks
    return {
        "loss": float(global_sum(loss, state.loss)),
        "gradients": gradients if state.rank == 0 else {},
        "norm": norm,
        "clipped": clipped if state.rank == 0 else {},
        "wrapper": type(model).__name__,
        "counts": tokens_per_expert(model, state),
    }


def assert_true(expected: tuple[float, Gradients], results: list[dict[str, Any]]) -> None:
    """What `step_of` gave on all ranks is what `truth_of` gave."""
    loss, gradients = expected
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().item()
    got = results[0]
    assert got["loss"] == pytest.approx(loss, rel=TOLERANCE)
    difference, where = worst(got["gradients"], gradients)
    assert difference <= TOLERANCE, f"{where} is off by {difference:.1e}"
    assert got["norm"].item() == pytest.approx(norm, rel=1e-6)
    assert all(torch.equal(other["norm"], got["norm"]) for other in results), "the norm differs between ranks"
    factor = 0.5 / (norm + 1e-6)
    difference, where = worst(got["clipped"], {n: g * factor for n, g in gradients.items()})
    assert difference <= TOLERANCE, f"{where} was not clipped by {factor:.3f}"


def worst(gradients: Gradients, reference: Gradients) -> tuple[float, str]:
    """Largest difference relative to the tensor's own largest value, and the tensor's name."""
    assert set(reference) <= set(gradients), f"no gradient for {sorted(set(reference) - set(gradients))}"
    floor = 1e-3 * max(g.abs().max().item() for g in reference.values())  # below it a gradient is rounding noise
    return max(
        ((gradients[n] - g).abs().max().item() / max(g.abs().max().item(), floor), n) for n, g in reference.items()
    )
