from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from veomni_models import build_omni_model, initialize_weights

PARTS = {
    "foundation": {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 3,
        "tie_word_embeddings": False,
    },
    "encoders": {
        "image": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 2,
            "merge_size": 2,
        }
    },
    "vocab_size": 41,  # no multiple of the number of ranks
    "image_token_id": 5,
}


def weights_of_a_sharded_model(seed: int) -> dict[str, torch.Tensor]:
    model = build_omni_model(**PARTS)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in [*model.foundation.model.layers, *model.encoders["image"].encoder.layers]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    initialize_weights(model, seed, "cpu")
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    return whole | {name: b.clone() for name, b in model.named_buffers()}


def test_one_and_two_ranks_draw_the_same_weights(two_ranks: Ranks) -> None:
    model = build_omni_model(**PARTS, init_device="cpu", seed=7)
    alone = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for sharded in two_ranks.run(weights_of_a_sharded_model, 7):
        assert sharded.keys() == alone.keys()
        assert [name for name in alone if not torch.equal(alone[name], sharded[name])] == []


def test_the_weights_are_those_that_transformers_draws_itself() -> None:
    ours = build_omni_model(**PARTS, init_device="cpu", seed=7).foundation
    with torch.device("meta"):
        plain = type(ours)(ours.config)
    plain.to_empty(device="cpu")
    torch.manual_seed(7)
    plain.initialize_weights()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True))
    assert torch.equal(ours.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert ours.model.embed_tokens.weight[3].abs().max() == 0  # the padding token's row


def test_another_seed_gives_other_weights_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    a, b = (build_omni_model(**PARTS, init_device="cpu", seed=s) for s in (1, 2))
    assert not torch.equal(a.foundation.lm_head.weight, b.foundation.lm_head.weight)
    assert torch.equal(state, torch.get_rng_state())


def test_a_meta_model_without_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match="say on which device"):
        initialize_weights(build_omni_model(**PARTS), 0)
