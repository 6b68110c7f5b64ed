"""Steps that go wrong, each caused for real: what the run does about them, and what it leaves to find out why."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import veomni_data.pipeline
from ranks import Ranks
from safetensors.torch import load_file, save_file
from veomni_config import TrainConfig
from veomni_data import encode_multimodal_sample, read_ledger
from veomni_parallel import init_parallel_state
from veomni_recipes.black_box import BlackBox, read_boxes
from veomni_recipes.cli import main as command
from veomni_recipes.errors import TrainingError
from veomni_recipes.guard import Guard
from veomni_recipes.replay import replay_step
from veomni_recipes.run_folder import read_metrics
from veomni_recipes.tasks.omni import train_omni_model

from tests.recipes.text_run import prepare, train

pytestmark = pytest.mark.alone


class Notes:
    """Stands for a black box."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.weights = 0

    def write(self, reason: str, **facts: Any) -> Path:
        self.written.append(reason)
        return Path("run/black_box/step_9")

    def write_weights(self) -> None:
        self.weights += 1


def guard(**keys: Any) -> tuple[Guard, Notes]:
    notes = Notes()
    return Guard(TrainConfig(output_dir=Path("run"), **keys), notes), notes  # type: ignore[arg-type]


def allows(judge: Guard, loss: float, norm: float = 1.0) -> bool:
    return judge.allows(9, torch.tensor(loss), torch.tensor(norm))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_what_is_not_finite_stops_skips_or_is_ignored(loss: float, norm: float) -> None:
    judge, notes = guard()
    with pytest.raises(TrainingError, match=r"step 9 is not applied and the run ends: its .* is .*(nan|inf); run/bl"):
        allows(judge, loss, norm)
    judge, notes = guard(bad_step="skip", max_bad_steps=3)
    assert [allows(judge, *pair) for pair in [(1, 1), (loss, norm), (loss, norm), (1, 1), (loss, norm)]] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert (len(notes.written), notes.weights) == (3, 2)  # the second in a row has the weights of the first
    allows(judge, loss, norm)
    with pytest.raises(TrainingError, match=r"step 9 is the 3th bad one in a row \(train.max_bad_steps\)"):
        allows(judge, loss, norm)
    judge, notes = guard(bad_step="ignore")
    assert judge.allows(9, torch.empty((), device="meta"), torch.empty((), device="meta"))  # reads nothing
    assert not notes.written


def test_a_spike_is_one_by_the_rule_and_does_not_count_among_the_good_steps() -> None:
    judge, notes = guard(bad_step="skip", spike_sigma=3.0, spike_window=8)
    good = [2.0, 2.2, 1.8, 2.0]
    assert all(allows(judge, loss) for loss in [9.0 * good[0], *good[1:]][:3])  # too few to judge by
    judge, notes = guard(bad_step="skip", spike_sigma=3.0, spike_window=8)
    assert all(allows(judge, loss) for loss in good)
    limit = 2.0 + 3 * math.sqrt((0 + 0.04 + 0.04 + 0) / 4)
    assert allows(judge, limit - 0.01)
    assert not allows(judge, 10.0)
    assert not allows(judge, 10.0)  # as the first is not among the good ones
    assert not allows(judge, 2.0, norm=5.0)
    assert "loss of 10 is a spike, above" in notes.written[0]
    assert "gradient norm of 5 is a spike" in notes.written[2]
    other, _ = guard(bad_step="skip", spike_sigma=3.0, spike_window=8)
    other.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    assert not allows(other, 10.0)
    assert allows(other, 2.0)


def poison(folder: Path) -> str:
    """Put a NaN into a weight of the model's folder; returns the weight's name."""
    file, name = folder / "model" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][3, 5] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def ends(arguments: list[str]) -> Any:
    """The exit code of a run of the text recipe."""
    try:
        train(arguments)
    except SystemExit as ended:
        return ended.code
    return 0


def test_a_weight_that_is_nan_stops_two_ranks_and_a_replay_on_one_names_it(
    tmp_path: Path, two_ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = prepare(tmp_path)
    name = poison(tmp_path)
    assert two_ranks.run(ends, arguments, timeout=200) == [2, 2]
    run = tmp_path / "run"
    assert not read_metrics(run)
    (boxes,) = read_boxes(run).values()
    assert [(box["rank"], box["step"], box["reason"]) for box in boxes] == [(i, 1, "its loss is nan") for i in (0, 1)]
    assert "2 ranks on cpu = 1 replicate x 2 shard" in boxes[0]["layout"]
    assert boxes[0]["samples"] != boxes[1]["samples"]
    for box in boxes:
        assert [len(places) for places in box["samples"]] == [b["samples"] for b in box["micro_batches"]]
    _, line = read_ledger(run).find(1, 0)
    assert [len(keys) for _, keys in line.rows] == [len(places) for places in boxes[0]["samples"]]
    made = replay_step(run)
    assert made.found == [
        f"1 NaN of 1,536 numbers in the weight {name}",
        made.found[1],
    ]
    assert made.found[1].endswith("numbers in the output of model.layers.1.mlp.up_proj (Linear)")
    assert {(s.rank, s.place) for s in made.samples} == {
        (box["rank"], place) for box in boxes for places in box["samples"] for place in places
    }
    assert all(math.isnan(sample.loss) for sample in made.samples)
    capsys.readouterr()
    assert command(["replay", str(run), "--step", "1"]) == 0
    said = capsys.readouterr().out
    assert f"not finite, in the order of computing:\n  {made.found[0]}\n  {made.found[1]}\n" in said
    assert "train.jsonl:" in said
    assert command(["replay", str(run), "--step", "7"]) == 2
    assert capsys.readouterr().err == f"{run} has no black_box of step 7: there is 1\n"


POISONED = 11  # a row of the data


def with_a_bad_picture(row: Any, **kwargs: Any) -> Any:
    """The sample of a row; one has a picture with a pixel that is no number."""
    sample = encode_multimodal_sample(row, **kwargs)
    if str(row.place).endswith(f"train.jsonl:{POISONED}"):
        sample["pixel_values"] = sample["pixel_values"].clone()
        sample["pixel_values"].view(-1)[7] = math.nan
    return sample


def test_a_step_with_a_broken_picture_is_skipped_and_a_replay_names_sample_picture_and_module(
    arguments: list[str], digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (digits_folder / "train.jsonl").read_text().splitlines()[:40]
    data = digits_folder / f"{tmp_path.name}-train.jsonl"
    data.write_text("\n".join(few) + "\n")
    monkeypatch.setattr(train_omni_model, "encode_multimodal_sample", with_a_bad_picture)
    monkeypatch.setattr(veomni_data.pipeline, "encode_multimodal_sample", with_a_bad_picture)
    run = tmp_path / "run"
    changes = [f"--data.train_path={data}", f"--train.output_dir={run}", "--train.bad_step=skip"]
    small = ["--train.max_steps=3", "--train.num_train_epochs=2", "--data.train_size=2000", "--data.max_seq_len=128"]
    train_omni_model.main([*arguments, *changes, *small, "--train.save_steps=1"])
    boxes = read_boxes(run)
    lines = {line["step"]: line["loss"] for line in read_metrics(run)}
    assert boxes
    assert [step for step, loss in lines.items() if math.isnan(loss)] == [*boxes]
    assert len(lines) > len(boxes)
    for step in boxes:
        made = replay_step(run, step)
        bad = [sample for sample in made.samples if math.isnan(sample.loss)]
        assert [sample.place for sample in bad] == [f"{data}:{POISONED}"]
        assert bad[0].notes == ["pixel_values"]
        assert len(made.found) == 2
        assert made.found[0].startswith("1 NaN of ")
        assert made.found[0].endswith("in pixel_values of the batch")
        assert made.found[1].endswith("in the output of encoders.image.embeddings.patch_embedding (Conv2d)")
        assert made.weights.startswith("those of the step") == (step == max(boxes))
        finite = [sample for sample in made.samples if sample is not bad[0]]
        assert all(0 < sample.loss < 20 for sample in finite)


@pytest.mark.parametrize(("architecture", "rate"), [("full", "10"), ("lora", "0.1")])
def test_the_losses_of_a_replay_are_those_of_the_step(architecture: str, rate: str, tmp_path: Path) -> None:
    """A spike is finite: what its replay on one device says is what the run has seen."""
    arguments = [*prepare(tmp_path), f"--train.train_architecture={architecture}"]
    assert ends([*arguments, "--train.spike_sigma=1e-9", "--train.spike_window=4", f"--train.lr={rate}"]) == 2
    run = tmp_path / "run"
    (boxes,) = read_boxes(run).values()
    made = replay_step(run)
    assert "spike" in made.reason
    assert not made.found
    assert sum(made.losses.values()) == pytest.approx(boxes[0]["loss"], rel=1e-5)
    alone = sum(sample.loss * sample.targets for sample in made.samples)
    assert alone / sum(sample.targets for sample in made.samples) == pytest.approx(boxes[0]["loss"], rel=1e-5)


def test_a_replay_of_quantised_layers_takes_a_checkpoint(tmp_path: Path) -> None:
    arguments = prepare(tmp_path)
    arguments += ["--train.train_architecture=lora", "--model.quantize_frozen=8", "--train.data_parallel_mode=ddp"]
    arguments += ["--train.init_device=cpu", "--train.save_steps=1", "--train.lr=0.1"]
    assert ends([*arguments, "--train.spike_sigma=1e-9", "--train.spike_window=4"]) == 2
    (boxes,) = read_boxes(tmp_path / "run").values()
    made = replay_step(tmp_path / "run")
    assert made.weights.startswith(f"those of the checkpoint of step {made.step - 1}")
    assert sum(made.losses.values()) == pytest.approx(boxes[0]["loss"], rel=1e-5)


class Loader:
    """Stands for the loader of a run."""

    def given_places(self) -> list[list[str]]:
        return [["a.jsonl:1"]]

    def write_ledger(self) -> None:
        return


def black_box(folder: Path, **config: Any) -> BlackBox:
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(save_pretrained=lambda folder: None)  # type: ignore[assignment]
    return BlackBox(folder, Loader(), init_parallel_state(device_type="cpu"), model)  # type: ignore[arg-type]


BATCH = {"input_ids": torch.zeros(1, 5, dtype=torch.int64), "shift_labels": torch.zeros(1, 5, dtype=torch.int64)}
BATCH |= {"cu_seq_lens_q": torch.tensor([0, 5])}


def step_that_needs_too_much(box: BlackBox) -> None:
    with box.watch(0):
        box.begin(3, [BATCH])
        torch.empty(1 << 60)


def test_a_step_without_enough_memory_says_what_it_held(tmp_path: Path) -> None:
    box = black_box(tmp_path)
    with pytest.raises(TrainingError, match=r"step 3: rank 0 is out of memory with 5 tokens in 1 micro-batches; set"):
        step_that_needs_too_much(box)
    ((written,),) = read_boxes(tmp_path).values()
    assert "out of memory" in written["reason"]
    assert written["samples"] == [["a.jsonl:1"]]
    with pytest.raises(RuntimeError, match="another"), box.watch(0):
        raise RuntimeError("another")


HANG = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.distributed as dist
from veomni_parallel import init_parallel_state
from veomni_recipes.black_box import BlackBox

dist.init_process_group("gloo")
loader = SimpleNamespace(given_places=lambda: [["a.jsonl:1"]], write_ledger=lambda: None)
model = torch.nn.Linear(1, 1)
model.config = SimpleNamespace(save_pretrained=lambda folder: None)
box = BlackBox(Path(sys.argv[1]), loader, init_parallel_state(device_type="cpu"), model)
numbers = torch.zeros(1, 5, dtype=torch.int64)
with box.watch(3):
    for step in range(1, 100):
        box.begin(step, [{"input_ids": numbers, "shift_labels": numbers, "cu_seq_lens_q": torch.tensor([0, 5])}])
        if step == 4 and dist.get_rank() == 1:
            time.sleep(1000)
        dist.barrier()
"""


@pytest.mark.timeout(300)
def test_ranks_that_hang_leave_what_each_knows_of_its_step(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(2):
        own = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in own.items()}
        program = [sys.executable, "-c", HANG, str(tmp_path)]
        ranks.append(subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [rank.communicate(timeout=250)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert "No rank has made progress for 3 s: rank 1 in step 4, at" in said[0]
    (boxes,) = read_boxes(tmp_path).values()
    assert [(box["rank"], box["step"]) for box in boxes] == [(0, 4), (1, 4)]
    assert all("hang: No rank has made progress" in box["reason"] for box in boxes)
