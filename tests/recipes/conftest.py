from __future__ import annotations

from pathlib import Path

import pytest
from veomni_recipes.configs.multimodal.omni import digits


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as conversations, with fewer samples than the recipe's own."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "TRAINING_SAMPLES", 2_000)
        patch.setattr(digits, "COPIES", 1)
        digits.main(folder)
    return folder


@pytest.fixture(scope="session")
def arguments(digits_folder: Path) -> list[str]:
    """Command line of a short run of the digits recipe, but for its output folder."""
    config = Path(digits.__file__).with_name("digits.yaml")
    return [
        str(config),
        f"--data.train_path={digits_folder}/train.jsonl",
        f"--model.tokenizer_path={digits_folder}/tokenizer",
        "--data.eval_path=null",
        "--data.max_seq_len=256",
        "--train.global_batch_size=4",
        "--train.save_steps=0",
        "--train.save_epochs=0",
        "--train.save_hf_weights=false",
    ]
