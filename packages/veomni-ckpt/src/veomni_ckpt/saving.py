"""One save: what a rank gives, and how all of it becomes the files of a checkpoint."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from veomni_ckpt import manifest, optimizer_state, state_tree
from veomni_ckpt.agreement import agree, from_first, gather, is_first
from veomni_ckpt.dcp_files import open_writer, read_metadata, verify_ranges
from veomni_ckpt.durable import naming
from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.names import frozen_names, reshard
from veomni_ckpt.storage import Storage, as_folder
from veomni_ckpt.strided_shards import with_pieces


@dataclass(frozen=True)
class Snapshot:
    """All that one save writes.

    Attributes:
        step: optimizer steps done.
        tensors: what this rank gives to DCP.
        values: what is no tensor of a model or optimizer: document name -> nested values.
        files: the same as the contents of files.
        trainable_only: frozen parameters were left out.
    """

    step: int
    tensors: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    trainable_only: bool = False


def take_snapshot(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    extra_state: Any,
    trainable_only: bool,
) -> Snapshot:
    """What this rank has to save; tensors are those of the model and the optimizer, not copies.

    Raises:
        CheckpointError: something in it cannot be saved.
    """
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"step must be an int of at least 0, not {step!r}")
    reshard(model)
    left_out = frozen_names(model) if trainable_only else set()
    tensors: dict[str, Any] = {"model": {}}
    plain: dict[str, Any] = {}  # what modules keep with `get_extra_state`, unless it is a tensor
    for name, value in get_model_state_dict(model).items():
        if name not in left_out:
            (tensors["model"] if isinstance(value, torch.Tensor) else plain)[name] = value
    # None is what `load` says when there is no checkpoint
    values: dict[str, Any] = {"extra_state": {} if extra_state is None else extra_state}
    if plain:
        values["model"] = plain
    if optimizer is not None:
        state, values["optimizer"] = optimizer_state.collect(model, optimizer)
        tensors["optimizer"] = {"state": state}
    snapshot = Snapshot(step, tensors, values, trainable_only=trainable_only)
    return replace(snapshot, files=_files(values))


def _files(values: dict[str, Any]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for name, value in values.items():
        files |= state_tree.to_files(state_tree.encode(value, name), name)
    return files


def join_stages(snapshot: Snapshot, group: dist.ProcessGroup | None) -> Snapshot:
    """Where ranks hold different layers: the values of all of them in the files of each. A collective."""
    own = {name: value for name, value in snapshot.values.items() if name != "extra_state"}
    groups = [entry["params"] for entry in own.get("optimizer", {}).get("param_groups", [])]
    digest = hashlib.sha256(repr((groups, sorted(own.get("model", {})))).encode()).hexdigest()
    digests = gather(digest, group)
    if len(set(digests)) == 1:
        return snapshot
    assert group is not None
    is_new = digests.index(digest) == dist.get_rank(group)
    stages = [stage for stage in gather(own if is_new else None, group) if stage is not None]
    values = {"extra_state": snapshot.values["extra_state"]}
    if plain := {name: value for stage in stages for name, value in stage.get("model", {}).items()}:
        values["model"] = plain
    if "optimizer" in own:
        values["optimizer"] = optimizer_state.join([stage["optimizer"] for stage in stages])
    return replace(snapshot, values=values, files=_files(values))


def write(snapshot: Snapshot, storage: Storage, group: dist.ProcessGroup | None, name: str) -> None:
    """Write the files where no one looks for a checkpoint, check them, and only then let them be one. A collective.

    Raises:
        CheckpointError: on every rank, naming the step as `name`; what bore the name before still does.
    """
    context = f"{name} was not saved: "
    draft = as_folder(from_first(group, lambda: str(storage.begin(snapshot.step)), context=context))
    failure: BaseException | None = None
    crc_before = torch.serialization.get_crc32_options()
    try:
        # `SafeReader` holds what it reads against them
        torch.serialization.set_crc32_options(True)
        with warnings.catch_warnings():
            # one process without a group is what was asked for
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                with_pieces(snapshot.tensors),
                storage_writer=open_writer(draft),
                process_group=group,
                no_dist=group is None,
            )
    except (Exception, CheckpointException) as error:
        failure = error
    finally:
        torch.serialization.set_crc32_options(crc_before)
    if is_first(group):
        try:
            if failure is None:
                storage.publish(draft, snapshot.step, _complete(snapshot, draft))
        except Exception as error:
            failure = error
        if failure is not None:
            storage.discard(draft)
    agree(failure, group, context=context)


def _complete(snapshot: Snapshot, draft: Path) -> manifest.Manifest:
    """Write the small files, and list all."""
    for name, content in snapshot.files.items():
        with naming(draft / name):
            (draft / name).write_bytes(content)
    written = manifest.of_files(draft, snapshot.trainable_only)
    # files of another machine are seen here only on a shared file system
    metadata = read_metadata(draft / ".metadata", written.content(draft, ".metadata"))
    verify_ranges(draft, metadata, {name: size for name, (size, _) in written.files.items()})
    return written
