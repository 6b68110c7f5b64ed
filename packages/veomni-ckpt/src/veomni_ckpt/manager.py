"""Saving and loading a training run: `folder/global_step_N`, there when whole and not before."""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from veomni_ckpt import loading, saving
from veomni_ckpt.agreement import agree, from_first, is_distributed, is_first
from veomni_ckpt.errors import CheckpointError, DamagedCheckpointError
from veomni_ckpt.manifest import NAME as MANIFEST
from veomni_ckpt.staging import Staging
from veomni_ckpt.storage import PROTECTED, as_folder, open_storage


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
        trainable_only: bool = False,
    ) -> None:
        """Touches nothing yet: `folder` is made by the first save.

        Args:
            folder: holds the step folders; on this machine, or any URL that fsspec knows, such as `s3://bucket/run`,
                if no other run saves there.
            keep_last: how many of the newest checkpoints stay after a save; None keeps all.
            keep_every: steps that are multiples of it stay too, as do those that `protect` was called for.
            async_save: `save` returns when the state has been copied to the host's memory, and a thread writes it.
                The copy is kept for reuse: one more model and optimizer in memory. Call `close` at the end.
            trainable_only: frozen parameters are not saved, as for adapters on a base model: give the model its base
                weights before `load`, which leaves them as they are. Any manager loads such a checkpoint.

        Raises:
            ValueError: `keep_last` or `keep_every` is not positive.
            CheckpointError: a package is missing that the URL needs.
        """
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every={keep_every} is no distance of steps: give at least 1, or None")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last={keep_last} would keep no checkpoint: give at least 1, or None to keep all")
        self.folder = as_folder(folder)
        self._storage = open_storage(self.folder)
        self.keep_last, self.keep_every = keep_last, keep_every
        self.async_save, self.trainable_only = async_save, trainable_only
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
            model: plain, or wrapped in DDP, FSDP1 (`use_orig_params=True`), FSDP2 or HSDP; on each rank the layers of
                its pipeline stage, under their names in the whole model.
            optimizer: made of the model's parameters; may not have stepped yet.
            extra_state: a nested dict / list / tuple of JSON values and plain tensors, the same on every rank (rank
                0's is written).

        Raises:
            CheckpointError: on every rank; nothing under the folder's final names has changed. With `async_save`, what
                goes wrong while writing is raised by the next `save`, `load`, `wait` or `close`.
        """
        self.wait()
        group = self._communicate()
        snapshot, failure = saving.Snapshot(0, {}), None
        try:
            snapshot = saving.take_snapshot(step, model, optimizer, extra_state, self.trainable_only)
            if self.async_save:
                self._staging = self._staging or Staging()
                snapshot = replace(snapshot, tensors=self._staging.stage(snapshot.tensors, group))
        except Exception as error:
            failure = error
        agree(failure, group, context=f"step {step} was not saved: ")
        snapshot = saving.join_stages(snapshot, group)
        if self.async_save:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="veomni-ckpt")
            self._in_flight = self._thread.submit(self._write_in_thread, snapshot, group)
        else:
            self._write(snapshot, group)

    def protect(self, step: int) -> None:
        """Let `keep_last` never delete this step, such as the best so far; also in later runs. Not a collective.

        Raises:
            CheckpointError: there is no such checkpoint, or its folder cannot be written to.
        """
        folder = self._name(step)
        if not (folder / MANIFEST).exists():
            raise CheckpointError(f"{folder} cannot be protected: there is no such checkpoint")
        try:
            (folder / PROTECTED).touch()
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be protected: {error}") from error

    def release(self, step: int) -> None:
        """Undo `protect`: the step goes like any other. Not a collective.

        Raises:
            CheckpointError: its folder cannot be written to.
        """
        try:
            (self._name(step) / PROTECTED).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self._name(step)} cannot be released: {error}") from error

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
            candidates = [self._name(step) for step in from_first(group, self._newest_first)]
        else:
            candidates = [self._name(which) if isinstance(which, int) else as_folder(which)]
        damaged: list[str] = []
        for folder in candidates:
            try:
                return loading.load(folder, model, optimizer, group, strict)
            except DamagedCheckpointError as error:
                damaged.append(str(error))
                if folder != candidates[-1] and is_first(group):
                    warnings.warn(f"{error}; the checkpoint before it is taken", stacklevel=2)
        if damaged:
            raise CheckpointError("; ".join(damaged))
        return None

    def latest(self) -> int | None:
        """The newest step in the folder, by listing it; None when there is none. Not a collective."""
        return max(self._storage.steps(), default=None)

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

    def _name(self, step: int) -> Path:
        return self.folder / f"global_step_{step}"

    def _newest_first(self) -> list[int]:
        self._storage.recover()
        return sorted(self._storage.steps(), reverse=True)

    def _write(self, snapshot: saving.Snapshot, group: dist.ProcessGroup | None) -> None:
        saving.write(snapshot, self._storage, group, str(self._name(snapshot.step)))
        if is_first(group):
            self._prune(snapshot.step)

    def _write_in_thread(self, snapshot: saving.Snapshot, group: dist.ProcessGroup | None) -> None:
        try:
            self._write(snapshot, group)
        except CheckpointError as error:
            if is_first(group):
                # at once, as the next call that raises it may be hours away
                warnings.warn(str(error), stacklevel=2)
            raise

    def _prune(self, saved_step: int) -> None:
        """Delete all but the newest `keep_last` steps and those that stay; never the one just saved."""
        if self.keep_last is None:
            return
        try:
            for step in sorted(self._storage.steps(), reverse=True)[self.keep_last :]:
                kept = self.keep_every is not None and step % self.keep_every == 0
                if step != saved_step and not kept and not (self._name(step) / PROTECTED).exists():
                    self._storage.retire(step)
        except Exception as error:
            # the new checkpoint is safe: that an old one stays is no reason to end a run
            warnings.warn(f"an old checkpoint could not be deleted ({error})", stacklevel=2)
