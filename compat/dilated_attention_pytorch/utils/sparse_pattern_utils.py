"""Tools for block patterns: placeholders, as is the block sparsity that they serve."""

from __future__ import annotations

from typing import Any

from ..left_out import BLOCK_SPARSE, LeftOut, left_out


class PatternType(LeftOut, instead=BLOCK_SPARSE):
    """Kinds of patterns."""


class PatternConfig(LeftOut, instead=BLOCK_SPARSE):
    """Options of a pattern."""


class PatternQualityMetrics(LeftOut, instead="compare outputs with dilated.reference"):
    """Numbers that rate a pattern."""


class PatternQualityAnalyzer(LeftOut, instead="compare outputs with dilated.reference"):
    """Rates a pattern."""


class PatternOptimizer(LeftOut, instead="choose segments and dilations; dilated.plan(...)"):
    """Changes a pattern."""


class PatternVisualizer(LeftOut, instead="`dilated pattern --out picture.png`"):
    """Draws a pattern."""


class SparsePatternGenerator(LeftOut, instead=BLOCK_SPARSE):
    """Makes patterns."""


def save_sparse_pattern(*_: Any, **__: Any) -> None:
    """Left out: raises Unsupported."""
    left_out("save_sparse_pattern", "torch.save")


def load_sparse_pattern(*_: Any, **__: Any) -> None:
    """Left out: raises Unsupported."""
    left_out("load_sparse_pattern", "torch.load")


def analyze_pattern_statistics(*_: Any, **__: Any) -> None:
    """Left out: raises Unsupported."""
    left_out("analyze_pattern_statistics", "dilated.plan(...) counts pairs")


def optimize_pattern_for_hardware(*_: Any, **__: Any) -> None:
    """Left out: raises Unsupported."""
    left_out("optimize_pattern_for_hardware", BLOCK_SPARSE)
