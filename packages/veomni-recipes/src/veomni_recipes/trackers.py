"""Where the numbers of a run go besides its own folder: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from veomni_config import RecipeConfig

from veomni_recipes.progress import Display
from veomni_recipes.run_folder import VALIDATION, Metrics


class Tracker(Protocol):
    """One place for the numbers of a run."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step."""

    def close(self) -> None:
        """No more come."""


class Trackers:
    """All trackers of a run. One that fails is named in a sentence and left out, whatever it raises: the run goes on.

    Args:
        cfg: `train.trackers`, `use_wandb`, `wandb_project`, `wandb_name`; all of it is shown beside the numbers.
        folder: of the run.
        step: that the run goes on from; numbers of later ones, of a run that was killed, are dropped.
        say: prints a sentence.
        on: whether this rank tracks; the others have no trackers.
    """

    def __init__(
        self, cfg: RecipeConfig, folder: Path, *, step: int = 0, say: Callable[[str], None] = print, on: bool = True
    ) -> None:
        self._say = say
        names = dict.fromkeys([*cfg.train.trackers, *(["wandb"] if cfg.train.use_wandb else [])] if on else [])
        self._open: dict[str, Tracker] = {}
        for name in names:
            opening = {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "trackio": _open_trackio}[name]
            if (tracker := self._tried(name, partial(opening, cfg, folder, step))) is not None:
                self._open[name] = tracker

    def log(self, line: Mapping[str, Any], prefix: str = "") -> None:
        """Give a line of metrics to all of them, as `train/loss`, `train/losses/text`, ...

        Args:
            prefix: in place of `train`.
        """
        step = int(line["step"])
        numbers = {f"{prefix or 'train'}/{name}": value for name, value in _numbers(line) if name != "step"}
        for name, tracker in [*self._open.items()]:
            self._tried(name, partial(tracker.log, step, numbers))

    def close(self) -> None:
        """The run is over."""
        for name, tracker in [*self._open.items()]:
            self._tried(name, tracker.close)
        self._open.clear()

    def _tried(self, name: str, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except ImportError as error:
            self._say(f"{name} is left out, it is not installed ({error.name}): pip install {name}")
        except (Exception, SystemExit) as error:  # whatever it meets, it is not the run's business
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"{name} is left out from here on, it has failed: {reason[:300]}")
        self._open.pop(name, None)
        return None


class StepLog:
    """The lines of a run to the terminal, its folder and its trackers; on one rank, on the others nowhere.

    Args:
        cfg: of the run.
        step: that it goes on from.
        display: of the terminal.
        on: whether this is the rank.
    """

    def __init__(self, cfg: RecipeConfig, step: int, display: Display, on: bool) -> None:
        folder = cfg.train.output_dir
        self._display = display
        self._metrics = Metrics(folder, step) if on else None
        validates = bool(cfg.train.eval_steps or cfg.train.eval_epochs)
        self._validation = Metrics(folder, step, VALIDATION) if on and validates else None
        self._trackers = Trackers(cfg, folder, step=step, say=display.say, on=on)

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Lines of metrics, as the meter makes them."""
        for line in lines:
            self._display.step(line)
            if self._metrics is not None:
                self._metrics.write(line)
            self._trackers.log(line)

    def validated(self, figures: Mapping[str, Any] | None) -> None:
        """The figures of a validation; None if there was none."""
        if figures is None:
            return
        right = f", {figures['accuracy']:.1%} right answers" if "accuracy" in figures else ""
        self._display.say(f"step {figures['step']}: held-out loss {figures['loss']:.4f}{right}")
        if self._validation is not None:
            self._validation.write(figures)
        self._trackers.log(figures, "validation")

    def close(self) -> None:
        """The run is over."""
        self._trackers.close()
        self._display.close()


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        # validations have steps of the past: the step is a number beside the others
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers}, step=step)

    def close(self) -> None:
        self._run.finish()


def _open_tensorboard(cfg: RecipeConfig, folder: Path, step: int) -> Tracker:
    importlib.import_module("tensorboard")  # of which torch only says that something is not there
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None, max_queue=100)
    if not step:
        writer.add_text("config", "```json\n" + cfg.model_dump_json(indent=2) + "\n```")
    return _TensorBoard(writer)


def _open_wandb(cfg: RecipeConfig, folder: Path, step: int) -> Tracker:
    import wandb

    run_id = _same_when_going_on(folder / "wandb" / "run_id", secrets.token_hex(4), step)
    run = wandb.init(
        project=cfg.train.wandb_project,
        name=cfg.train.wandb_name,
        dir=str(folder),
        id=run_id,
        resume="allow",
        config=cfg.model_dump(mode="json"),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return _Wandb(run)


def _open_trackio(cfg: RecipeConfig, folder: Path, step: int) -> Tracker:
    import trackio

    # it knows runs by their names
    new = cfg.train.wandb_name or f"{folder.resolve().name}-{secrets.token_hex(2)}"
    name = _same_when_going_on(folder / "trackio" / "run_name", new, step)
    config = cfg.model_dump(mode="json")
    return _Trackio(trackio.init(project=cfg.train.wandb_project, name=name, resume="allow", config=config))


def _same_when_going_on(note: Path, new: str, step: int) -> str:
    """What a tracker knows the run by: as noted if the run goes on from a step, else new, and noted."""
    note.parent.mkdir(exist_ok=True)
    known = note.read_text(encoding="utf-8") if step and note.exists() else new
    note.write_text(known, encoding="utf-8")
    return known


def _numbers(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path + name, value
