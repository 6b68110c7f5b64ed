from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BatchFeature, PreTrainedTokenizerFast

TEXT = [
    "user assistant system",
    "Which digits are these? What is their sum? three, five is eight.",
    "Hello there\n\n  world",
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with ChatML's tokens and a placeholder for pictures."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|pad|>", "<|pic|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|pic|>"],
    )


class PictureProcessor:
    """What the data package needs of a processor: a picture of H x W becomes H image tokens and one tensor [3]."""

    image_token = "<|pic|>"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: list[Any] | None = None, return_tensors: str = "pt") -> BatchFeature:
        pieces = text[0].split(self.image_token)
        repeats = [self.image_token * image.height for image in images or []] + [""]
        assert len(pieces) == len(repeats)
        expanded = "".join(piece + repeat for piece, repeat in zip(pieces, repeats, strict=True))
        outputs = dict(self.tokenizer([expanded], return_tensors=return_tensors))
        outputs["mm_token_type_ids"] = (outputs["input_ids"] == self.tokenizer.convert_tokens_to_ids("<|pic|>")).long()
        if images:
            outputs["pixel_values"] = torch.tensor([image.getpixel((0, 0)) for image in images], dtype=torch.float32)
        return BatchFeature(outputs)


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast) -> PictureProcessor:
    return PictureProcessor(tokenizer)
