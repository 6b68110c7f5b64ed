"""Models and layouts of the invariance matrix, and the step that each cell takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from veomni_parallel import build_parallelize_model, clip_grad_norm_, global_sum, init_parallel_state, loss_scale

from tests.parallel import families, multimodal, parity, pictures
from tests.parallel.parity import Batch, Gradients, gradients_of, worst

LAYOUTS: dict[str, tuple[int, dict[str, int], str]] = {
    "ddp 2": (2, {}, "ddp"),
    "ddp 4": (4, {}, "ddp"),
    "fsdp1 2": (2, {}, "fsdp1"),
    "fsdp1 4": (4, {}, "fsdp1"),
    "fsdp2 2": (2, {}, "fsdp2"),
    "fsdp2 4": (4, {}, "fsdp2"),
    "hsdp 2 x 2": (4, {"dp_replicate": 2}, "fsdp2"),
    "ulysses 2": (2, {"ulysses": 2}, "fsdp2"),
    "ulysses 4": (4, {"ulysses": 4}, "fsdp2"),
    "ddp, ulysses 2": (2, {"ulysses": 2}, "ddp"),
    "ddp, ulysses 4": (4, {"ulysses": 4}, "ddp"),
    "dp 2 x ulysses 2": (4, {"ulysses": 2}, "fsdp2"),
    "ep 2": (2, {"ep": 2}, "fsdp2"),
    "ep 4": (4, {"ep": 4}, "fsdp2"),
    "ep 2 x ep_fsdp 2": (4, {"ep": 2}, "fsdp2"),
    "ep 2 x ulysses 2": (4, {"ep": 2, "ulysses": 2}, "fsdp2"),
    "tp 2": (2, {"tp": 2}, "fsdp2"),
    "tp 2 x dp 2": (4, {"tp": 2}, "fsdp2"),
    "ep 2 x tp 2": (4, {"ep": 2, "tp": 2}, "fsdp2"),
}
MIXTURES = {
    "Llama4",
    "Qwen3-MoE",
    "Qwen3-Next",
    "Mixtral",
    "DeepSeek-V3",
    "GLM-4-MoE",
    "gpt-oss",
    "Qwen3-VL-MoE",
    "Qwen3-Omni thinker",
}


class Subject(NamedTuple):
    """A model with its samples, and how a row of them is made, cut and given a loss."""

    build: Callable[..., nn.Module]
    samples: Callable[[], list[Batch]]
    pack: Callable[[list[Batch]], Batch]
    cut: Callable[[Batch, int, int], Batch]
    loss: Callable[[nn.Module, Batch, int], torch.Tensor]


def _text(key: str) -> Subject:
    def build(**kwargs: Any) -> nn.Module:
        return families.build_family(key, **kwargs)

    return Subject(build, parity.samples, parity.pack, families.slice_row, families.loss_of)


def _multimodal(key: str) -> Subject:
    def build(**_: Any) -> nn.Module:
        return multimodal.build_multimodal(key)

    def samples() -> list[Batch]:
        # eight, so that four ranks have two each; the second rank's have neither pictures nor sounds
        without = multimodal.multimodal_samples(key, ("image",))
        return multimodal.multimodal_samples(key) + without[:2]

    def cut(row: Batch, rank: int, ranks: int) -> Batch:
        return row | {"shift_labels": row["shift_labels"].tensor_split(ranks, dim=1)[rank]}

    def loss(model: nn.Module, row: Batch, total: int) -> torch.Tensor:
        return multimodal.multimodal_loss(model, row, row["shift_labels"], total)

    return Subject(build, samples, multimodal.pack_multimodal, cut, loss)


def _picture(key: str) -> Subject:
    return Subject(
        partial(pictures.build, key), partial(pictures.samples, key), pictures.stack, pictures.whole, pictures.loss
    )


SUBJECTS: dict[str, Subject] = {
    "Llama": _text("llama"),
    "Llama4": _text("llama4"),
    "Qwen3": _text("qwen3"),
    "Qwen3-MoE": _text("qwen3_moe"),
    "Qwen3-Next": _text("qwen3_next"),
    "Mixtral": _text("mixtral"),
    "DeepSeek-V3": _text("deepseek_v3"),
    "GLM-4-MoE": _text("glm4_moe"),
    "gpt-oss": _text("gpt_oss"),
    "Mistral, window": _text("mistral"),
    "Phi-3": _text("phi3"),
    "Gemma3": _text("gemma3"),
    "Qwen2.5-VL": _multimodal("qwen2_5_vl"),
    "Qwen3-VL": _multimodal("qwen3_vl"),
    "Qwen3-VL-MoE": _multimodal("qwen3_vl_moe"),
    "Qwen2.5-Omni thinker": _multimodal("qwen2_5_omni"),
    "Qwen3-Omni thinker": _multimodal("qwen3_omni"),
    "Flux (diffusers)": _picture("flux"),
    "Wan (diffusers)": _picture("wan"),
    "Qwen-Image (diffusers)": _picture("qwen_image"),
}


def count(samples: list[Batch]) -> int:
    """Targets of all samples: tokens, or values of noise."""
    return sum(int((s["shift_labels"] != -100).sum()) if "shift_labels" in s else s["target"].numel() for s in samples)


@cache
def truth(name: str) -> tuple[float, Gradients]:
    """Loss and gradients of all samples, each alone through the untouched model with its eager attention."""
    subject = SUBJECTS[name]
    model, data, loss = subject.build(attn_implementation="eager"), subject.samples(), 0.0
    for sample in data:
        alone = {key: value for key, value in subject.pack([sample]).items() if not key.startswith(("cu_seq", "max_"))}
        one = subject.loss(model, alone, count(data))
        one.backward()
        loss += one.item()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def step(name: str, layout: str) -> dict[str, Any]:
    """The step of `truth` on the ranks of this process group: packed, in two uneven micro-batches, recomputed."""
    subject, (_, sizes, mode) = SUBJECTS[name], LAYOUTS[layout]
    state = init_parallel_state(**sizes, device_type="cpu")
    model = build_parallelize_model(subject.build(), state, mode=mode, activation_checkpointing="full")
    data, loss = subject.samples(), torch.zeros(())
    own = data[state.dp.get_local_rank() :: state.dp.size()]
    for samples in (own[:1], own[1:]):
        row = subject.cut(subject.pack(samples), state.sp.get_local_rank(), state.sp.size())
        part = subject.loss(model, row, count(data))
        (part * loss_scale(state)).backward()
        loss += part.detach()
    gradients = gradients_of(model)
    norm = clip_grad_norm_(model, 1e9, state)
    return {
        # a diffusers transformer hands its whole output to all ranks of a row
        "loss": float(global_sum(loss, state.dp if "diffusers" in name else state.loss)),
        "gradients": gradients if state.rank == 0 else {},
        "norm": norm.item(),
    }


def errors(name: str, result: dict[str, Any]) -> dict[str, float]:
    """Relative errors of the loss, of the worst gradient (of its tensor's largest value), and of the norm."""
    loss, gradients = truth(name)
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().item()
    return {
        "loss": abs(result["loss"] / loss - 1),
        "gradient": worst(result["gradients"], gradients)[0],
        "norm": abs(result["norm"] / norm - 1),
    }


def inapplicable(name: str, layout: str) -> str | None:
    """Why a layout has no meaning for a model; None if it has one."""
    _, sizes, _ = LAYOUTS[layout]
    if "ep" in sizes and name not in MIXTURES:
        return "no experts"
    if "tp" in sizes and name in ("gpt-oss", "Flux (diffusers)", "Wan (diffusers)"):
        return "no tensor parallel plan (Flux: one with blocks of two sizes)"
    return None
