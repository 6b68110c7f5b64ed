"""Reading a configuration costs next to nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

FULL = Path(__file__).with_name("full.yaml")
OVERRIDES = """--train.lr 1e-3 --train.seed=3 --data.max_seq_len 1024 --train.use_wandb false --train.save_steps=3
    --data.num_workers=1 --model.encoders.image.depth=3 --train.wandb_name=a --train.max_steps 4 --no-data.pin_memory"""


def test_a_whole_process_with_sixty_keys_and_ten_overrides_takes_under_half_a_second() -> None:
    program = (
        "import sys; from veomni_config import RecipeConfig, parse_args; parse_args(RecipeConfig); "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert subprocess.run([sys.executable, "-c", program, FULL, *OVERRIDES.split()], check=False).returncode == 0
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5
