"""Settings of the suite; its files find `restated` beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from dilated_attention_pytorch import options_without_effect

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("compat", derandomize=True, deadline=None, max_examples=60)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_without_effect, "_warned", set())
