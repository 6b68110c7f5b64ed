"""The load balancing loss of routers over all tokens of all ranks.

loss = E * sum_e f_e * p_e, where f_e is the share of tokens that chose expert e and p_e the mean probability of e
(Switch Transformer, https://arxiv.org/abs/2101.03961, equations 4 to 6). It is a product of two means, so the mean of
the losses of parts of a batch is another number: f must be that of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from veomni_parallel.errors import ParallelError
from veomni_parallel.loss_scale import global_sum
from veomni_parallel.mesh import ParallelState


def router_loss(
    router_logits: Sequence[torch.Tensor], top_k: int, state: ParallelState, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """This rank's part of the load balancing loss; the parts of the ranks of `state.loss` add up to it.

    Add coefficient * part to a loss that is (sum over own tokens) / (targets of the step), before `loss_scale`.

    Args:
        router_logits: one [T, E] per layer, of this rank's tokens.
        top_k: experts that a token chooses.
        state: from `init_parallel_state`; a collective over `state.loss`.
        mask: [T] (or of any shape with T elements), 0 where a token is padding.
    """
    return _parts(router_logits, top_k, state, mask, torch.zeros((), dtype=torch.float64))[0]


def use_global_router_loss(model: nn.Module, state: ParallelState) -> None:
    """Replace the router loss of a transformers model, which knows this rank's micro-batch only, by `router_loss`.

    Acts on each forward that returns `loss`, `aux_loss` and `router_logits` (labels and `output_router_logits=True`):
    `aux_loss` becomes this rank's part, and so does its share in `loss`. With `num_items_in_batch`, a micro-batch
    counts by its part of the step's targets, so that accumulation changes only which tokens form a batch for f_e.
    `build_parallelize_model` calls this.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    coefficient = getattr(model, "router_aux_loss_coef", getattr(text, "router_aux_loss_coef", None))
    top_k = next((k for n in ("num_experts_per_tok", "top_k_experts", "moe_k") if (k := getattr(text, n, None))), None)
    if coefficient is None:
        return
    title = type(model).__name__  # FSDP renames the class

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, MutableMapping):
            return output
        logits, own, loss = (output.get(name) for name in ("router_logits", "aux_loss", "loss"))
        if loss is None or not isinstance(own, torch.Tensor) or not logits:
            return output
        if top_k is None:
            raise ParallelError(f"{title} has a router loss, but its config has no num_experts_per_tok.")
        targets, items = _targets(kwargs).to(torch.float64), kwargs.get("num_items_in_batch")
        part, targets = _parts(logits, top_k, state, kwargs.get("attention_mask"), targets)
        part = part * (state.loss.size() if items is None else targets / items)
        part = part.to(loss.dtype)
        # the model's own term leaves with exactly the coefficient it came in with: its gradient is zero
        output["loss"], output["aux_loss"] = loss - coefficient * own.to(loss.device) + coefficient * part, part
        return output

    model.register_forward_hook(replace, with_kwargs=True)


def _parts(
    router_logits: Sequence[torch.Tensor],
    top_k: int,
    state: ParallelState,
    mask: torch.Tensor | None,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the loss, and `targets` summed over the ranks in the same exchange."""
    experts, device = router_logits[0].shape[-1], router_logits[0].device
    counts, rows = torch.zeros(experts, dtype=torch.float64, device=device), targets.new_zeros((), device=device)
    sums = torch.zeros(experts, dtype=torch.float32, device=device)
    weight = None if mask is None else mask.reshape(-1).to(device=device, dtype=torch.float32)
    for logits in router_logits:
        probabilities = torch.softmax(logits.to(device), dim=-1)
        chosen = probabilities.detach().topk(top_k, dim=-1).indices  # [T, K]
        each = torch.ones(len(logits), device=device) if weight is None else weight
        counts.scatter_add_(0, chosen.reshape(-1), each.double().repeat_interleave(top_k))
        sums = sums + (probabilities.float() * each[:, None]).sum(0)
        rows = rows + each.sum()
    total = global_sum(torch.cat([counts, rows[None], targets.to(device)[None]]), state.loss)
    counts, rows, targets = total[:-2], total[-2], total[-1]
    return experts * ((counts / rows).float() * sums / rows).sum().float(), targets


def _targets(kwargs: Mapping[str, Any]) -> torch.Tensor:
    if (shifted := kwargs.get("shift_labels")) is not None:
        return (shifted != -100).sum()
    return (kwargs["labels"][..., 1:] != -100).sum()
