"""One run goes on in another layout: parameters and optimizer state stay the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from veomni_ckpt import CheckpointManager
from veomni_parallel import build_parallelize_model, init_parallel_state

from tests.parallel.mixtures import build, samples
from tests.parallel.parity import pack


def whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def go_on(folder: Path, read: int | None, write: int, sizes: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a step, or take one from the start; save it; what the model and its optimizer hold, whole."""
    state = init_parallel_state(**sizes, device_type="cpu")
    model: nn.Module = build_parallelize_model(build("qwen3_moe"), state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    manager = CheckpointManager(folder)
    if read is None:
        model(**pack(samples()[state.dp.get_local_rank() :: state.dp.size()]), num_items_in_batch=60).loss.backward()
        optimizer.step()
    else:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        assert manager.load(read, model, optimizer) == {"tokens": 7}
    manager.save(write, model, optimizer, {"tokens": 7})
    manager.close()
    weights = {name: whole(value).clone() for name, value in get_model_state_dict(model).items()}
    moments = get_optimizer_state_dict(model, optimizer)["state"]
    flat = {f"{name}.{key}": whole(value).clone() for name, own in moments.items() for key, value in own.items()}
    return weights, flat


def test_fsdp2_to_experts_on_ranks_to_one_process_to_divided_matrices(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path
) -> None:
    chain = [
        two_ranks.run(go_on, tmp_path, None, 1, {})[0],
        four_ranks.run(go_on, tmp_path, 1, 2, {"ep": 2})[0],
        go_on(tmp_path, 2, 3, {}),
        two_ranks.run(go_on, tmp_path, 3, 4, {"tp": 2})[0],
        four_ranks.run(go_on, tmp_path, 4, 5, {"ep": 2, "tp": 2})[0],
        four_ranks.run(go_on, tmp_path, 5, 6, {"dp_replicate": 2, "ulysses": 2})[0],
    ]
    weights, moments = chain[0]
    assert len(moments) == 3 * len(weights), "two moments and a step for each parameter"
    for other_weights, other_moments in chain[1:]:
        assert other_weights.keys() == weights.keys()
        assert other_moments.keys() == moments.keys()
        assert all(torch.equal(value, weights[name]) for name, value in other_weights.items())
        assert all(torch.equal(value, moments[name]) for name, value in other_moments.items())
