"""What a configuration says about reading, packing and dealing out the training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from veomni_config import BatchPlan, OmniRecipeConfig, RecipeConfig, VLDataConfig, VLRecipeConfig
from veomni_data import (
    DataDescription,
    DataLoader,
    PackingCollator,
    PaddingCollator,
    Sample,
    attention_cost,
    build_dataloader,
)
from veomni_parallel import ParallelState

from veomni_recipes.distributed import gather

SKIPPED = "skipped.jsonl"


def build_rows(
    cfg: RecipeConfig,
    dataset: Any,
    state: ParallelState,
    plan: BatchPlan,
    *,
    total_steps: int,
    hidden_size: int,
    pad_token_id: int,
    folder: Path,
    description: Mapping[str, Any],
) -> DataLoader:
    """The loader of this rank's micro-batches, as the configuration asks for them.

    Args:
        dataset: of samples.
        total_steps, hidden_size: see `row_options`.
        folder: of the run, where `ledger/` and `skipped.jsonl` are written.
        description: of the data, for `veomni-data replay`.
    """
    packed = cfg.train.rmpad or cfg.train.rmpad_with_pos_ids
    return build_dataloader(
        dataset,
        dp_rank=state.dp.get_local_rank(),
        dp_size=state.dp.size(),
        micro_batch_size=cfg.train.micro_batch_size,
        global_batch_size=plan.global_batch_size,
        max_seq_len=cfg.data.max_seq_len,
        buffer_size=cfg.train.dyn_bsz_buffer_size,
        num_workers=cfg.data.num_workers,
        prefetch_factor=cfg.data.prefetch_factor,
        pin_memory=cfg.data.pin_memory,
        collate=(PackingCollator if packed else PaddingCollator)(pad_token_id),
        seed=cfg.train.seed,
        drop_last=cfg.data.drop_last,
        group=state.dp.get_group(),
        max_skipped=cfg.data.max_skipped,
        skipped_path=folder / SKIPPED,
        ledger=folder / "ledger",
        description=description,
        **row_options(cfg, total_steps, hidden_size),
    )


def media_limits(data: VLDataConfig) -> dict[str, Any]:
    """The limits of a picture, video or sound that are set, as `encode_multimodal_sample` names them."""
    limits = {
        "max_pixels": data.max_pixels,
        "max_pixel_size": data.max_pixel_size,
        "scale_factor": data.scale_factor,
        "fps": data.fps,
        "max_frames": data.max_frames,
        "max_seconds": data.max_audio_seconds,
    }
    return {name: limit for name, limit in limits.items() if limit is not None}


def row_options(cfg: RecipeConfig, total_steps: int, hidden_size: int) -> dict[str, Any]:
    """How rows are filled and dealt to ranks, as arguments of `build_dataloader`.

    Args:
        total_steps: of the run.
        hidden_size: of the model, on which it depends how attention compares with the linear layers.
    """
    options: dict[str, Any] = {"too_long": cfg.data.too_long, "packing": cfg.train.dyn_bsz}
    if cfg.train.balance_ranks:
        options["cost"] = partial(_work, hidden_size=hidden_size)
    if not cfg.train.dyn_bsz:
        return options
    options["budget"] = row_budget(cfg, total_steps)
    if cfg.train.dyn_bsz_count_mode == "effective":
        options["count"] = "targets"
        options["max_row_tokens"] = int(cfg.train.dyn_bsz_physical_overflow_ratio * cfg.data.max_seq_len)
    return options


def row_budget(cfg: RecipeConfig, total_steps: int) -> Callable[[int], int] | None:
    """Tokens of a row at each step, counted from 0; None if that is `data.max_seq_len` throughout.

    A micro-batch has micro_batch_size * max_seq_len - dyn_bsz_margin tokens; during the first
    bsz_warmup_ratio * total_steps steps it grows to that, in a straight line, from bsz_warmup_init_mbtoken.
    """
    rows = cfg.train.micro_batch_size
    full = rows * cfg.data.max_seq_len - cfg.train.dyn_bsz_margin
    warmup = cfg.train.bsz_warmup_ratio * total_steps
    if not warmup and not cfg.train.dyn_bsz_margin:
        return None
    return partial(_budget, first=cfg.train.bsz_warmup_init_mbtoken, full=full, warmup=warmup, rows=rows)


def _budget(step: int, first: int, full: int, warmup: float, rows: int) -> int:
    tokens = full if step >= warmup else first + (full - first) * step / warmup
    return max(1, int(tokens) // rows)


def _work(sample: Sample, hidden_size: int) -> float:
    return attention_cost(len(sample["input_ids"]), hidden_size)


def left_out(loader: DataLoader, folder: Path) -> tuple[dict[str, int], str]:
    """How many samples of the run were broken or too long, by what was the matter, and a sentence about it.

    Every rank calls it; the sentence is empty if none was left out.
    """
    totals: dict[str, int] = {}
    for counts in gather(loader.counts()):
        for reasons in counts["skipped"].values():
            _add(totals, reasons)
        _add(totals, {name: counts[name] for name in ("dropped", "truncated", "split") if counts[name]})
    if not totals:
        return totals, ""
    listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(totals.items()))
    skipped = folder / SKIPPED
    named = f" (broken ones are named in {skipped})" if skipped.exists() else ""
    return totals, f"samples that were broken or longer than a row: {listed}{named}"


def _add(totals: dict[str, int], more: Mapping[str, int]) -> None:
    for name, count in more.items():
        totals[name] = totals.get(name, 0) + count


def describe_data(cfg: OmniRecipeConfig | VLRecipeConfig, processor: Path, pad_token_id: int) -> dict[str, Any]:
    """How the data become batches, for `veomni-data replay`, which reads it in the ledger.

    Args:
        processor: the folder in which the model's processor is saved.
    """
    packed = cfg.train.rmpad or cfg.train.rmpad_with_pos_ids
    return DataDescription(
        path=cfg.data.train_path,
        type="multimodal",
        processor=str(processor),
        kind=cfg.data.datasets_type,
        root=cfg.data.root,
        columns=cfg.data.columns or None,
        text_keys=cfg.data.text_keys,
        image_keys=cfg.data.image_keys,
        limits=media_limits(cfg.data) | ({"max_image_nums": most} if (most := cfg.data.max_image_nums) else {}),
        generation_ratio=getattr(cfg.data, "generation_ratio", 0.0),
        shuffle_buffer=cfg.data.shuffle_buffer,
        collator="packing" if packed else "padding",
        pad_token_id=pad_token_id,
    ).to_dict()
