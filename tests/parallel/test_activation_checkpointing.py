from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from veomni_parallel import SelectiveCheckpointing, build_parallelize_model, init_parallel_state

from tests.parallel.mixtures import build, step, truth
from tests.parallel.parity import assert_true, pack, samples


@pytest.mark.parametrize("option", ["selective", 2, SelectiveCheckpointing(keep=("aten.mm",))], ids=str)
@pytest.mark.parametrize(("name", "sizes"), [("llama", {}), ("qwen3_moe", {"ep": 2}), ("qwen3", {"tp": 2})])
def test_whatever_is_recomputed_the_gradients_are_the_same(
    name: str, sizes: dict[str, int], option: Any, two_ranks: Ranks
) -> None:
    assert_true(truth(name), two_ranks.run(step, name, sizes, {"activation_checkpointing": option}))


def kept_and_calls(option: Any) -> tuple[int, list[int]]:
    """Numbers that autograd keeps, and how often each block runs in a forward and backward."""
    model = build("llama", num_hidden_layers=4)
    calls = [0] * 4
    for index, layer in enumerate(model.model.layers):

        def count(module: nn.Module, args: Any, index: int = index) -> None:
            calls[index] += 1

        layer.mlp.register_forward_pre_hook(count)
    model = build_parallelize_model(model, init_parallel_state(device_type="cpu"), activation_checkpointing=option)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        loss = model(**pack(samples()), num_items_in_batch=10).loss
    loss.backward()
    return sum(sizes), calls


def test_every_nth_block_is_recomputed() -> None:
    assert kept_and_calls(None)[1] == [1, 1, 1, 1]
    assert kept_and_calls(1)[1] == kept_and_calls("full")[1] == [2, 2, 2, 2]
    assert kept_and_calls(2)[1] == [2, 1, 2, 1]
    assert kept_and_calls(3)[1] == [2, 1, 1, 2]


def count_products(option: Any) -> int:
    """Matrix products of the backward pass of a model."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Products.seen += str(func).startswith(("aten.mm", "aten.addmm"))
            return func(*args, **(kwargs or {}))

    model = build_parallelize_model(
        build("llama"), init_parallel_state(device_type="cpu"), activation_checkpointing=option
    )
    loss = model(**pack(samples()), num_items_in_batch=10).loss
    with Products():
        loss.backward()
    return Products.seen


def test_selected_operators_are_not_computed_again() -> None:
    plain = count_products(None)
    assert count_products("selective") == plain
    # seven projections of each of two blocks; their last ones end the recomputation early and do not run again
    assert count_products("full") > plain + 10
    assert count_products(SelectiveCheckpointing(keep=("aten.exp",))) == count_products("full")


@pytest.mark.parametrize("option", [0, -1, True, "half", 1.5])
def test_anything_else_is_refused(option: Any) -> None:
    with pytest.raises(ValueError, match=r"activation_checkpointing=.* is none of None, \"full\", \"selective\""):
        build_parallelize_model(build("llama"), init_parallel_state(device_type="cpu"), activation_checkpointing=option)


def test_an_operator_that_torch_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.ops has no operator 'aten.matrix_product'"):
        build_parallelize_model(
            build("llama"),
            init_parallel_state(device_type="cpu"),
            activation_checkpointing=SelectiveCheckpointing(keep=("aten.matrix_product",)),
        )
