"""Reading a configuration costs next to nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

FULL = Path(__file__).with_name("full.yaml")
OVERRIDES = """--train.lr 1e-3 --train.seed=3 --data.max_seq_len 1024 --train.use_wandb false --train.save_steps=3
    --data.num_workers=1 --model.encoders.image.depth=3 --train.wandb_name=a --train.max_steps 4 --no-data.pin_memory"""


def test_a_whole_process_with_sixty_keys_and_ten_overrides_takes_under_half_a_second() -> None:
    # processor time, since other processes may hold the cores; on an idle machine the clock shows the same. Where
    # a core is slower, so is the import of the two packages that this one is made of.
    program = (
        "import sys; from veomni_config import RecipeConfig, parse_args; parse_args(RecipeConfig); "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    libraries = "import yaml; from pydantic import BaseModel, Field"
    own, made_of = ([processor_seconds(code) for _ in range(3)] for code in (program, libraries))
    assert min(own) < max(0.5, 3 * min(made_of))


def processor_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run([sys.executable, "-c", code, FULL, *OVERRIDES.split()], check=False).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
