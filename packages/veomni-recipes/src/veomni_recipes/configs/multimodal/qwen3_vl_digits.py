"""Write scikit-learn's handwritten digits as conversations, with a processor of Qwen3-VL's kind that fits them.

    python qwen3_vl_digits.py [FOLDER]        # default data/digits; what is there already is left as it is

The conversations are those of `omni/digits.py`, which see; `FOLDER/qwen3_vl/` is the processor. It takes pictures as
they are, a few pixels wide, and its tokenizer is trained on the conversations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from veomni_recipes.configs.multimodal.omni import digits
from veomni_recipes.qwen_processors import qwen_processor
from veomni_recipes.smoke import tiny_tokenizer

PATCHES = {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
"""As `qwen3_vl_digits.yaml` has them: a picture of 8 x 8 pixels becomes 4 tokens."""


def main(folder: Path) -> None:
    """Make the data and the processor, unless they are there."""
    digits.main(folder)
    if (folder / "qwen3_vl").is_dir():
        return
    with (folder / "train.jsonl").open(encoding="utf-8") as lines:
        turns = [turn for line in lines for turn in json.loads(line)["messages"]]
    texts = [f"{turn['role']}\n{turn['content'].replace('<image>', '')}" for turn in turns]
    config = SimpleNamespace(model_type="qwen3_vl", vision_config=SimpleNamespace(**PATCHES))
    processor = qwen_processor(config, tiny_tokenizer(texts, 512), pixels=(8 * 8, 64 * 64))
    partial = folder / ".qwen3_vl.partial"
    processor.save_pretrained(partial)
    partial.rename(folder / "qwen3_vl")
    print(f"wrote {folder / 'qwen3_vl'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/digits"))
