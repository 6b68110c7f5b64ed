"""The README's encoder, projector and decoder of one's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import SiglipVisionModel
from veomni_models import LinearProjector, MLPProjector, ModelError, register_encoder, register_projector

README = Path(__file__).parents[2] / "packages" / "veomni-models" / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
(SNIPPET,) = (snippet for snippet in SNIPPETS if "register_encoder(" in snippet)
(DRAWING,) = (snippet for snippet in SNIPPETS if "register_decoder(" in snippet)

SAVE_AND_DRAW = """
import sys
from veomni_models import OmniModel

assert answer.token_ids == [] and answer.pictures[0].mean() > 0.9
model.save_pretrained(sys.argv[1])
again = OmniModel.from_pretrained(sys.argv[1]).eval()
options = {"eos_token_id": 9, "pad_token_id": 0, "drawing": DrawingOptions(guidance_scale=1.0), "max_new_tokens": 4}
torch.testing.assert_close(reply(again, prompt, **options)[0].pictures[0], answer.pictures[0], rtol=0, atol=2e-6)
"""

SAVE_AND_CALL = """
import sys
from PIL import Image
from veomni_models import build_omni_processor, OmniModel, OmniProcessor
from tests.models.omni_parts import save_tokenizer

encoders = {"image": {"model_type": "stripes", "projector": "average"}}
processor = build_omni_processor(save_tokenizer(sys.argv[1] + "/tokenizer"), encoders=encoders)
inputs = processor(text=["what is <image> this"], images=[Image.new("L", (30, 20))], return_tensors="pt")
assert inputs["input_ids"].tolist() == [[2, 3, 10, 4]]
model.config.image_token_id = 10
model.eval().save_pretrained(sys.argv[1] + "/model")
again = OmniModel.from_pretrained(sys.argv[1] + "/model").eval()
torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=2e-6)
model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
assert model.encoders["image"].row.weight.grad.abs().sum() > 0
"""


def test_an_encoder_and_a_projector_of_ones_own_are_short_and_train_and_are_saved(tmp_path: Path) -> None:
    for part in re.findall(r"^class .*?(?=^\S)", SNIPPET, re.DOTALL | re.MULTILINE):
        assert len(part.splitlines()) < 60
    command = [sys.executable, "-c", SNIPPET + SAVE_AND_CALL, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": "tests"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=README.parents[2], env=env)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 3, 100])" in done.stdout


def test_a_decoder_of_ones_own_is_short_and_learns_to_draw_and_is_saved(tmp_path: Path) -> None:
    for part in re.findall(r"^class .*?(?=^\S)", DRAWING, re.DOTALL | re.MULTILINE):
        assert len(part.splitlines()) < 60
    command = [sys.executable, "-c", DRAWING + SAVE_AND_DRAW, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_names_that_are_taken_or_do_not_fit_are_refused() -> None:
    register_projector("mlp", MLPProjector)
    with pytest.raises(ModelError, match="projector 'mlp' is MLPProjector already"):
        register_projector("mlp", LinearProjector)
    with pytest.raises(ModelError, match="config_class must have model_type = 'mine'"):
        register_encoder("mine", SiglipVisionModel)
    register_encoder("siglip_vision_model", SiglipVisionModel)
