"""Omni models that hear sounds and watch videos over ranks: as one process that runs each sample alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from veomni_data import PackingCollator
from veomni_models import OmniModel, OmniProcessor
from veomni_parallel import build_parallelize_model, init_parallel_state, leak_probe

from tests.models.omni_parts import PICTURES, SOUNDS, assemble, clip, picture, sample, sound
from tests.parallel.parity import gradients_of, worst

SIGLIP = {"model_type": "siglip_vision_model", **PICTURES["siglip_vision_model"]}
QWEN = {"model_type": "qwen2_5_vl_vision", **PICTURES["qwen2_5_vl_vision"]}
ENCODERS: dict[str, dict[str, Any]] = {
    "frames and log-mel": {
        "image": SIGLIP,
        "video": {"share": "image"},
        "audio": {"model_type": "whisper", **SOUNDS["whisper"]},
    },
    "patches and waves": {
        "image": QWEN,
        "video": {"share": "image"},
        "audio": {"model_type": "wav2vec2", **SOUNDS["wav2vec2"]},
    },
    "video of its own": {
        "video": SIGLIP,
        "audio": {
            "model_type": "hubert",
            **SOUNDS["hubert"],
            "projector": {"type": "perceiver", "num_tokens": 3, "num_heads": 4},
        },
    },
}


def build(name: str) -> tuple[OmniModel, OmniProcessor]:
    with tempfile.TemporaryDirectory() as folder:
        return assemble(ENCODERS[name], Path(folder))


def samples(processor: OmniProcessor, takes: str) -> list[dict[str, torch.Tensor]]:
    """Six samples; with two data-parallel ranks the first has no sound and the second no picture."""
    media: list[tuple[str, dict[str, Any]]] = [
        ("this <video> is one", {"videos": [clip(3, 16, 16)]}),
        ("<audio> is what <audio>", {"audio": [sound(9_000), sound(15_000, 1)]}),
        ("<video> two <video> three", {"videos": [clip(2, 24, 16, 1), clip(4, 16, 16, 2)]}),
        ("one two three two one", {}),
        ("<image> is one <image>", {"images": [picture(16, 24), picture(30, 12, 1)]}),
        ("sound <audio>", {"audio": [sound(5_600, 2)]}),
    ]
    out = []
    for text, items in media:
        for kind, key in (("image", "images"), ("video", "videos"), ("audio", "audio")):
            if key in items and (kind not in takes.split() or getattr(processor, f"{kind}_token") is None):
                text, items = text.replace(f"<{kind}>", "picture"), {}
        frames = {"do_sample_frames": False} if "videos" in items else {}
        out.append(sample(processor, text, **items, **frames))
    return out


def step(name: str, mode: str, ulysses: int, takes: str) -> tuple[float, dict[str, torch.Tensor]]:
    state = init_parallel_state(ulysses=ulysses, device_type="cpu")
    model, processor = build(name)
    data = samples(processor, takes)
    model = build_parallelize_model(model, state, mode=mode)
    row = PackingCollator()(data[state.dp.get_local_rank() :: state.dp.size()])
    labels = row.pop("shift_labels")
    del row["labels"]
    targets = labels.tensor_split(state.sp.size(), dim=1)[state.sp.get_local_rank()]
    loss = torch.nn.functional.cross_entropy(model(**row).logits[0], targets[0], reduction="sum") / 50
    (loss * state.loss.size()).backward()
    summed = loss.detach().clone()
    dist.all_reduce(summed)
    gradients = gradients_of(model)
    return summed.item(), gradients if state.rank == 0 else {}


CASES = [
    pytest.param(
        name,
        takes,
        mode,
        ulysses,
        id=f"{name}, {takes}, {mode}, ulysses {ulysses}",
        # a row without some modality matters to sharded towers; the rest of the table is for the long run
        marks=() if takes.startswith("image") == (ulysses == 2) and mode == "fsdp2" else pytest.mark.slow,
    )
    for name in ENCODERS
    for takes in ("image video audio", "audio", "video")
    for mode, ulysses in (("fsdp2", 1), ("fsdp2", 2), ("ddp", 2))
]


@pytest.mark.parametrize(("name", "takes", "mode", "ulysses"), CASES)
def test_two_ranks_are_one_process_with_each_sample_alone(
    name: str, takes: str, mode: str, ulysses: int, two_ranks: Ranks
) -> None:
    loss, gradients = two_ranks.run(step, name, mode, ulysses, takes)[0]
    model, processor = build(name)
    expected = 0.0
    for one in samples(processor, takes):
        row = PackingCollator(cu_seq_lens=False)([one])
        labels = row.pop("shift_labels")
        del row["labels"]
        alone = torch.nn.functional.cross_entropy(model(**row).logits[0], labels[0], reduction="sum") / 50
        alone.backward()
        expected += alone.item()
    assert loss == pytest.approx(expected, rel=1e-5)
    reference = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    difference, where = worst(gradients, reference)
    assert difference <= 2e-5, f"{where} is off by {difference:.1e}"


@pytest.mark.parametrize("name", ENCODERS)
def test_a_row_with_sounds_and_videos_does_not_leak(name: str) -> None:
    model, processor = build(name)
    model = build_parallelize_model(model, init_parallel_state())
    row = PackingCollator()(samples(processor, "image video audio"))
    del row["shift_labels"], row["labels"]
    assert leak_probe(model, row).same_bits
