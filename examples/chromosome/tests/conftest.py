"""The example's files are scripts: their folder is where they find each other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
