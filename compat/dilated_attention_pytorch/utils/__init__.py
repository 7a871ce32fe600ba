"""Checks, dense attention in plain PyTorch, and placeholders for the tools of block patterns."""

from .attention_utils import (
    apply_head_specific_masks,
    compute_position_embeddings,
    create_4d_causal_mask,
    get_attention_backend_info,
    merge_attention_heads,
    optimize_attention_computation,
    split_attention_heads,
)
from .sparse_pattern_utils import (
    PatternOptimizer,
    PatternQualityAnalyzer,
    PatternType,
    PatternVisualizer,
    SparsePatternGenerator,
    analyze_pattern_statistics,
    load_sparse_pattern,
    optimize_pattern_for_hardware,
    save_sparse_pattern,
)
from .validation import ValidationMixin

__all__ = [
    "PatternOptimizer",
    "PatternQualityAnalyzer",
    "PatternType",
    "PatternVisualizer",
    "SparsePatternGenerator",
    "ValidationMixin",
    "analyze_pattern_statistics",
    "apply_head_specific_masks",
    "compute_position_embeddings",
    "create_4d_causal_mask",
    "get_attention_backend_info",
    "load_sparse_pattern",
    "merge_attention_heads",
    "optimize_attention_computation",
    "optimize_pattern_for_hardware",
    "save_sparse_pattern",
    "split_attention_heads",
]
