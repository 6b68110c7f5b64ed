from __future__ import annotations

from pathlib import Path

import pytest
from ranks import Ranks

from tests.ckpt.saved_layouts import Tensors, save_all_writers, save_trainers


@pytest.fixture(scope="session")
def saved(four_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`saved_layouts.whole_tensors` through every writer of torch, a folder each; not to be changed."""
    folder = tmp_path_factory.mktemp("writers")
    four_ranks.run(save_all_writers, folder)
    return folder


@pytest.fixture(scope="session")
def trained(four_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A model in the layouts of several trainers, a folder each, and its tensors; not to be changed."""
    folder = tmp_path_factory.mktemp("trainers")
    return folder, four_ranks.run(save_trainers, folder)[0]
