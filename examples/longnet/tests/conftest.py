"""The example's files are scripts: their folder is where they find each other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from corpus import Corpus, read_corpus


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"".join(f"line {i} of {i * i}\n".encode() for i in range(400)))
    return path


@pytest.fixture
def corpus(text: Path) -> Corpus:
    return read_corpus(text, context=64)
