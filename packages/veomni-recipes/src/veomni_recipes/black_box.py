"""What is known of a step that goes wrong, saved so that `veomni replay` can run it again on one device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from veomni_ckpt import export_hf
from veomni_parallel import ParallelState, Watchdog

from veomni_recipes.batch_counts import count_samples, count_targets, count_tokens
from veomni_recipes.errors import TrainingError
from veomni_recipes.meter import peak_memory
from veomni_recipes.run_folder import write_json

if TYPE_CHECKING:
    from veomni_data import Batch, DataLoader

FOLDER = "black_box"
WEIGHTS = "weights"


class BlackBox:
    """Notes each step when it begins, and writes down what it notes if that step goes wrong.

    In `RUN/black_box/step_N/` each rank leaves `rank_R.json` (why, samples, counts, layout) and `rank_R.rng.pt` (the
    states of the random generators before the step), and where the ranks can still work together `weights/` holds the
    model as it was in that step. Only the newest step's weights are kept.

    Args:
        folder: of the run.
        loader: of the training data; its ledger says which samples are in a step.
        state: of the run.
        model: wrapped; it is saved with a bad step.
        assets: what belongs to its weights, such as the processor.
    """

    def __init__(
        self, folder: Path, loader: DataLoader, state: ParallelState, model: nn.Module, assets: Sequence[Any] = ()
    ) -> None:
        self._folder, self._loader, self._state = folder / FOLDER, loader, state
        self._model, self._assets = model, assets
        self._watchdog: Watchdog | None = None
        self._step, self._facts, self._rng = 0, dict[str, Any](), dict[str, torch.Tensor]()

    def begin(self, step: int, micro_batches: Sequence[Batch], **arguments: Any) -> None:
        """A step begins with these micro-batches, still on the host.

        Args:
            arguments: what the model is called with besides, such as the seed of noise.
        """
        self._step, self._rng = step, random_states(self._state.device)
        counts = [
            {
                "tokens": count_tokens([batch]),
                "targets": count_targets([batch]),
                "samples": count_samples(batch),
                "shapes": {key: list(value.shape) for key, value in batch.items() if isinstance(value, torch.Tensor)},
            }
            for batch in micro_batches
        ]
        self._facts = {"micro_batches": counts, "arguments": arguments}
        self.beat(f"step {step}")

    def beat(self, what: str) -> None:
        """The run goes on, with this: no hang."""
        if self._watchdog is not None:
            self._watchdog.beat(what)

    def write(self, reason: str, **facts: Any) -> Path:
        """Save what is known of the present step on this rank; returns the step's folder."""
        folder = self._folder / f"step_{self._step}"
        folder.mkdir(parents=True, exist_ok=True)
        self._loader.write_ledger()
        name = f"rank_{self._state.rank}"
        torch.save(self._rng, folder / f"{name}.rng.pt")
        about = {
            "reason": reason,
            "step": self._step,
            "rank": self._state.rank,
            "dp_rank": self._state.dp.get_local_rank(),
            "layout": self._state.describe(),
            "peak_memory_gb": peak_memory(self._state.device) / 1e9,
            "samples": self._loader.given_places(),
        }
        if self._state.rank == 0:
            plain: Any = self._model.module if hasattr(self._model, "module") else self._model  # of DDP, FSDP1
            if hasattr(plain.config, "save_pretrained"):  # that of a transformer of diffusers is in config.yaml
                plain.config.save_pretrained(folder)
        write_json(folder / f"{name}.json", about | self._facts | facts)
        return folder

    def write_weights(self) -> None:
        """Save the model as it is in this step, and delete that of an earlier one. Every rank calls it.

        Of a model with quantised weights, for which a Hugging Face folder has no place, nothing is saved.
        """
        if any(is_quantised(parameter) for parameter in self._model.parameters()):
            return
        folder = self._folder / f"step_{self._step}" / WEIGHTS
        export_hf(self._model, folder, assets=self._assets)
        if self._state.rank == 0:
            for older in self._folder.glob(f"step_*/{WEIGHTS}"):
                if older != folder:
                    shutil.rmtree(older)

    @contextmanager
    def watch(self, timeout: float) -> Iterator[None]:
        """Around the training: a rank that has no memory left, or ranks that hang, leave what is known of the step.

        Args:
            timeout: seconds without a beat after which the ranks hang; 0 for never.

        Raises:
            TrainingError: there is no memory left.
        """
        watching = Watchdog(timeout, before_end=self._hang) if timeout else nullcontext()
        with watching as self._watchdog:
            try:
                yield
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                where = self.write(f"out of memory: {error}")
                raise TrainingError(
                    f"step {self._step}: rank {self._state.rank} is out of memory with {self._had()}; set "
                    f"data.max_seq_len or train.micro_batch_size lower, or train.enable_gradient_checkpointing to true "
                    f"({where} says what was in the step)"
                ) from error

    def _had(self) -> str:
        batches = self._facts.get("micro_batches", [])
        return f"{sum(b['tokens'] for b in batches):,} tokens in {len(batches)} micro-batches"

    def _hang(self, sentence: str) -> None:
        self.write(f"hang: {sentence}")


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators, of the host and of a device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put generators into the states that `random_states` gave; on another kind of device that one stays as it is."""
    torch.set_rng_state(states["cpu"])
    if "device" in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a device or of the host, did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def read_boxes(run: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank has left of each step that went wrong, by the step."""
    boxes: dict[int, list[dict[str, Any]]] = {}
    for folder in (run / FOLDER).glob("step_*"):
        files = sorted(folder.glob("rank_*.json"))
        if files:
            boxes[int(folder.name.removeprefix("step_"))] = [json.loads(f.read_text(encoding="utf-8")) for f in files]
    return dict(sorted(boxes.items()))


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether it is of another class of tensors, which is not for parts on ranks."""
    return hasattr(parameter, "__tensor_flatten__") and not isinstance(parameter, DTensor)
