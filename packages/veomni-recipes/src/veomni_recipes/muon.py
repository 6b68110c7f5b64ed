"""Muon for matrices and AdamW for all else, on whole tensors and on shards alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

Groups = list[dict[str, Any]]


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) for matrices, fused AdamW for all else, as one optimizer.

    The update of a matrix is its momentum with all singular values brought near 1 by a Newton-Schulz iteration, which
    needs the whole matrix: those that are shards are dealt over the ranks that share them, so that each rank computes
    its part of the matrices, and come back as shards. The numbers are those of one process but for rounding.

    State of a matrix: `momentum_buffer`, of its shape, dtype and layout. All ranks must step together.
    """

    def __init__(
        self,
        matrices: Groups,
        others: Groups,
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Args are those of `torch.optim.Muon`, which takes whole 2-D parameters only, and these.

        Args:
            matrices: param groups of parameters [m, n], or [E, m, n], which are E matrices; with `weight_decay`.
            others: param groups of all other parameters; with `weight_decay`.
            lr: learning rate of groups without one.
            momentum: share of the old momentum that stays.
            nesterov: the gradient is added to its momentum once more.
            ns_steps: Newton-Schulz iterations.
            ns_coefficients: of the iteration's polynomial a x + b x^3 + c x^5.
            eps: least norm that a matrix is divided by.
            adjust_lr_fn: `original` scales updates by sqrt(max(1, m/n)); `match_rms_adamw` by 0.2 sqrt(max(m, n)), for
                which learning rates and weight decays of AdamW hold (https://arxiv.org/abs/2502.16982, section 2.2).
            ns_dtype: the iteration is computed in it.
        """
        self._adamw = torch.optim.AdamW(others or [{"params": []}], lr=lr, fused=True)
        self.ns_dtype = ns_dtype
        own = {
            "lr": lr,
            "weight_decay": 0.0,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__([own | group for group in matrices] + self._adamw.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both, on the gradients that there are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "momentum" in group:
                self._step_matrices(group)
        self._adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"]
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)

        def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
            return newton_schulz(matrices, group["ns_steps"], group["ns_coefficients"], group["eps"])

        for parameter, update in zip(parameters, map_matrices(orthogonalize, updates, self.ns_dtype), strict=True):
            m, n = parameter.shape[-2:]
            ratio = math.sqrt(max(1, m / n)) if group["adjust_lr_fn"] == "original" else 0.2 * math.sqrt(max(m, n))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * ratio)


def newton_schulz(matrices: torch.Tensor, steps: int, coefficients: Sequence[float], eps: float) -> torch.Tensor:
    """Matrices [B, m, n] with the same singular vectors and singular values near 1, computed in their dtype.

    X <- a X + b (X X^T) X + c (X X^T)^2 X, on X divided by its norm (https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = coefficients
    wide = matrices if matrices.size(-2) <= matrices.size(-1) else matrices.mT
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


def map_matrices(
    function: Callable[[torch.Tensor], torch.Tensor], tensors: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """`function` of each tensor's whole matrices, laid out as the tensor is.

    Tensors of one shape and layout go together, as many as the ranks that share them: one exchange brings each rank a
    whole matrix, another one brings its parts back to their ranks. So a rank holds little more than its share of all
    matrices, and computes no more.

    Args:
        function: maps [B, m, n] of `dtype` to the same.
        tensors: [m, n] or [E, m, n], plain or DTensor; alike on all ranks.
        dtype: what is exchanged and computed in.
    """
    alike: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        layout = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        alike.setdefault((tensor.shape, layout), []).append(index)
    results: list[torch.Tensor] = list(tensors)
    for (shape, layout), indices in alike.items():
        at_once = 1 if layout is None or len(shape) > 2 else layout[0].size()
        for start in range(0, len(indices), at_once):
            chosen = indices[start : start + at_once]
            for index, result in zip(chosen, _map_alike(function, [tensors[i] for i in chosen], dtype), strict=True):
                results[index] = result
    return results


def _map_alike(
    function: Callable[[torch.Tensor], torch.Tensor], tensors: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """`map_matrices` of tensors of one shape and layout."""
    first = tensors[0]
    parts = torch.stack([tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]).to(dtype)
    batch = parts.flatten(0, -3)  # [B, m, n], of which m or n may be divided
    if not isinstance(first, DTensor):
        return _like(function(batch), tensors, parts)
    # over mesh dimensions that experts are dealt out on, each rank's own are whole
    divided = [i for i, p in enumerate(first.placements) if first.ndim == 2 or not hasattr(p, "dim") or p.dim > 0]
    if not divided:
        return _like(function(batch), tensors, parts)
    mesh, whole = first.device_mesh, [Shard(0)] * len(divided)
    if len(divided) < mesh.ndim:
        mesh = mesh[tuple(mesh.mesh_dim_names[i] for i in divided)]
    placements = [_in_batch(first.placements[i], first.ndim) for i in divided]
    shape = torch.Size((batch.size(0), *first.shape[-2:]))
    stride = (shape[1] * shape[2], shape[2], 1)
    shards = DTensor.from_local(batch, mesh, placements, run_check=False, shape=shape, stride=stride)
    own = function(shards.redistribute(placements=whole).to_local()).contiguous()
    results = DTensor.from_local(own, mesh, whole, run_check=False, shape=shape, stride=stride)
    return _like(results.redistribute(placements=placements).to_local(), tensors, parts)


def _in_batch(placement: Placement, ndim: int) -> Placement:
    """The placement that [m, n] or [E, m, n] has, of the last two dimensions of [B, m, n]."""
    if isinstance(placement, _StridedShard):
        return _StridedShard(placement.dim + 3 - ndim, split_factor=placement.split_factor)
    return Shard(placement.dim + 3 - ndim) if isinstance(placement, Shard) else placement


def _like(batch: torch.Tensor, tensors: list[torch.Tensor], parts: torch.Tensor) -> list[torch.Tensor]:
    """What was computed of `parts` [K, (E,) m, n], as K tensors laid out as the given ones."""
    results = batch.view(parts.shape).unbind()
    return [
        DTensor.from_local(
            result, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        if isinstance(like, DTensor)
        else result
        for result, like in zip(results, tensors, strict=True)
    ]
