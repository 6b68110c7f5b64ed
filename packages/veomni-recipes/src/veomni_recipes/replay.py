"""A step of a run once more, on one device: the loss of each sample, and where the first number is not finite."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from veomni_ckpt import CheckpointError
from veomni_config import ConfigError
from veomni_data import DataError
from veomni_data import replay as replay_rows
from veomni_models import ModelError

from veomni_recipes.batch_counts import count_targets, count_tokens
from veomni_recipes.black_box import FOLDER, is_quantised, read_boxes, set_random_states
from veomni_recipes.distributed import to_device
from veomni_recipes.errors import TrainingError
from veomni_recipes.launch import USER_ERROR
from veomni_recipes.rerun import open_rerun


@dataclass
class ReplayedSample:
    """A sample of the step, run alone.

    Attributes:
        rank: that was given it.
        place: its file and line.
        tokens, targets: how many.
        notes: the names of its tensors of pictures, videos and sounds; of latents, prompt and time.
        loss: mean over its targets, nats.
    """

    rank: int
    place: str
    tokens: int
    targets: int
    notes: list[str]
    loss: float


@dataclass
class Replayed:
    """A step that was run again.

    Attributes:
        step: of the run.
        reason: why it was written down.
        weights: where those that it was run with are from.
        losses: of the packed rows, by rank: sums over targets divided by the step's number of targets.
        samples: each alone.
        found: what is not finite in the first micro-batch that has any: of its tensors and of the weights all, of the
            modules the first whose output is not, or else the first parameter whose gradient is not.
    """

    step: int
    reason: str
    weights: str
    losses: dict[int, float] = field(default_factory=dict)
    samples: list[ReplayedSample] = field(default_factory=list)
    found: list[str] = field(default_factory=list)


def replay_step(run: Path, step: int | None = None) -> Replayed:
    """Run a step again of which the run has left a black box, on this process's device.

    Args:
        run: its folder.
        step: which; None: the newest that is there.

    Raises:
        TrainingError: there is none, or no weights to run it with.
        DataError: the data are not there any more, or not those of the run.
    """
    boxes = read_boxes(run)
    if not boxes:
        raise TrainingError(f"{run} has no {FOLDER}: no step of it went wrong")
    step = step if step is not None else max(boxes)
    if step not in boxes:
        raise TrainingError(f"{run} has no {FOLDER} of step {step}: there is {', '.join(map(str, boxes))}")
    box, folder = boxes[step], run / FOLDER / f"step_{step}"
    device = torch.device(torch.accelerator.current_accelerator() or "cpu") if _accelerated() else torch.device("cpu")
    again = open_rerun(run, folder, step, box[0]["dp_rank"], device)
    model = again.model
    made = Replayed(step, box[0]["reason"], again.weights)
    targets = sum(b["targets"] for each in _one_of_each_row(box) for b in each["micro_batches"])
    for each in _one_of_each_row(box):
        rank = each["rank"]
        loss_of = partial(again.loss, arguments=each["arguments"])
        by_row: Any = list  # the samples as they are, in place of a batch
        rows: list[Any] = replay_rows(again.dataset, run, step, each["dp_rank"], collate=by_row)
        set_random_states(torch.load(folder / f"rank_{rank}.rng.pt", weights_only=True), device)
        made.losses[rank] = 0.0
        for samples in rows:
            batch = to_device(again.collate(samples), device)
            with first_nonfinite(model, batch) as found:
                loss = loss_of(batch, targets)
                loss.backward()
            made.losses[rank] += loss.item()
            made.found = made.found or found
        model.zero_grad()
        for samples, places in zip(rows, each["samples"], strict=True):
            for sample, place in zip(samples, places, strict=True):
                batch = again.collate([dict(sample)])
                own = count_targets([batch])
                with torch.no_grad():
                    loss = loss_of(to_device(batch, device), max(1, own))
                tokens, notes = count_tokens([batch]), again.notes(sample)
                made.samples.append(ReplayedSample(rank, place, tokens, own, notes, float(loss)))
    return made


def replay_run(run: Path, step: int | None) -> int:
    """Print what a replay finds: the command `veomni replay`; returns the exit code."""
    try:
        made = replay_step(run, step)
    except (TrainingError, ConfigError, DataError, ModelError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    for line in describe(made):
        print(line)
    return 0


def describe(made: Replayed) -> Iterator[str]:
    """Lines that say what a replay has found."""
    yield f"step {made.step}: {made.reason}"
    yield f"weights: {made.weights}"
    for rank, loss in made.losses.items():
        yield f"rank {rank}: its rows add {loss:.6g} to the loss of the step"
        yield f"  {'loss':>10}  {'targets':>7}  {'tokens':>7}  sample"
        for each in sorted((s for s in made.samples if s.rank == rank), key=_worst_first):
            notes = f" ({', '.join(each.notes)})" if each.notes else ""
            yield f"  {each.loss:>10.4g}  {each.targets:>7,}  {each.tokens:>7,}  {each.place}{notes}"
    yield "not finite, in the order of computing:" if made.found else "all is finite in this replay"
    yield from (f"  {each}" for each in made.found)


@contextmanager
def first_nonfinite(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[list[str]]:
    """Inside, what is not finite is noted in the list, see `Replayed.found`."""
    found: list[str] = []
    computed: list[str] = []
    for key, value in batch.items():
        _note(found, f"{key} of the batch", value)
    for name, parameter in model.named_parameters():
        if not is_quantised(parameter):  # whose numbers are integers
            _note(found, f"the weight {name}", parameter)

    def after(name: str, kind: str) -> Callable[..., None]:
        def look(_: nn.Module, inputs: Any, output: Any) -> None:
            if not computed:
                _note(computed, f"the output of {name or 'the model'} ({kind})", output)

        return look

    def gradient(name: str) -> Callable[[Tensor], None]:
        return lambda parameter: None if computed else _note(computed, f"the gradient of {name}", parameter.grad)

    handles: list[Any] = [m.register_forward_hook(after(n, type(m).__name__)) for n, m in model.named_modules()]
    handles += [
        p.register_post_accumulate_grad_hook(gradient(n)) for n, p in model.named_parameters() if p.requires_grad
    ]
    try:
        yield found
    finally:
        found += computed
        for handle in handles:
            handle.remove()


def _note(found: list[str], where: str, values: Any) -> None:
    for tensor in tree_leaves(values):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            continue
        nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        counts = " and ".join(f"{n:,} {what}" for n, what in ((nans, "NaN"), (infinities, "infinite")) if n)
        found.append(f"{counts} of {tensor.numel():,} numbers in {where}")
        return


def _one_of_each_row(box: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One rank of those that share their rows."""
    return [*{each["dp_rank"]: each for each in reversed(box)}.values()][::-1]


def _accelerated() -> bool:
    return torch.accelerator.is_available()


def _worst_first(sample: ReplayedSample) -> tuple[bool, float]:
    finite = bool(torch.tensor(sample.loss).isfinite())
    return finite, -sample.loss if finite else 0.0
