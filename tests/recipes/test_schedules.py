from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from veomni_config import TrainConfig
from veomni_recipes.optimization import learning_rate

STYLES = ("constant", "linear", "cosine", "wsd")


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, TrainConfig]:
    """A number of steps and a schedule whose phases are in order."""
    steps = draw(st.integers(1, 300))
    warmup, stable, decay = sorted(draw(st.lists(st.integers(0, 100), min_size=3, max_size=3, unique=True)))
    low, high = sorted(draw(st.lists(st.floats(1e-8, 1.0), min_size=2, max_size=2)))
    train = TrainConfig(
        output_dir="unused",
        lr=high,
        lr_min=low,
        lr_start=low,
        lr_warmup_ratio=warmup / 100,
        lr_stable_ratio=stable / 100,
        lr_decay_ratio=decay / 100,
        lr_decay_style=draw(st.sampled_from(STYLES)),
    )
    return steps, train


@given(schedules())
def test_it_rises_to_its_peak_and_then_never_rises_again(schedule: tuple[int, TrainConfig]) -> None:
    steps, train = schedule
    rates = [learning_rate(step, steps, train) for step in range(1, steps + 1)]
    warmup = round(steps * train.lr_warmup_ratio)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(train.lr_min * (1 - 1e-9) <= rate <= train.lr * (1 + 1e-9) for rate in rates)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(train.lr)
    if train.lr_decay_style != "constant" and round(steps * train.lr_decay_ratio) > warmup:
        assert rates[-1] == pytest.approx(train.lr_min) or round(steps * train.lr_stable_ratio) == steps


@given(schedules())
def test_no_step_changes_it_by_more_than_its_phase_allows(schedule: tuple[int, TrainConfig]) -> None:
    steps, train = schedule
    ends = {name: round(steps * getattr(train, f"lr_{name}_ratio")) for name in ("warmup", "stable", "decay")}
    start = ends["stable"] if train.lr_decay_style == "wsd" else ends["warmup"]
    steepest = (train.lr - train.lr_min) * 1.6 / max(1, min(ends["warmup"] or steps, max(1, ends["decay"] - start)))
    rates = [learning_rate(step, steps, train) for step in range(1, steps + 1)]
    assert all(abs(b - a) <= steepest + 1e-12 for a, b in pairwise(rates))


def test_wsd_stays_at_its_peak_and_goes_down_in_a_line() -> None:
    train = TrainConfig(
        output_dir="unused",
        lr=1.0,
        lr_min=0.0,
        lr_decay_style="wsd",
        lr_warmup_ratio=0.1,
        lr_stable_ratio=0.6,
        lr_decay_ratio=0.8,
    )
    rates = [learning_rate(step, 100, train) for step in range(1, 101)]
    assert rates[9:60] == [1.0] * 51
    assert rates[60:80] == pytest.approx([1 - k / 20 for k in range(1, 21)])
    assert rates[80:] == [0.0] * 20


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr_decay_style": "wsd", "lr_stable_ratio": 1.0}, r"set lr_stable_ratio to at least 0 .* less than 1"),
        ({"lr_decay_style": "wsd", "lr_warmup_ratio": 0.9}, r"set lr_stable_ratio to at least 0\.9"),
        ({"optimizer": "muon", "data_parallel_mode": "fsdp1"}, "set data_parallel_mode to fsdp2"),
        ({"ema_decay": 0.9, "data_parallel_mode": "fsdp1"}, "set data_parallel_mode to fsdp2, or this to null"),
        ({"optimizer": "muon", "data_parallel_mode": "fsdp2", "enable_fsdp_offload": True}, "computes on the device"),
        ({"lr": 0, "lr_min": 0, "muon_lr": 1e-2}, "set lr above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        TrainConfig(output_dir="unused", **values)
