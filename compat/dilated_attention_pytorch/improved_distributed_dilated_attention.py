"""Attention over ranks: placeholders."""

from __future__ import annotations

from typing import Any

from .left_out import DISTRIBUTED, LeftOut, left_out

_ENGINE = "wrap dilated modules with the engine of your training framework"


class DistributedImprovedDilatedAttention(LeftOut, instead=DISTRIBUTED):
    """Attention over ranks."""


class DistributedImprovedMultiheadDilatedAttention(LeftOut, instead=DISTRIBUTED):
    """Multi-head attention over ranks."""


class DeepSpeedDilatedAttentionEngine(LeftOut, instead=_ENGINE):
    """A training engine."""


def create_distributed_model(*_: Any, **__: Any) -> None:
    """Left out: raises Unsupported."""
    left_out("create_distributed_model", _ENGINE)


def get_recommended_config(*_: Any, **__: Any) -> None:
    """Left out: raises Unsupported."""
    left_out("get_recommended_config", _ENGINE)
