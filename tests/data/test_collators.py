from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM
from veomni_data import DataError, PackingCollator, PaddingCollator, slice_for_sequence_parallel

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
}


def sample(length: int, start: int = 1, **others: Any) -> dict[str, Any]:
    ids = torch.arange(start, start + length)
    labels = ids.clone()
    labels[: length // 3] = -100
    return {"input_ids": ids, "labels": labels, **others}


def test_a_packed_row_has_every_key_of_the_table() -> None:
    batch = PackingCollator()([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, sample(2, 8)])
    expected = {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, 6, 7, 8, 9]],
        "shift_labels": [[6, 7, -100, 9, -100]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
    }
    assert {key: value.tolist() for key, value in batch.items() if isinstance(value, torch.Tensor)} == expected
    assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "labels", "shift_labels", "position_ids"))
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert type(batch["max_length_q"]) is int


def test_a_padded_batch_has_every_key_of_the_table() -> None:
    batch = PaddingCollator(pad_token_id=3)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, sample(2, 8)])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 3]],
        "labels": [[-100, 6, 7], [8, 9, -100]],
        "shift_labels": [[6, 7, -100], [9, -100, -100]],
        "position_ids": [[0, 1, 2], [0, 1, 2]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("collate", [PackingCollator(), PaddingCollator()])
def test_modality_tensors_are_joined_in_the_order_of_the_samples(collate: Any) -> None:
    first, second = torch.rand(2, 3, 4), torch.rand(1, 3, 4)
    batch = collate([sample(3, pixel_values=first), sample(4), sample(2, pixel_values=second)])
    assert batch["pixel_values"].equal(torch.cat([first, second]))


@pytest.mark.parametrize("collate", [PackingCollator(9), PaddingCollator(9)])
def test_a_rank_that_has_run_dry_gets_a_row_without_a_target(collate: Any) -> None:
    batch = collate([])
    assert set(batch["input_ids"].unique().tolist()) == {9}
    assert (batch["labels"] == -100).all()
    assert (batch["shift_labels"] == -100).all()
    assert batch.keys() == collate([sample(3)]).keys()


@pytest.mark.parametrize("collate", [PackingCollator(), PaddingCollator()])
@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([{"input_ids": [1]}], 'a sample has no "labels" but only'),
        ([{"input_ids": [1, 2], "labels": [1]}], r'"labels" of a sample has shape \[1\]: .* each of the 2 input_ids'),
        ([sample(2, task="sum")], '"task" of a sample is a str'),
        (
            [sample(2, mm_token_type_ids=[0, 1]), sample(2, pixel_values=torch.zeros(1, 3))],
            'some samples of a micro-batch have "mm_token_type_ids"',
        ),
        (
            [sample(2, pixel_values=torch.zeros(1, 3)), sample(2, pixel_values=torch.zeros(1, 4))],
            r'"pixel_values" .* concatenated along dim 0: \[1, 3\] torch.float32, \[1, 4\]',
        ),
    ],
)
def test_samples_that_make_no_batch_are_refused_by_key(collate: Any, samples: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        collate(samples)


@pytest.mark.parametrize("key", ["mm_token_type_ids", "token_type_ids"])
def test_text_and_pictures_share_a_row(key: str) -> None:
    samples = [sample(2), sample(3, pixel_values=torch.ones(1, 4)) | {key: [0, 1, 1]}, sample(1)]
    assert PackingCollator()(samples)[key].tolist() == [[0, 0, 0, 1, 1, 0]]
    assert PaddingCollator()(samples)[key].tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral with a window"])
def test_packed_padded_and_separate_samples_give_the_same_loss(family: str) -> None:
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
        "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    }[family]().eval()
    samples = [sample(n, start) for n, start in ((9, 3), (17, 20), (1, 5), (6, 40))]
    targets = sum(int((s["labels"][1:] != -100).sum()) for s in samples)
    with torch.no_grad():
        truth = sum(
            model(input_ids=s["input_ids"][None], labels=s["labels"][None], num_items_in_batch=targets).loss
            for s in samples
            if len(s["input_ids"]) > 1
        )
        for collate in (PackingCollator(), PaddingCollator()):
            loss = model(**collate(samples), num_items_in_batch=targets, use_cache=False).loss
            assert abs(float(loss) - float(truth)) <= 1e-6 * float(truth)


def test_slices_join_to_the_padded_row_and_describe_the_whole() -> None:
    batch = PackingCollator()([sample(5), sample(3, 20), sample(4, 40)])
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    parts = [slice_for_sequence_parallel(batch, rank, 5, pad_token_id=7) for rank in range(5)]
    keys = ("input_ids", "labels", "shift_labels", "position_ids")
    joined = {key: torch.cat([part[key] for part in parts], dim=-1)[0].tolist() for key in keys}
    assert joined["input_ids"] == [*batch["input_ids"][0].tolist(), 7, 7, 7]
    assert joined["labels"] == [*batch["labels"][0].tolist(), -100, -100, -100]
    assert joined["shift_labels"] == [*batch["shift_labels"][0].tolist(), -100, -100, -100]
    assert joined["position_ids"] == [*batch["position_ids"][0].tolist(), 0, 1, 2]
    for part in parts:
        assert part["cu_seq_lens_q"].tolist() == part["cu_seq_lens_k"].tolist() == [0, 5, 8, 12, 15]
        assert part["cu_seq_lens_q"].dtype == torch.int32
        assert part["max_length_q"] == part["max_length_k"] == 5
    assert all(torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(before[key])) for key in before)


def test_a_row_with_pictures_stays_whole_but_for_its_targets() -> None:
    pixels = torch.rand(2, 3)
    batch = PackingCollator()([sample(5, pixel_values=pixels, mm_token_type_ids=[0, 1, 1, 0, 0])])
    parts = [slice_for_sequence_parallel(batch, rank, 2) for rank in range(2)]
    for part in parts:
        assert part["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0]]
        assert part["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0]]
        assert part["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0]]
        assert part["pixel_values"].equal(pixels)
    assert torch.cat([part["shift_labels"] for part in parts], -1).tolist() == [[2, 3, 4, 5, -100, -100]]
    assert [part["labels"].shape for part in parts] == [(1, 3), (1, 3)]


def test_positions_of_three_axes_are_padded_and_sliced_along_the_row() -> None:
    batch = PackingCollator()([sample(5)])
    batch["position_ids"] = torch.arange(15).reshape(3, 1, 5)
    parts = [slice_for_sequence_parallel(batch, rank, 2)["position_ids"] for rank in range(2)]
    whole = torch.cat(parts, -1)
    assert whole[..., :5].equal(batch["position_ids"])
    assert whole[..., 5].flatten().tolist() == [0, 0, 0]


def test_one_rank_keeps_the_batch_as_it_is() -> None:
    batch = PackingCollator()([sample(5)])
    assert slice_for_sequence_parallel(batch, 0, 1) is batch


def test_what_cannot_be_sliced_is_refused() -> None:
    padded = PaddingCollator()([sample(5), sample(3)])
    with pytest.raises(ValueError, match=r"padded batch of shape \[2, 5\] cannot be sliced over 2"):
        slice_for_sequence_parallel(padded, 0, 2)
    with pytest.raises(ValueError, match="rank=2 is not one of the 2 ranks"):
        slice_for_sequence_parallel(PackingCollator()([sample(5)]), 2, 2)


def test_positions_of_samples_are_joined_along_the_row() -> None:
    own = {"position_ids": torch.tensor([4, 5, 9])}
    batch = PackingCollator()([sample(3, **own), sample(2)])
    assert batch["position_ids"].tolist() == [[4, 5, 9, 0, 1]]
    padded = PaddingCollator()([sample(3, **own), sample(2)])
    assert padded["position_ids"].tolist() == [[4, 5, 9], [0, 1, 0]]


def test_a_packed_row_with_positions_of_three_axes_has_those_that_tell_its_samples_apart_first() -> None:
    axes = [[0, 1, 1], [0, 1, 2], [0, 2, 1]]
    samples = [sample(2), sample(3, position_ids=torch.tensor(axes))]
    batch = PackingCollator()(samples)
    assert batch["position_ids"].shape == (4, 1, 5)
    assert batch["position_ids"][:, 0].tolist() == [[0, 1, 0, 1, 2], *([0, 1, *axis] for axis in axes)]
    bare = PackingCollator(text_positions=False)(samples)
    assert bare["position_ids"].equal(batch["position_ids"][1:])
    assert "cu_seq_lens_q" in bare
    again = PackingCollator()([sample(5, position_ids=batch["position_ids"][:, 0], seq_lens=[2, 3])])
    assert again["position_ids"].equal(batch["position_ids"])


def test_positions_between_two_whole_ones_stay_what_they_are() -> None:
    positions = torch.tensor([[0, 1, 1 + 50 / 3], [0, 1, 1], [0, 1, 1]])
    samples = [sample(2), sample(3, position_ids=positions)]
    row, padded = PackingCollator()(samples)["position_ids"], PaddingCollator()(samples)["position_ids"]
    assert row[1:, 0, 2:].equal(positions)
    assert row[0, 0].tolist() == [0, 1, 0, 1, 2]
    assert padded[:, 1].equal(positions)


def test_padded_rows_have_positions_of_three_axes() -> None:
    positions = torch.arange(9).reshape(3, 3)
    batch = PaddingCollator()([sample(2), sample(3, position_ids=positions)])
    assert batch["position_ids"].shape == (3, 2, 3)
    assert batch["position_ids"][:, 1].equal(positions)
    assert batch["position_ids"][:, 0].tolist() == [[0, 1, 0]] * 3


def test_positions_that_are_not_one_for_each_token_are_refused() -> None:
    for shape in ((2, 4), (3,), (1, 4)):
        with pytest.raises(DataError, match=r'"position_ids" of a sample has shape .* 4 input_ids, or \[3, T\]'):
            PackingCollator()([sample(4, position_ids=torch.zeros(shape))])


def test_a_row_that_was_packed_before_is_the_row_of_its_samples() -> None:
    parts = [sample(3), sample(2, 8), sample(4, 20)]
    row = {
        "input_ids": torch.cat([s["input_ids"] for s in parts[:2]]),
        "labels": torch.cat([s["labels"] for s in parts[:2]]),
        "seq_lens": [3, 2],
    }
    whole, again = PackingCollator()(parts), PackingCollator()([row, parts[2]])
    assert whole.keys() == again.keys()
    assert all(torch.equal(torch.as_tensor(again[key]), torch.as_tensor(value)) for key, value in whole.items())


def test_a_row_that_was_packed_before_cannot_be_padded() -> None:
    with pytest.raises(DataError, match=r"a sample is a row of 2 already .* PackingCollator"):
        PaddingCollator()([sample(5, seq_lens=[3, 2])])
    assert PaddingCollator()([sample(5, seq_lens=[5])])["shift_labels"].shape == (1, 5)


@pytest.mark.parametrize("lengths", [[3, 3], [5, 0], []])
def test_lengths_that_are_not_those_of_the_row_are_refused(lengths: list[int]) -> None:
    with pytest.raises(DataError, match=r'"seq_lens" of a sample is .* must sum to 5 input_ids'):
        PackingCollator()([sample(5, seq_lens=lengths)])


def test_a_model_that_takes_positions_alone_gets_no_segments() -> None:
    samples = [sample(3), sample(2)]
    whole, bare = PackingCollator()(samples), PackingCollator(cu_seq_lens=False)(samples)
    segments = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert whole.keys() - bare.keys() == segments
    assert bare["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    with pytest.raises(ValueError, match="nothing would tell the samples of a row apart"):
        PackingCollator(text_positions=False, cu_seq_lens=False)


def sound(frames: int, axis: int, mask: str = "feature_attention_mask") -> dict[str, Any]:
    shape = (1, 4, frames) if axis == 2 else (1, frames, 4)
    return sample(3, input_features=torch.full(shape, float(frames)), **{mask: torch.ones(1, frames, dtype=torch.long)})


@pytest.mark.parametrize("collate", [PackingCollator(), PaddingCollator()])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("mask", ["feature_attention_mask", "input_features_mask"])
def test_sounds_of_different_lengths_are_padded_to_the_longest_and_masked(collate: Any, axis: int, mask: str) -> None:
    batch = collate([sound(7, axis, mask), sample(2), sound(5, axis, mask)])
    assert batch[mask].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert batch["input_features"].shape == ((2, 4, 7) if axis == 2 else (2, 7, 4))
    short = batch["input_features"][1]
    assert (short.narrow(axis - 1, 0, 5) == 5).all()
    assert (short.narrow(axis - 1, 5, 2) == 0).all()


def test_sounds_of_different_lengths_without_a_mask_are_refused() -> None:
    samples = [{k: v for k, v in sound(n, 2).items() if k != "feature_attention_mask"} for n in (7, 5)]
    with pytest.raises(DataError, match=r'"input_features" .* concatenated along dim 0: \[1, 4, 7\] .* \[1, 4, 5\]'):
        PackingCollator()(samples)


def test_lists_of_numbers_and_arrays_become_tensors() -> None:
    first = sample(2, second_per_grid_ts=[1], video_grid_thw=np.array([[1, 2, 2]]))
    second = sample(3, second_per_grid_ts=[0.5, 2.0], video_grid_thw=np.array([[2, 4, 4], [1, 2, 2]]))
    batch = PackingCollator()([first, second])
    assert batch["second_per_grid_ts"].tolist() == [1.0, 0.5, 2.0]
    assert batch["video_grid_thw"].tolist() == [[1, 2, 2], [2, 4, 4], [1, 2, 2]]


@pytest.mark.parametrize("value", [[], ["a"], [torch.zeros(2)], torch.tensor(1.0), np.array(["a"], dtype=object)])
def test_what_is_not_a_tensor_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match='"extra" of a sample is a'):
        PackingCollator()([sample(2, extra=value)])


def test_four_axes_are_sliced_along_the_row() -> None:
    batch = PackingCollator()([sample(2), sample(3, position_ids=torch.arange(9).reshape(3, 3))])
    parts = [slice_for_sequence_parallel(batch, rank, 2)["position_ids"] for rank in range(2)]
    assert [part.shape for part in parts] == [(4, 1, 3)] * 2
    whole = torch.cat(parts, -1)
    assert whole[..., :5].equal(batch["position_ids"])
    assert whole[..., 5].flatten().tolist() == [0] * 4


def test_a_row_without_segments_cannot_be_sliced() -> None:
    with pytest.raises(DataError, match=r"a batch without cu_seq_lens_q .* cannot be sliced over 2"):
        slice_for_sequence_parallel(PackingCollator(cu_seq_lens=False)([sample(5)]), 0, 2)
