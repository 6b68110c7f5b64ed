from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from veomni_models import ModelError, OmniProcessor, build_omni_processor

from .test_initialization import PARTS


def tokenizer_folder(path: Path, **special: str) -> Path:
    """A tokenizer as language models have it: nothing in it stands for a picture."""
    words = {word: i for i, word in enumerate(["[UNK]", "<end>", "What", "is", "this"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(path)
    return path


def test_a_tokenizer_of_text_gets_a_placeholder_and_a_token_to_pad_with(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "text", eos_token="<end>")
    processor = build_omni_processor(folder, encoders=PARTS["encoders"])
    assert len(processor.tokenizer) == 6
    assert processor.tokenizer.pad_token == "<end>"
    made = processor(text=["What is this <image>", "What"], images=[Image.new("L", (30, 20))], padding=True)
    assert made["input_ids"] == [[2, 3, 4, 5, 5, 5, 5], [2, 1, 1, 1, 1, 1, 1]]
    processor.save_pretrained(tmp_path / "saved")
    again = OmniProcessor.from_pretrained(tmp_path / "saved")
    assert again.tokenizer("this <image>")["input_ids"] == [4, 5]
    assert again.image_token_id == 5
    assert again(text=["<image>"], images=[Image.new("L", (30, 20))])["input_ids"] == [[5, 5, 5, 5]]


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no pad_token and no eos_token"):
        build_omni_processor(tokenizer_folder(tmp_path / "text"), encoders=PARTS["encoders"])
