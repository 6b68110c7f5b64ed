"""`veomni check CONFIG`: one step of a recipe on CPU ranks against one process that runs each sample alone.

The truth is the model as transformers has it, unwrapped, in float32, with eager attention, on one sample after the
other, or with a loss of the routers, which is of all tokens together, on all of them in one padded batch. Compared with
it are the loss and every gradient of the same samples packed, on the configuration's layout.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.utils.logging import disable_progress_bar
from veomni_ckpt import CheckpointError
from veomni_config import ConfigError, RecipeConfig, parse_args
from veomni_data import DataError, PackingCollator, PaddingCollator, Sample, slice_for_sequence_parallel
from veomni_models import ModelError, has_adapters, initialize_adapters, plan_for, use_fused_loss
from veomni_parallel import (
    LeakReport,
    ParallelError,
    ParallelPlan,
    build_parallelize_model,
    count_targets,
    global_sum,
    leak_probe,
    loss_scale,
)

from veomni_recipes.distributed import init_distributed, rank, world_size
from veomni_recipes.launch import ends_with_one_sentence
from veomni_recipes.layout import parallel_state, wrapping
from veomni_recipes.optimization import plain_name

TOLERANCE = 1e-4  # of a gradient, relative to its largest value; rounding of float32 gives some 1e-6
_SAMPLES, _SEED = 6, 20_000_003
_SHOWN = 40

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One step: its loss and every gradient whole.

    Attributes:
        terms: the loss of each of its terms, and the parts of the model that this term's gradient reaches.
    """

    loss: float
    gradients: Gradients
    terms: Mapping[str, tuple[float, list[str]]]


@ends_with_one_sentence(ConfigError, DataError, ModelError, ParallelError, CheckpointError)
def main(argv: Sequence[str] | None = None) -> None:
    """Check the recipe of the module or script that the first argument names, with the configuration that follows."""
    name, *arguments = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(name)
    cfg: RecipeConfig = parse_args(recipe.Config, arguments)
    disable_progress_bar()
    assets, data, *_ = recipe.read_data(cfg)
    device = init_distributed()
    samples = some_samples(data)
    tokenizer = getattr(assets, "tokenizer", assets)
    pad = tokenizer.pad_token_id or 0

    plan = cfg.batch_plan(world_size(), len(samples))
    state = parallel_state(cfg.train, plan, device)
    model = _built(recipe, cfg, assets, device)
    if cfg.train.enable_fused_loss and state.tp.size() == 1 and not hasattr(model, "foundation"):
        use_fused_loss(model)
    units = ParallelPlan(shard_units=plan_for(model)["shard_units"] or None)
    model = build_parallelize_model(model, state, plan=units, **wrapping(cfg.train))
    own = samples[state.dp.get_local_rank() :: state.dp.size()]
    collate = PackingCollator if cfg.train.rmpad or cfg.train.rmpad_with_pos_ids else PaddingCollator
    row = dict(collate(pad)(own))
    targets = global_sum(count_targets([row]), state.dp)
    part = slice_for_sequence_parallel(row, state.sp.get_local_rank(), state.sp.size(), pad_token_id=pad)
    out = model(**part, num_items_in_batch=targets, use_cache=False, **_noise(model))
    (out.loss * loss_scale(state)).backward()
    loss = float(global_sum(out.loss.detach(), state.loss))
    spread = Step(loss, whole_gradients(model), {})
    model.zero_grad()
    leaks = leak_probe(model, _without_targets(part)) if collate is PackingCollator and len(own) > 1 else None

    good = torch.zeros((), dtype=torch.bool)
    if rank() == 0:
        plain = _built(recipe, _untouched(cfg), assets, device)
        truth = alone(plain, samples, PaddingCollator(pad), int(targets))
        good |= report(Console(width=110), state.describe(), samples, spread, truth, leaks, plain)
    if world_size() > 1:
        dist.broadcast(good, src=0)
    if not good:
        raise ParallelError("the step on this layout is not that of one process: see the table above")


def load_recipe(name: str) -> Any:
    """The module of a recipe, by its name or by the file of a script."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def _built(recipe: Any, cfg: RecipeConfig, assets: Any, device: torch.device) -> Any:
    model = recipe.build_model(cfg, assets, device)
    if has_adapters(model):
        initialize_adapters(model, cfg.train.seed)
    return model


def some_samples(data: Any, count: int = _SAMPLES, most: int = 2048) -> list[Sample]:
    """The first samples of the data that can be read, of `most` tokens together."""
    found: list[Sample] = []
    for made in _rows(data):
        for sample in made if isinstance(made, list) else [made]:
            if sum(len(each["input_ids"]) for each in [*found, sample]) <= most:
                found.append(sample)
        if len(found) >= count:
            break
    if len(found) < 2:
        raise DataError(f"of the first rows of the data no two samples have at most {most} tokens together")
    return found[:count]


def _rows(data: Any, tries: int = 200) -> Iterator[Any]:
    if hasattr(data, "__getitem__"):
        for number in range(min(len(data), tries)):
            try:
                yield data[number]
            except DataError:
                continue
    else:
        yield from (row for row, _ in zip(data, range(tries), strict=False))


def _untouched(cfg: RecipeConfig) -> RecipeConfig:
    model = cfg.model.model_copy(update={"attn_implementation": "eager", "moe_implementation": "eager"})
    return cfg.model_copy(update={"model": model})


def alone(model: Any, samples: Sequence[Sample], collate: Any, targets: int) -> Step:
    """Each sample on its own through the unwrapped model, or padded together if its routers have a loss."""
    loss, values = 0.0, dict[str, float]()
    routed = getattr(model.config.get_text_config(), "output_router_logits", False)
    batches = [dict(collate(samples))] if routed else [dict(collate([sample])) for sample in samples]
    for batch in batches:
        out = model(**batch, num_items_in_batch=targets, use_cache=False, **_noise(model))
        out.loss.backward()
        loss += float(out.loss.detach())
        for name, term in (getattr(out, "losses", None) or {"text": out.loss}).items():
            values[name] = values.get(name, 0.0) + float(term.detach())
    gradients = whole_gradients(model)
    if len(values) == 1:
        return Step(loss, gradients, {name: (value, _parts(gradients)) for name, value in values.items()})
    # without targets of text what is left of the loss is that of the other terms
    model.zero_grad()
    for batch in batches:
        silent = {key: torch.full_like(batch[key], -100) for key in ("labels", "shift_labels") if key in batch}
        model(**{**batch, **silent}, num_items_in_batch=targets, use_cache=False, **_noise(model)).loss.backward()
    others = whole_gradients(model)
    text = {name: gradient - others[name] for name, gradient in gradients.items()}
    reached = {name: _parts(text if name == "text" else others) for name in values}
    return Step(loss, gradients, {name: (value, reached[name]) for name, value in values.items()})


def _parts(gradients: Gradients) -> list[str]:
    """The parts of the model, by the first two words of their names, with a gradient that is not zero."""
    largest = max((float(gradient.abs().max()) for gradient in gradients.values()), default=0.0)
    reached = (name for name, gradient in gradients.items() if float(gradient.abs().max()) > 1e-9 * largest)
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in reached))


def _noise(model: nn.Module) -> dict[str, int]:
    return {"noise_seed": _SEED} if hasattr(model, "decoders") or hasattr(model, "foundation") else {}


def _without_targets(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}


def whole_gradients(model: nn.Module) -> Gradients:
    """The gradients of all trainable parameters, whole, by the names that they have in the plain model."""
    flat = isinstance(model, FullyShardedDataParallel)
    found: Gradients = {}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True) if flat else nullcontext():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                found[plain_name(name)] = whole.detach().float().clone()
    return found


def report(
    console: Console,
    layout: str,
    samples: Sequence[Sample],
    spread: Step,
    truth: Step,
    leaks: LeakReport | None,
    plain: nn.Module,
) -> bool:
    """Print what was compared; returns whether it is the same."""
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    console.print(f"{len(samples)} samples, {tokens} tokens; {layout.splitlines()[0]}", highlight=False)
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in truth.gradients.values())
    errors = {name: _error(spread.gradients.get(name), wanted, least) for name, wanted in truth.gradients.items()}
    table = Table("parameter", "largest gradient", "error", box=None, pad_edge=False)
    for name in sorted(errors, key=lambda name: -errors[name])[:_SHOWN]:
        table.add_row(name, f"{float(truth.gradients[name].abs().max()):.1e}", f"{errors[name]:.1e}")
    console.print(table)
    if len(errors) > _SHOWN:
        console.print(f"... and {len(errors) - _SHOWN} more with smaller errors")
    of_loss = abs(spread.loss - truth.loss) / max(abs(truth.loss), 1e-9)
    worst = max(errors, key=lambda name: errors[name])
    silent = sorted(name for name, gradient in truth.gradients.items() if not gradient.any())
    frozen = sum(not p.requires_grad for p in plain.parameters())
    reached = len(truth.gradients) - len(silent)
    good = of_loss <= TOLERANCE and errors[worst] <= TOLERANCE and (leaks is None or not leaks.leaks)
    console.print(f"loss: {truth.loss:.6f} alone, {spread.loss:.6f} here, apart by {of_loss:.1e}")
    for name, (value, parts) in truth.terms.items():
        console.print(f"  {name} {value:.4f} reaches {', '.join(parts)}")
    console.print(f"gradients: worst error {errors[worst]:.1e}, of {worst}")
    console.print(f"packed rows: {leaks}" if leaks is not None else "packed rows: nothing to probe")
    console.print(f"weights: the loss reaches {reached} of {len(truth.gradients)} that learn; {frozen} are frozen")
    if silent:
        console.print(f"  not reached by these samples: {', '.join(silent[:8])}{' ...' if len(silent) > 8 else ''}")
    console.print("PASS" if good else "FAIL")
    return good


def _error(got: Tensor | None, wanted: Tensor, least: float) -> float:
    """The largest difference, relative to the largest value, or to `least` where all are rounding (biases of keys)."""
    if got is None or got.shape != wanted.shape:
        return float("inf")
    return float((got - wanted).abs().max()) / max(float(wanted.abs().max()), least)


if __name__ == "__main__":
    main()
