"""Where a run stands, and how that looks while it goes on."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from veomni_recipes.distributed import gather, rank

if TYPE_CHECKING:
    from veomni_data import Batch, DataLoader


@dataclass
class Progress:
    """Counters of a run, saved with its checkpoints.

    Attributes:
        step: optimizer steps made.
        epoch: passes over the data that are complete.
        epoch_step: steps made in the present one.
        tokens: tokens that went through the model, over all ranks, without padding.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.data_wait = 0.0

    def steps(self, loader: DataLoader, limit: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step that is left of this epoch, of which `limit` steps count.

        `data_wait` is the seconds that it took the loader to have those of the present step.
        """
        if self.epoch_step < limit:
            asked = time.monotonic()
            for micro_batches in loader:
                self.data_wait = time.monotonic() - asked
                self.step, self.epoch_step = self.step + 1, self.epoch_step + 1
                yield micro_batches
                if self.epoch_step >= limit:
                    break
                asked = time.monotonic()

    def end_epoch(self, loader: DataLoader) -> None:
        """The next epoch is on."""
        self.epoch, self.epoch_step = self.epoch + 1, 0
        loader.set_epoch(self.epoch)

    def state(self, loader: DataLoader, **parts: Any) -> dict[str, Any]:
        """All of a run but its model and optimizer, as a checkpoint's `extra_state`; every rank gets the same.

        Args:
            loader: of the training data.
            parts: what else has a `state_dict()`, the same on all ranks.
        """
        return {
            "progress": asdict(self),
            "loader": gather(loader.state_dict()),
            "rng": gather(torch.get_rng_state()),
            **{name: part.state_dict() for name, part in parts.items()},
        }

    def restore(self, state: Mapping[str, Any], loader: DataLoader, **parts: Any) -> None:
        """Go on where `state` was taken; a rank, or a part, that was not there then stays as it is."""
        self.__dict__.update(state["progress"])
        loader.load_state_dict(state["loader"])
        for name, part in parts.items():
            if name in state:
                part.load_state_dict(state[name])
        if rank() < len(state["rng"]):
            torch.set_rng_state(state["rng"][rank()])


class Display:
    """A live bar on a terminal, some twenty plain lines elsewhere, nothing on ranks that do not show.

    Args:
        total: steps of the run.
        done: steps made before it began.
        shown: whether this rank shows anything.
    """

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._total, self._done, self._shown = total, done, shown
        self._started = time.monotonic()
        self._bar: Any = None
        if shown and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Bar(*columns)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()
            atexit.register(self._bar.stop)  # a run that fails leaves the terminal as it was, too

    def say(self, text: str) -> None:
        """Print a line above the bar; nothing for an empty text."""
        if not text:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._shown:
            print(text, flush=True)

    def step(self, line: Mapping[str, Any]) -> None:
        """Show a step by its line of metrics."""
        step = int(line["step"])
        text = f"loss {line['loss']:.4f}  lr {line['lr']:.1e}  {line['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step % max(1, self._total // 20) == 0 or step in (self._done + 1, self._total):
            left = (time.monotonic() - self._started) / (step - self._done) * (self._total - step)
            self.say(f"step {step}/{self._total}  {text}  {timedelta(seconds=round(left))} left")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
