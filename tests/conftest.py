from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from ranks import Ranks

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores are shared by all ranks
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()
