from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from veomni_parallel import (
    MixedPrecision,
    ParallelPlan,
    build_parallelize_model,
    clip_grad_norm_,
    init_parallel_state,
    resolve_sizes,
)
from veomni_parallel.plan import find_frozen_units, find_shard_units

from tests.parallel.parity import Omni, Stranger, build, gradients_of, pack, samples


def test_units_are_the_blocks_that_a_model_declares_also_inside_an_assembled_one() -> None:
    assert list(find_shard_units(build("llama"), ParallelPlan())) == ["model.layers.0", "model.layers.1"]
    assert list(find_shard_units(Omni(), ParallelPlan())) == ["foundation.model.layers.0", "foundation.model.layers.1"]


def test_units_of_an_unknown_model_are_its_repeated_blocks() -> None:
    assert list(find_shard_units(Stranger(), ParallelPlan())) == ["blocks.0", "blocks.1"]


def test_repeated_blocks_are_found_in_a_sequential_and_before_lists_of_single_layers() -> None:
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)])
    assert list(find_shard_units(blocks, ParallelPlan())) == ["0", "1", "2"]
    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "body": blocks})
    assert list(find_shard_units(model, ParallelPlan())) == ["body.0", "body.1", "body.2"]


def test_frozen_parts_are_those_that_are_frozen_as_a_whole_outside_of_units() -> None:
    model = Omni()
    assert find_frozen_units(model, find_shard_units(model, ParallelPlan())) == {}
    tower = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.encoder = nn.ModuleDict({"tower": tower, "head": nn.Linear(8, 8)})
    for part in (model.encoder, model.projector, model.foundation.model.norm):
        part.requires_grad_(False)
    units = find_shard_units(model, ParallelPlan())
    # a dictionary has no forward of its own, and a leaf stays with its surroundings
    assert list(find_frozen_units(model, units)) == ["encoder.tower"]
    tower[0].weight = model.projector.weight
    assert find_frozen_units(model, units) == {}, "a parameter that is used elsewhere stays with the rest"


def test_units_can_be_named() -> None:
    assert list(find_shard_units(Omni(), ParallelPlan(shard_units=["Qwen3MLP"]))) == [
        "foundation.model.layers.0.mlp",
        "foundation.model.layers.1.mlp",
    ]
    assert find_shard_units(Omni(), ParallelPlan(shard_units=[])) == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "fsdp3"}, "mode='fsdp3' is none of"),
        ({"activation_checkpointing": "half"}, "activation_checkpointing='half' is none of"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8' is none of"),
        (
            {"plan": ParallelPlan(shard_units=["LlamaBlock"])},
            r"shard_units names \['LlamaBlock'\], but LlamaForCausalLM",
        ),
        ({"plan": ParallelPlan(no_shard=["towers.*"])}, r"no_shard: 'towers\.\*' matches no module"),
        ({"mode": "fsdp1", "plan": ParallelPlan(no_shard=["model.norm"])}, 'no_shard is for mode="fsdp2"'),
        ({"mode": "ddp", "cpu_offload": True}, "DDP keeps every parameter on the device"),
    ],
)
def test_a_wrong_option_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_parallelize_model(build("llama"), init_parallel_state(device_type="cpu"), **options)


def test_a_state_of_another_world_is_refused() -> None:
    state = replace(init_parallel_state(device_type="cpu"), sizes=resolve_sizes(8))
    with pytest.raises(
        ValueError, match="built for 8 ranks, but there are 1: call init_parallel_state in this process"
    ):
        build_parallelize_model(build("llama"), state)


@pytest.mark.parametrize("mode", ["ddp", "fsdp1"])
def test_ddp_and_fsdp1_refuse_a_model_without_weights(mode: Any) -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=rf'mode="{mode}" needs a model with weights, but 2 parameters .* is weight'):
        build_parallelize_model(model, init_parallel_state(device_type="cpu"), mode=mode)


def test_one_process_gets_its_own_model_back() -> None:
    model = build("llama")
    assert build_parallelize_model(model, init_parallel_state(device_type="cpu")) is model


def wrapped_twice(mode: Any) -> list[str]:
    state = init_parallel_state(device_type="cpu")
    model = build_parallelize_model(build("llama"), state, mode=mode)
    messages = []
    for wrapped in (model, nn.Sequential(model)):
        try:
            build_parallelize_model(wrapped, state, mode=mode)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_a_wrapped_model_is_refused(mode: str, two_ranks: Ranks) -> None:
    for whole, inside in two_ranks.run(wrapped_twice, mode):
        assert whole.startswith("The model is wrapped already")
        assert inside.startswith("0 in it is wrapped already")


def frozen(mode: Any) -> dict[str, Any]:
    state = init_parallel_state(device_type="cpu")
    model = build("llama")
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "layers.0.mlp" in name or "embed" in name:
            parameter.requires_grad_(False)
    model = build_parallelize_model(model, state, mode=mode)
    model(**pack(samples()), num_items_in_batch=10).loss.backward()
    return gradients_of(model)


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_frozen_parameters_lie_beside_trainable_ones(mode: str, two_ranks: Ranks) -> None:
    model = build("llama")
    model(**pack(samples()), num_items_in_batch=10).loss.backward()
    got = two_ranks.run(frozen, mode)[0]
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "layers.0.mlp" in name or "embed" in name:
            assert name not in got or not got[name].any()
        else:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4)


class Autoencoder(nn.Module):
    """Is called by methods that are not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x)


class Latents(nn.Module):
    """A frozen autoencoder before a trainable part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vae, self.body = Autoencoder().requires_grad_(False), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.vae.encode(x))


def latents(mode: Any, cpu_offload: bool) -> dict[str, Any]:
    state = init_parallel_state(device_type="cpu")
    model = build_parallelize_model(Latents(), state, mode=mode, cpu_offload=cpu_offload)
    for _ in range(2):
        model(torch.ones(2, 4)).square().sum().backward()
    norm = clip_grad_norm_(model, 1e9, state)
    units = sum(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in model.modules())
    return {"gradients": gradients_of(model), "units": units, "norm": norm}


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize("mode", ["fsdp1", "fsdp2"])
def test_a_frozen_autoencoder_may_be_called_by_a_method(mode: str, cpu_offload: bool, two_ranks: Ranks) -> None:
    model = Latents()
    for _ in range(2):
        model(torch.ones(2, 4)).square().sum().backward()
    for got in two_ranks.run(latents, mode, cpu_offload):
        assert got["units"] == (4 if mode == "fsdp2" else 3), "two layers, the autoencoder, the root"
        torch.testing.assert_close(got["gradients"]["body.weight"], model.body.weight.grad)
        expected = torch.stack([p.grad.norm() for p in model.body.parameters()]).norm()
        torch.testing.assert_close(got["norm"], expected)


class Branching(nn.Module):
    """Only rank 0 uses `sometimes`, nobody uses `never`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes, self.never = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.always(x)
        return self.sometimes(x) if dist.get_rank() == 0 else x


def branching(mode: Any) -> dict[str, torch.Tensor]:
    model = build_parallelize_model(Branching(), init_parallel_state(device_type="cpu"), mode=mode)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
    return gradients_of(model)


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_a_parameter_that_one_rank_does_not_use_is_still_reduced(mode: str, two_ranks: Ranks) -> None:
    got = two_ranks.run(branching, mode)
    for gradients in got:
        torch.testing.assert_close(gradients["sometimes.bias"], torch.ones(3))  # two steps, mean over two ranks
        assert torch.equal(gradients["sometimes.weight"], got[0]["sometimes.weight"])
        assert "never.bias" not in gradients or not gradients["never.bias"].any()


def from_meta(name: str) -> dict[str, Any]:
    import transformers
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state, whole = init_parallel_state(device_type="cpu"), build(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(whole.config)
    model = build_parallelize_model(model, state)
    model.to_empty(device="cpu")
    set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
    for buffer_name, buffer in whole.named_buffers():
        model.get_buffer(buffer_name).copy_(buffer)
    batch = pack(samples())
    losses = [m(**batch, num_items_in_batch=10).loss for m in (model, whole)]
    for loss in losses:
        loss.backward()
    with torch.no_grad():
        model(**batch)
    return {
        "losses": [loss.item() for loss in losses],
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "sharded": all(hasattr(p, "full_tensor") for p in model.parameters()),
        "units": sum(isinstance(m, FSDPModule) for m in model.modules()),
        "grad": model.model.embed_tokens.weight.grad.full_tensor(),
        "expected_grad": whole.model.embed_tokens.weight.grad,
    }


@pytest.mark.parametrize(("name", "tied"), [("qwen3", True), ("llama", False)])
def test_a_meta_model_is_sharded_then_filled_and_stays_tied(name: str, tied: bool, two_ranks: Ranks) -> None:
    for got in two_ranks.run(from_meta, name):
        assert got["losses"][0] == pytest.approx(got["losses"][1], rel=1e-6)
        assert got["tied"] is tied
        assert got["units"] == 3
        assert got["sharded"], "after a forward without backward, parameters are not sharded"
        torch.testing.assert_close(got["grad"], got["expected_grad"], rtol=1e-4, atol=1e-4)


def half_precision(mode: Any, precision: Any) -> dict[str, Any]:
    state, seen = init_parallel_state(device_type="cpu"), set()
    model = build("llama")
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    model = build_parallelize_model(model, state, mode=mode, mixed_precision=precision)
    loss = model(**pack(samples()), num_items_in_batch=57).loss
    loss.backward()
    kept = {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters() if p.grad is not None}
    return {"loss": loss.item(), "computed": seen, "kept": kept}


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("precision", ["bf16", MixedPrecision(torch.bfloat16, torch.bfloat16)], ids=["bf16", "custom"])
def test_bf16_computes_in_bf16_and_keeps_float32(mode: str, precision: Any, two_ranks: Ranks) -> None:
    expected = build("llama")(**pack(samples()), num_items_in_batch=57).loss.item()
    for got in two_ranks.run(half_precision, mode, precision):
        assert got["computed"] == {torch.bfloat16}
        assert got["kept"] == {torch.float32}
        assert got["loss"] == pytest.approx(expected, rel=0.03)


def test_one_process_computes_in_bf16_too() -> None:
    got = half_precision("fsdp2", "bf16")
    assert (got["computed"], got["kept"]) == ({torch.bfloat16}, {torch.float32})


def test_recomputation_refuses_a_cache_that_it_would_fill_twice() -> None:
    model = build("llama", use_cache=True)
    model = build_parallelize_model(model, init_parallel_state(device_type="cpu"), activation_checkpointing="full")
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer is recomputed .* use_cache=False"):
        model(torch.tensor([[1, 2]]))


def test_recomputation_keeps_only_the_inputs_of_a_block() -> None:
    kept = []
    for option in (None, "full"):
        model = build_parallelize_model(
            build("llama"), init_parallel_state(device_type="cpu"), activation_checkpointing=option
        )
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            model(torch.arange(1, 33)[None])
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2
