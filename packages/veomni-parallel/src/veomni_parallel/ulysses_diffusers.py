"""Ulysses for transformers of diffusers, by the plans and the attention that diffusers itself has for it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from veomni_parallel.errors import ParallelError
from veomni_parallel.mesh import ParallelState


def is_diffusers_model(model: nn.Module) -> bool:
    """Whether `model` is a transformer of diffusers."""
    return hasattr(model, "_cp_plan") and hasattr(model, "set_attention_backend")


def apply_ulysses_diffusers(model: nn.Module, state: ParallelState) -> None:
    """Divide the tokens of a picture or video over `state.sp` inside a diffusers transformer.

    The model's own context-parallel plan says where tokens are cut and joined, and diffusers' attention swaps them for
    heads; `enable_parallelism` of diffusers would do the same, but for an accelerator only. Inputs and output are whole
    on every rank: ranks of `state.sp` are handed the same samples and compute the same loss, so it is reported as
    `global_sum(loss, state.dp)`; `loss_scale(state)` is as ever.

    Raises:
        ParallelError: the model has no plan, or not as many heads as could be divided.
    """
    plan, title = getattr(model, "_cp_plan", None), type(model).__name__
    if not plan:
        raise ParallelError(f"{title} has no context parallel plan in diffusers: use ulysses=1.")
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if isinstance(heads, int) and heads % state.sp.size():
        raise ParallelError(
            f"{heads} attention heads of {title} cannot be divided over ulysses={state.sp.size()} ranks."
        )
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    sizes = state.sizes
    mesh = init_device_mesh(
        state.device_type,
        (sizes.dp, 1, sizes.ulysses, sizes.tp),
        mesh_dim_names=("rows", "ring", "ulysses", "tp"),
    )
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=sizes.ulysses))
    config.setup(state.rank, sizes.world_size, state.device, mesh=mesh)
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    apply_context_parallel(model, config.context_parallel_config, plan)
