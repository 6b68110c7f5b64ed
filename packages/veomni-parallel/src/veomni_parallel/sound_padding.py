"""Audio towers whose convolutions see the padding behind short sounds (Qwen3-Omni): each sample as if it were alone."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import nn

from veomni_parallel.packed_rows import find_cu_seq_lens, named_arguments

SAMPLES = "samples_of_sounds"
"""Argument by which such a tower is told the sample of each sound, [n]; ranks of a row keep samples together."""


def keep_sounds_apart(model: nn.Module, tower: nn.Module) -> None:
    """Make a tower of that kind give sounds the features that they have in their sample alone; others stay the same.

    The tower cuts sounds into chunks of `2 * n_window` frames, pads all to the longest, and convolves three times.
    Behind the first convolution padding is no longer zero, so the end of a sound shorter than a chunk depends on
    whether a longer sound is in the row. Here what lies behind the longest chunk of a sample is set to zero again.

    Args:
        model: the model around the tower, which is handed the packed row.
        tower: its audio tower.
    """
    names = set(inspect.signature(tower.forward).parameters)
    count = getattr(sys.modules[type(tower).__module__], "_get_feat_extract_output_lengths", None)
    placeholder = getattr(getattr(model, "config", None), "audio_token_id", None)
    if "feature_lens" not in names or not hasattr(tower, "conv2d1") or count is None or placeholder is None:
        return
    sounds = _Sounds(int(tower.n_window), int(placeholder), count)
    original = tower.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        samples = kwargs.pop(SAMPLES, None)
        sounds.begin(inspect.signature(original).bind(*args, **kwargs).arguments["feature_lens"], samples)
        return original(*args, **kwargs)

    tower.forward = forward
    model.register_forward_pre_hook(sounds.find_samples, with_kwargs=True)
    tower.register_forward_pre_hook(sounds.tell_samples, with_kwargs=True)
    for depth, convolution in enumerate((tower.conv2d1, tower.conv2d2)):
        convolution.register_forward_hook(functools.partial(sounds.silence, depth))


class _Sounds:
    """The sounds that a tower is computing; hooks of the model, the tower and its convolutions."""

    def __init__(self, n_window: int, placeholder: int, count: Any) -> None:
        self.n_window, self.placeholder, self.count = n_window, placeholder, count
        self.samples: torch.Tensor | None = None
        """[audio tokens of the row], the sample of each."""
        self.lengths: torch.Tensor | None = None
        """[chunks], frames behind which a chunk is to be zero; None if there is nothing to do."""
        self.seen = [0, 0]
        """Chunks that each convolution has had: it is handed some at a time."""

    def find_samples(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look up in the row to which samples its audio tokens belong."""
        kwargs = named_arguments(model, args, kwargs)
        cu_seq_lens, ids, self.samples = find_cu_seq_lens(kwargs), kwargs.get("input_ids"), None
        if cu_seq_lens is not None and ids is not None and kwargs.get("input_features") is not None:
            places = (ids[0] == self.placeholder).nonzero().flatten()
            self.samples = torch.searchsorted(cu_seq_lens[1:], places.to(cu_seq_lens.dtype), right=True)

    def tell_samples(
        self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add to the tower's arguments the sample of each sound."""
        samples, self.samples = self.samples, None
        frames = named_arguments(tower, args, kwargs).get("feature_lens")
        if samples is None or frames is None:
            return None
        tokens = self.count(frames, self.n_window)
        if int(tokens.sum()) != len(samples):
            return None  # an error that the model itself reports
        return args, {**kwargs, SAMPLES: samples[tokens.cumsum(0) - tokens]}

    def begin(self, frames: torch.Tensor, samples: torch.Tensor | None) -> None:
        """Take over the frames and samples of the sounds [n] that this rank computes."""
        self.lengths, self.seen = None, [0, 0]
        if samples is not None:
            size = 2 * self.n_window
            longest = frames.clamp_max(size)
            padded = longest.new_zeros(int(samples.max()) + 1).scatter_reduce(0, samples, longest, "amax")[samples]
            if bool((padded < longest.max()).any()):
                self.lengths = padded.repeat_interleave((frames + size - 1) // size)

    def silence(self, depth: int, convolution: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """output: [chunks of this call, C, F, T'] of a convolution, after `depth` others; each halves the frames."""
        if self.lengths is None:
            return output
        start = self.seen[depth]
        self.seen[depth] += len(output)
        own = self.lengths[start : self.seen[depth]]
        for _ in range(depth + 1):
            own = (own - 1) // 2 + 1
        behind = torch.arange(output.shape[-1], device=output.device) >= own[:, None]
        return output.masked_fill(behind[:, None, None], 0.0)
