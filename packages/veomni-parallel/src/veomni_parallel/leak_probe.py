"""Proof that packed samples do not see each other: change one, and look at what all others compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from veomni_parallel.errors import ParallelError
from veomni_parallel.packed_attention import sample_bounds
from veomni_parallel.packed_rows import find_cu_seq_lens, links_of
from veomni_parallel.tower_sharing import evaluated


@dataclass(frozen=True)
class Leak:
    """Something of one sample that moved when another one changed."""

    changed: int
    """Number of the sample that was changed, in the order of the row."""
    moved: int
    """Number of the sample that must not have noticed."""
    what: str
    """"logits" or "gradients"."""
    difference: float
    """The largest change, relative to the largest value in the row."""


@dataclass(frozen=True)
class LeakReport:
    """What `leak_probe` found."""

    samples: int
    leaks: tuple[Leak, ...]
    rounding: float
    """The largest relative change that is no more than rounding; 0.0: all others are the same bits."""

    @property
    def same_bits(self) -> bool:
        """Whether not a bit of any other sample moved."""
        return not self.leaks and self.rounding == 0.0

    def __str__(self) -> str:
        if self.leaks:
            worst = max(self.leaks, key=lambda leak: leak.difference)
            pairs = len({(leak.changed, leak.moved) for leak in self.leaks})
            return (
                f"LEAK: {pairs} of {self.samples * (self.samples - 1)} pairs of samples see each other; at most,"
                f" changing sample {worst.changed} moves the {worst.what} of sample {worst.moved} by"
                f" {worst.difference:.1e} of the largest"
            )
        kept = "the same bits" if self.same_bits else f"equal up to rounding ({self.rounding:.0e})"
        return f"no leak: whichever of {self.samples} samples changes, all others stay {kept}"


def leak_probe(model: nn.Module, batch: Mapping[str, Any], *, tolerance: float | None = None) -> LeakReport:
    """Change one packed sample after the other: no other sample's logits or gradients may move.

    Runs the model forward and backward once, and once more for each sample, in evaluation mode; parameters are left
    without gradients. The gradients compared are those of the input embeddings, which all that a token computes
    reaches. Models with experts group tokens differently when a sample changes, so that others may move by rounding;
    all other models keep the same bits. On many ranks every rank must call it, with its own batch, as in training.

    Args:
        model: any model with an embedding and an output with `logits` (else `loss`), wrapped or not.
        batch: its arguments: `input_ids` [1, T] of a packed row (or this rank's slice of it under Ulysses), and
            `cu_seq_lens_q` or `position_ids` that restart.
        tolerance: the relative change from which on it is a leak; None: 64 times the resolution of the logits' type.

    Raises:
        ParallelError: the row has less than two samples or no two tokens to exchange, the model has no embedding, or
            parameters have gradients (call `optimizer.zero_grad()` first).
    """
    cu_seq_lens, ids = find_cu_seq_lens(dict(batch)), batch.get("input_ids")
    if cu_seq_lens is None or ids is None or len(bounds := sample_bounds(cu_seq_lens)) < 3:
        raise ParallelError(
            "leak_probe needs input_ids of one packed row [1, T] with two or more samples, and cu_seq_lens_q or"
            " position_ids that tell where they begin."
        )
    if any(parameter.grad is not None for parameter in model.parameters()):
        raise ParallelError("leak_probe computes gradients of its own: call optimizer.zero_grad() first.")
    group, start = None, 0
    for link in links_of(model):
        if link.ranks > 1 and not link.plain:
            group = link.group
            start = link.own(bounds[-1]).start
    first = start if ids.shape[1] < bounds[-1] else 0  # multimodal models are handed the whole row
    successor = _successors(model, ids, group)

    samples = len(bounds) - 1
    rounds = _largest(samples, ids.device)
    with evaluated(model), _embedded(model) as embedded:
        before = _compute(model, batch, embedded, bounds)
        moved = torch.zeros(2, samples, samples, dtype=torch.float64, device=ids.device)  # [what, changed, moved]
        for number in range(rounds):  # ranks with fewer samples repeat their last, to stay in step
            changed = min(number, samples - 1)
            tokens = torch.arange(first, first + ids.shape[1], device=ids.device)
            inside = (tokens >= bounds[changed]) & (tokens < bounds[changed + 1])
            after = _compute(model, {**batch, "input_ids": torch.where(inside, successor, ids)}, embedded, bounds)
            for what, (old, new) in enumerate(zip(before, after, strict=True)):
                moved[what, changed] = _by_sample(old, new, bounds, start)
    if group is not None:
        dist.all_reduce(moved, op=dist.ReduceOp.MAX, group=group)
    if tolerance is None:
        tolerance = 64 * torch.finfo(before[0].dtype).eps
    moved *= 1 - torch.eye(samples, dtype=moved.dtype, device=moved.device)
    leaks = tuple(
        Leak(changed, other, ("logits", "gradients")[what], float(moved[what, changed, other]))
        for what, changed, other in (moved > tolerance).nonzero().tolist()
    )
    return LeakReport(samples, leaks, float(moved[moved <= tolerance].max()))


def _compute(
    model: nn.Module, batch: Mapping[str, Any], embedded: list[torch.Tensor], bounds: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """[S, V] logits (none where the model only tells its loss) and [S, H] gradients of the embeddings."""
    embedded.clear()
    output = model(**batch)
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    # every token's own square: its gradient depends on the token's own logits
    loss = logits.float().square().sum() if logits is not None else output.loss
    loss.backward()
    gradient = embedded[0].grad
    for parameter in model.parameters():
        parameter.grad = None
    if gradient is None:
        raise ParallelError("leak_probe found no gradient at the model's embedding, so it would prove nothing.")
    lengths = [b - a for a, b in pairwise(bounds)]
    if gradient.shape[:2] == (len(lengths), max(lengths)):  # the decoder was handed a padded batch
        gradient = torch.cat([row[:length] for row, length in zip(gradient, lengths, strict=True)])
    gradient = gradient.detach().flatten(0, -2)
    logits = gradient.new_zeros(len(gradient), 1) if logits is None else logits.detach().flatten(0, -2)
    return logits, gradient


def _by_sample(old: torch.Tensor, new: torch.Tensor, bounds: tuple[int, ...], start: int) -> torch.Tensor:
    """[n], the largest change within each sample, relative to the largest value of all."""
    if len(old) == bounds[-1]:
        start = 0  # the embedding of a multimodal model sees the whole row on every rank
    change = (old.double() - new.double()).abs().amax(dim=-1) / old.double().abs().max().clamp_min(1e-30)
    change = change.nan_to_num(nan=float("inf"))
    out = change.new_zeros(len(bounds) - 1)
    for number, (a, b) in enumerate(pairwise(bounds)):
        own = change[max(a - start, 0) : max(b - start, 0)]
        if len(own):
            out[number] = own.max()
    return out


def _successors(model: nn.Module, ids: torch.Tensor, group: Any) -> torch.Tensor:
    """[1, S], for each token another one of the row; placeholders of pictures and sounds, and special tokens, stay."""
    kept: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        for name, value in (vars(config) if config is not None and hasattr(config, "__dict__") else {}).items():
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
                kept.add(value)
    ordinary = sorted(set(ids.flatten().tolist()) - kept)
    if group is not None:  # all ranks of the row must replace alike
        rows: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(rows, ordinary, group=group)
        ordinary = sorted(set().union(*rows))
    if len(ordinary) < 2:
        raise ParallelError("leak_probe replaces tokens of a sample by others, but the row has no two different ones.")
    successor = ids.clone()
    for token, other in zip(ordinary, ordinary[1:] + ordinary[:1], strict=True):
        successor[ids == token] = other
    return successor


def _largest(number: int, device: torch.device) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


@contextmanager
def _embedded(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the model's token embedding gives, with its gradient kept."""
    found = next((m.get_input_embeddings() for m in model.modules() if hasattr(m, "get_input_embeddings")), None)
    if found is None:
        found = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if found is None:
        raise ParallelError(f"leak_probe needs a token embedding, but {type(model).__name__} has none.")
    embedded: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        output.retain_grad()
        embedded.append(output)

    handle = found.register_forward_hook(keep)
    try:
        yield embedded
    finally:
        handle.remove()
