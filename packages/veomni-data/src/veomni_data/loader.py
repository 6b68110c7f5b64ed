"""The loader: for each optimizer step, the list of its micro-batches on this rank."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch.distributed as dist

from .collators import PackingCollator, PaddingCollator, Sample
from .encoding import Encoder
from .errors import DataError
from .lane import Plan
from .lengths import POLICIES, TooLong
from .multisource import Mixture
from .rows import RowRules
from .source import Source, sources_of
from .steps import Collate, DataLoader, is_list_of_samples

Counted = Literal["tokens", "targets"]


def build_dataloader(
    dataset: Any,
    *,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    max_seq_len: int,
    packing: bool = True,
    buffer_size: int = 200,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    collate: Collate | None = None,
    seed: int = 0,
    drop_last: bool = True,
    group: Any = None,
    too_long: TooLong = "drop",
    max_skipped: float = 0.01,
    skipped_path: str | Path | None = None,
    ledger: str | Path | None = None,
    description: Mapping[str, Any] | None = None,
    budget: Callable[[int], int] | None = None,
    count: Counted = "tokens",
    max_row_tokens: int | None = None,
    cost: Callable[[Sample], float] | None = None,
    bucket: Callable[[Sample], Hashable] | None = None,
    pin_memory: bool = False,
    worker_init: Callable[[int], None] | None = None,
    worker_timeout: float | None = None,
) -> DataLoader:
    """A loader whose steps do not depend on the number of ranks, workers or micro-batches.

    A step has `global_batch_size` rows over all data-parallel ranks; a row is up to `max_seq_len` tokens of samples if
    `packing`, else one sample. Row s comes from the s-th of `global_batch_size` fixed parts of the epoch's order as
    long as that has any, and then from those that have more. Each rank has a block of rows, and `micro_batch_size` rows
    make a micro-batch.

    Args:
        dataset: what `build_dataset` gives; a sequence of which `dataset[i]` is a sample `{"input_ids", "labels", ...}`
            (lists or 1-D tensors) or a list of samples; or an iterable of these, which every rank walks through, also
            up to where it was when it is resumed (see `IterableSource`).
        dp_rank, dp_size: place among the data-parallel ranks; sequence-parallel ranks of one row share it.
        buffer_size: samples of each row's part that packing chooses from.
        num_workers: processes that do nothing but make samples; a sample must be a function of its row.
        prefetch_factor: lots of 8 examples that each worker is ahead, or all are by a step if that is more.
        collate: makes a batch of the samples of a micro-batch, of none too (a rank that has run dry); None is
            PackingCollator if packing, else PaddingCollator.
        seed: of the order, with the epoch.
        drop_last: end the epoch at the first step for which a row is missing; else no sample is left out, and rows that
            are missing are missing from the batches.
        group: a process group over the data-parallel ranks, by which they agree at every step that it is not the last
            and that each can go on (else all raise the same DataError). Needed with more than one rank unless `dataset`
            is a list of samples, of which each rank can count the steps.
        too_long: what becomes of a sample of more than `max_seq_len` tokens, see `fit_sample`; `counts()` has how many.
        max_skipped: broken samples (what raises a DataError) are skipped, until they are more than this share of what
            was seen on all ranks (of at least 1,000 examples, or of an epoch if that has fewer). 0 = the first stops.
        skipped_path: a file to which each rank appends a line of JSON for every broken sample.
        ledger: a folder in which is written down which sample went where, for `audit` and `replay`.
        description: of the data, plain values that are kept in the ledger, for those who read it.
        budget: tokens of a row at a step of the run (from 0), for a warm-up; never more than `max_seq_len`. A row
            begins with the oldest sample even if that is longer.
        count: whether a row holds `max_seq_len` (or the budget) "tokens", or so many "targets", tokens that are learnt.
        max_row_tokens: the most tokens of a row when targets are counted, which bounds the memory of a step; None is
            1.5 x `max_seq_len`.
        cost: the work of a sample in any unit. The rows of a step are then made to cost the same, as far as that can
            be, and dealt to the ranks so that each has as many as before and about the same work; what a step is made
            of does not depend on the number of ranks either.
        bucket: what all samples of a packed row have in common, such as the shape of a picture, so that `collate` can
            stack them.
        pin_memory: copy batches to page-locked memory, where there is an accelerator.
        worker_init: called in each worker process with its number.
        worker_timeout: seconds after which a worker that has not answered is given up.

    Raises:
        DataError: sizes that do not divide, too few samples for one step, a missing group, an option without effect.
    """
    if not 0 <= dp_rank < dp_size:
        raise DataError(f"dp_rank={dp_rank} is not one of dp_size={dp_size} ranks")
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (dp_size * micro_batch_size):
        raise DataError(
            f"global_batch_size={global_batch_size} is not a multiple of dp_size * micro_batch_size = "
            f"{dp_size} * {micro_batch_size} = {dp_size * micro_batch_size}"
        )
    least = {"max_seq_len": (max_seq_len, 1), "buffer_size": (buffer_size, 1), "num_workers": (num_workers, 0)}
    for name, (value, lowest) in {**least, "prefetch_factor": (prefetch_factor, 1), "seed": (seed, 0)}.items():
        if value < lowest:
            raise DataError(f"{name}={value} must be at least {lowest}")
    if worker_timeout is not None and worker_timeout <= 0:
        raise DataError(f"worker_timeout={worker_timeout} must be a number of seconds above 0")
    if too_long not in POLICIES:
        raise DataError(f'too_long="{too_long}" is not one of {", ".join(POLICIES)}')
    if count not in get_args(Counted):
        raise DataError(f'count="{count}" is not one of {", ".join(get_args(Counted))}')
    if not 0 <= max_skipped <= 1:
        raise DataError(f"max_skipped={max_skipped} is not a share from 0 to 1")
    if not packing and (budget is not None or count == "targets"):
        raise DataError("without packing a row is one sample: budget and count say how many are packed into one")
    if bucket is not None and (not packing or cost is not None or count == "targets"):
        raise DataError('a bucket is for packed rows of max_seq_len tokens: without cost and count="targets"')
    if max_row_tokens is not None and (count == "tokens" or max_row_tokens < max_seq_len):
        raise DataError(
            f'max_row_tokens={max_row_tokens} is at least max_seq_len={max_seq_len}, and for count="targets"'
        )
    if description is not None and ledger is None:
        raise DataError("a description is kept in the ledger: give its folder too")
    if group is not None and dist.get_world_size(group) != dp_size:
        raise DataError(f"group has {dist.get_world_size(group)} ranks but dp_size={dp_size}")
    sources, mixture = sources_of(dataset)
    _check_rows(sources, mixture, global_batch_size, drop_last)
    if dp_size > 1 and group is None:
        if not is_list_of_samples(dataset):
            raise DataError(
                f"dp_size={dp_size} ranks cannot know when the others run out of samples: give `group`, a process "
                f"group over the data-parallel ranks"
            )
        if cost is not None:
            raise DataError("ranks deal their rows by cost through `group`, a process group over them: give it")
    if count == "targets":
        max_row_tokens = max_row_tokens or max_seq_len * 3 // 2
    if collate is None:
        collate = PackingCollator() if packing else PaddingCollator()
    collated = isinstance(collate, (PackingCollator, PaddingCollator)) or count == "targets"
    return DataLoader(
        dataset,
        plan=Plan(
            sources,
            mixture,
            global_batch_size,
            seed,
            epoch=0,
            first_step=0,
            rules=RowRules(max_seq_len, buffer_size if packing else None, budget, max_row_tokens, cost, bucket),
        ),
        encoder=Encoder(sources, ("input_ids", "labels") if collated else ("input_ids",), max_seq_len, too_long),
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch_size=micro_batch_size,
        workers={
            "num_workers": num_workers,
            "prefetch_factor": prefetch_factor,
            "worker_init": worker_init,
            "timeout": worker_timeout,
        },
        collate=collate,
        drop_last=drop_last,
        group=group,
        max_skipped=max_skipped,
        skipped_path=None if skipped_path is None else Path(skipped_path),
        ledger=None if ledger is None else Path(ledger),
        description=description,
        pin_memory=pin_memory,
    )


def _check_rows(sources: Sequence[Source], mixture: Mixture | None, shards: int, drop_last: bool) -> None:
    """That there can be a step, where the numbers of rows are known."""
    if all(source.rows is not None for source in sources):
        rows = sum(source.rows or 0 for source in sources)
        if rows < (shards if drop_last else 1):
            raise DataError(
                f"the dataset has {rows} samples, too few for a step of global_batch_size={shards}"
                + (" (drop_last=False makes an incomplete one)" if rows else "")
            )
    if mixture is None or mixture.stopping != "first_exhausted" or not drop_last:
        return
    for source, drawn in zip(sources, mixture.weights(0), strict=True):
        if drawn > 0 and source.rows is not None and source.rows < shards:
            raise DataError(
                f'the source "{source.name}" has {source.rows} samples, not one for each of the '
                f"global_batch_size={shards} rows of a step, so that stopping: first_exhausted would end the epoch at "
                f"once: let it be all_exhausted or forever"
            )
