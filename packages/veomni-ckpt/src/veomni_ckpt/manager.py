"""Saving and loading a training run: `folder/global_step_N`, there when whole and not before."""

from __future__ import annotations

import re
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from veomni_ckpt import optimizer_state, state_tree
from veomni_ckpt.agreement import agree, is_distributed
from veomni_ckpt.dcp_files import SafeReader, read_metadata, verify_files
from veomni_ckpt.durable import hidden_beside, publish, remove, restore_replaced, retire
from veomni_ckpt.errors import CheckpointError, DamagedCheckpointError
from veomni_ckpt.names import reshard, some
from veomni_ckpt.staging import Staging
from veomni_ckpt.strided_shards import with_pieces

_STEP = re.compile(r"global_step_(\d+)")
_PROTECTED = "protected"
_LEFTOVER = re.compile(r"\.(global_step_\d+)\.(partial|replaced|removed)")


@dataclass(frozen=True)
class _Snapshot:
    """All that one save writes; `tensors` is what this rank gives to DCP."""

    step: int
    tensors: dict[str, Any]
    documents: dict[str, state_tree.StateTree]


class CheckpointManager:
    """Saves to and loads from `folder/global_step_N`, on all ranks together or in a single process.

    Every method except `latest` is a collective: all ranks call it with the same arguments, on a folder that all of
    them see. If one rank fails, all raise.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        async_save: bool = False,
    ) -> None:
        """Touches nothing yet: `folder` is made by the first save.

        Args:
            folder: holds the step folders.
            keep_last: how many of the newest checkpoints stay after a save; None keeps all.
            keep_every: steps that are multiples of it stay too, as do those that `protect` was called for.
            async_save: `save` returns when the state has been copied to the host's memory, and a thread writes it.
                The copy is kept for reuse: one more model and optimizer in memory. Call `close` at the end.

        Raises:
            ValueError: `keep_last` or `keep_every` is not positive.
        """
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every={keep_every} is no distance of steps: give at least 1, or None")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last={keep_last} would keep no checkpoint: give at least 1, or None to keep all")
        self.folder = Path(folder)
        self.keep_last, self.keep_every = keep_last, keep_every
        self.async_save = async_save
        self._group: dist.ProcessGroup | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._staging: Staging | None = None
        self._in_flight: Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        extra_state: Any = None,
    ) -> None:
        """Write `folder/global_step_{step}`; an older one of the same step is replaced.

        Args:
            step: optimizer steps done.
            model: plain, or wrapped in DDP, FSDP1 (`use_orig_params=True`), FSDP2 or HSDP.
            optimizer: made of the model's parameters; may not have stepped yet.
            extra_state: a nested dict / list / tuple of JSON values and plain tensors, the same on every rank (rank
                0's is written).

        Raises:
            CheckpointError: on every rank; nothing under the folder's final names has changed. With `async_save`, what
                goes wrong while writing is raised by the next `save`, `load`, `wait` or `close`.
        """
        self.wait()
        group = self._communicate()
        snapshot, failure = None, None
        try:
            snapshot = _take_snapshot(step, model, optimizer, extra_state)
            if self.async_save:
                self._staging = self._staging or Staging()
                snapshot = replace(snapshot, tensors=self._staging.stage(snapshot.tensors, group))
        except Exception as error:
            failure = error
        agree(failure, group, context=f"step {step} was not saved: ")
        assert snapshot is not None
        if self.async_save:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="veomni-ckpt")
            self._in_flight = self._thread.submit(self._write, snapshot, group)
        else:
            self._write(snapshot, group)

    def protect(self, step: int) -> None:
        """Let `keep_last` never delete this step, such as the best so far; also in later runs. Not a collective.

        Raises:
            CheckpointError: there is no such checkpoint, or its folder cannot be written to.
        """
        folder = self.folder / f"global_step_{step}"
        try:
            (folder / _PROTECTED).touch()
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be protected: {error.strerror}") from error

    def release(self, step: int) -> None:
        """Undo `protect`: the step goes like any other. Not a collective."""
        (self.folder / f"global_step_{step}" / _PROTECTED).unlink(missing_ok=True)

    def load(
        self,
        which: int | str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        strict: bool = True,
    ) -> Any | None:
        """Read a checkpoint into the model and the optimizer, whatever number of ranks and layout wrote it.

        Args:
            which: "auto" (the newest in the folder that is whole; where a newer one is damaged, a warning says so), a
                step of the folder, or the path of a step folder.
            model: already has its parameters in memory (not on the meta device).
            optimizer: None leaves the saved optimizer state unread.
            strict: False loads what both have and warns of the rest, which stays as it is (weights alone: an
                optimizer needs all of them). Shapes and dtypes must be the saved ones all the same.

        Returns:
            The saved `extra_state`, an empty dict if none was given; None if "auto" finds no checkpoint at all.

        Raises:
            CheckpointError: on every rank: no such checkpoint, damaged files, or one that does not fit the model or
                the optimizer.
        """
        self.wait()
        group = self._communicate()
        if which == "auto":
            candidates = self._newest_first(group)
        else:
            candidates = [self.folder / f"global_step_{which}" if isinstance(which, int) else Path(which)]
        damaged: list[str] = []
        for folder in candidates:
            try:
                return _load(folder, model, optimizer, group, strict)
            except DamagedCheckpointError as error:
                damaged.append(str(error))
                if folder != candidates[-1] and _is_first(group):
                    warnings.warn(f"{error}; the checkpoint before it is taken", stacklevel=2)
        if damaged:
            raise CheckpointError("; ".join(damaged))
        return None

    def latest(self) -> int | None:
        """The newest step in the folder, by listing it; None when there is none. Not a collective."""
        return max(self._steps(), default=None)

    def wait(self) -> None:
        """Return when no save is in flight.

        Raises:
            CheckpointError: the save that was in flight has failed.
        """
        future, self._in_flight = self._in_flight, None
        if future is not None:
            future.result()

    def close(self) -> None:
        """Wait for the save in flight, then let go of the thread, its buffers and the process group.

        Raises:
            CheckpointError: the save that was in flight has failed.
        """
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._staging is not None:
                self._staging.close()
            if self._group is not None and is_distributed():
                dist.destroy_process_group(self._group)
            self._thread = self._staging = self._group = None

    def _communicate(self) -> dist.ProcessGroup | None:
        """A gloo group of all ranks, of the manager's own: its thread must not meet the training's collectives."""
        if self._group is None and is_distributed():
            self._group = dist.new_group(backend="gloo")
        return self._group

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = [(_STEP.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return [int(match[1]) for match, path in matches if match and path.is_dir()]

    def _newest_first(self, group: dist.ProcessGroup | None) -> list[Path]:
        """The step folders as rank 0 sees them, so that all ranks try the same ones."""
        found: list[Any] = [None]
        failure = None
        if _is_first(group):
            try:
                self._tidy(delete=False)
                found = [sorted(self._steps(), reverse=True)]
            except OSError as error:
                failure = error
        agree(failure, group)
        if is_distributed():
            dist.broadcast_object_list(found, src=0, group=group)
        return [self.folder / f"global_step_{step}" for step in found[0]]

    def _write(self, snapshot: _Snapshot, group: dist.ProcessGroup | None) -> None:
        """Write the files, sync them, and only then give the folder its name."""
        final = self.folder / f"global_step_{snapshot.step}"
        partial = hidden_beside(final, "partial")
        context = f"{final} was not saved: "
        failure: BaseException | None = None
        if _is_first(group):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._tidy(delete=True)
                partial.mkdir()
            except OSError as error:
                failure = error
        agree(failure, group, context=context)

        try:
            with warnings.catch_warnings():
                # one process without a group is what was asked for
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.save(
                    with_pieces(snapshot.tensors),
                    storage_writer=dcp.FileSystemWriter(partial, overwrite=False),
                    process_group=group,
                    no_dist=group is None,
                )
        except (Exception, CheckpointException) as error:
            failure = error
        if failure is None and _is_first(group):
            try:
                for name, tree in snapshot.documents.items():
                    state_tree.write(tree, partial, name)
                # files of another machine are seen here only on a shared file system
                verify_files(partial, read_metadata(partial))
                publish(partial, final)
            except Exception as error:
                failure = error
        if failure is not None and _is_first(group):
            remove_quietly(partial)
        agree(failure, group, context=context)
        if _is_first(group):
            self._prune(snapshot.step)

    def _tidy(self, *, delete: bool) -> None:
        """Bring back what a killed run had moved aside, and delete what it left unfinished."""
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            if match := _LEFTOVER.fullmatch(path.name):
                restore_replaced(self.folder / match[1])
                if delete:
                    remove(path)

    def _prune(self, saved_step: int) -> None:
        """Delete all but the newest `keep_last` steps and those that stay; never the one just saved."""
        if self.keep_last is None:
            return
        for step in sorted(self._steps(), reverse=True)[self.keep_last :]:
            kept = self.keep_every is not None and step % self.keep_every == 0
            if step != saved_step and not kept and not (self.folder / f"global_step_{step}" / _PROTECTED).exists():
                try:
                    retire(self.folder / f"global_step_{step}")
                except OSError as error:
                    # the new checkpoint is safe: that an old one stays is no reason to end a run
                    warnings.warn(f"an old checkpoint could not be deleted ({error})", stacklevel=2)


def remove_quietly(folder: Path) -> None:
    """Delete what a failed save has left; if even that fails, the next save does it."""
    try:
        remove(folder)
    except OSError:
        return


def _is_first(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_rank(group) == 0


def _take_snapshot(step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, extra_state: Any) -> _Snapshot:
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"step must be an int of at least 0, not {step!r}")
    reshard(model)
    # None is what `load` says when there is no checkpoint
    documents = {"extra_state": state_tree.encode({} if extra_state is None else extra_state, "extra_state")}
    tensors: dict[str, Any] = {"model": {}}
    plain: dict[str, Any] = {}  # what modules keep with `get_extra_state`, unless it is a tensor
    for name, value in get_model_state_dict(model).items():
        (tensors["model"] if isinstance(value, torch.Tensor) else plain)[name] = value
    if plain:
        documents["model"] = state_tree.encode(plain, "model")
    if optimizer is not None:
        state, document = optimizer_state.collect(model, optimizer)
        tensors["optimizer"] = {"state": state}
        documents["optimizer"] = state_tree.encode(document, "optimizer")
    return _Snapshot(step, tensors, documents)


def _load(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None,
    strict: bool,
) -> Any:
    reshard(model)
    failure: Exception | None = None
    metadata, extra_state, document = Metadata({}), None, None
    plain: dict[str, Any] = {}
    try:
        if not folder.is_dir():
            raise DamagedCheckpointError(f"there is no checkpoint {folder}")
        metadata = read_metadata(folder)
        if _is_first(group):
            verify_files(folder, metadata)
        extra_state = state_tree.read(folder, "extra_state")
        if (folder / "model.json").exists():
            plain = state_tree.read(folder, "model")
        if (folder / "optimizer.json").exists() or _has_optimizer(metadata):
            document = state_tree.read(folder, "optimizer")
    except Exception as error:
        failure = error
    agree(failure, group, kind=DamagedCheckpointError)

    model_state: dict[str, Any] = {}
    optimizer_tensors: optimizer_state.Tensors = {}
    groups: list[dict[str, Any]] = []
    try:
        model_state = get_model_state_dict(model)
        if not strict:
            if optimizer is not None:
                raise CheckpointError("an optimizer needs all weights: give none, or strict=True")
            model_state, metadata, plain = _common(folder, model_state, metadata, plain, _is_first(group))
        _check_model(model_state, metadata, plain)
        if optimizer is not None:
            if document is None:
                raise CheckpointError("it was saved without an optimizer: give none to load the weights alone")
            groups = optimizer_state.match_groups(model, optimizer, document)
    except Exception as error:
        failure = error
    agree(failure, group, context=f"{folder} does not fit: ")
    try:
        if optimizer is not None:
            optimizer_tensors = optimizer_state.allocate(model, optimizer, metadata)
    except Exception as error:
        failure = error
    agree(failure, group, context=f"{folder} does not fit: ")

    flat = {f"model.{name}": value for name, value in model_state.items() if name not in plain}
    for name, values in optimizer_tensors.items():
        flat |= {f"optimizer.state.{name}.{key}": value for key, value in values.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                with_pieces(flat),
                storage_reader=SafeReader(folder, metadata),
                process_group=group,
                no_dist=group is None,
            )
    except (Exception, CheckpointException) as error:
        failure = error
    agree(failure, group, kind=DamagedCheckpointError, context=f"{folder} cannot be read: ")

    if optimizer is not None and document is not None:
        optimizer_state.restore(model, optimizer, optimizer_tensors, document, groups)
    loaded = {name: plain[name] if name in plain else flat[f"model.{name}"] for name in model_state}
    set_model_state_dict(model, loaded, options=StateDictOptions(strict=strict))
    return extra_state


def _common(
    folder: Path, model_state: dict[str, Any], metadata: Metadata, plain: dict[str, Any], say: bool
) -> tuple[dict[str, Any], Metadata, dict[str, Any]]:
    """What both the model and the checkpoint have; a warning names the rest."""
    entries = metadata.state_dict_metadata
    saved = {name.removeprefix("model.") for name in entries if name.startswith("model.")} | set(plain)
    missing, unexpected = [n for n in model_state if n not in saved], sorted(saved - set(model_state))
    if say and missing:
        warnings.warn(f"{folder} has no {some(missing)}, which stays as it is", stacklevel=3)
    if say and unexpected:
        warnings.warn(f"{folder} has {some(unexpected)}, which the model has not", stacklevel=3)
    if len(missing) == len(model_state):
        raise CheckpointError("it has none of the model's weights")
    left = {name: entry for name, entry in entries.items() if name.removeprefix("model.") not in unexpected}
    return (
        {name: value for name, value in model_state.items() if name in saved},
        replace(metadata, state_dict_metadata=left),
        {name: value for name, value in plain.items() if name in model_state},
    )


def _has_optimizer(metadata: Metadata) -> bool:
    return any(name.startswith("optimizer.") for name in metadata.state_dict_metadata)


def _check_model(model_state: dict[str, Any], metadata: Metadata, plain: dict[str, Any]) -> None:
    """Names, shapes and dtypes must be the saved ones: what is loaded is bitwise what was saved."""
    prefix = "model."
    saved = {name[len(prefix) :]: md for name, md in metadata.state_dict_metadata.items() if name.startswith(prefix)}
    saved |= plain
    if missing := [name for name in model_state if name not in saved]:
        raise CheckpointError(f"it has no {some(missing)}, which the model has")
    if unexpected := [name for name in saved if name not in model_state]:
        raise CheckpointError(f"it has {some(unexpected)}, which the model has not")
    for name, value in model_state.items():
        entry = saved[name]
        if not isinstance(value, torch.Tensor):
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{name} is no tensor in the checkpoint and a tensor in the model")
        if value.is_meta:
            raise CheckpointError(f"{name} of the model is on the meta device: call to_empty on the model first")
        there, here = list(entry.size), list(value.size())
        if there != here:
            raise CheckpointError(f"{name} is {there} in the checkpoint and {here} in the model")
        there, here = entry.properties.dtype, value.dtype
        if there != here:
            raise CheckpointError(f"{name} is {there} in the checkpoint and {here} in the model")
