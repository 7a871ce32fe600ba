"""Dilated attention (LongNet and relatives): one exact operator for PyTorch, with a C++ core.

out = dilated.dilated_attention(q, k, v, segments=[2048, 8192], dilations=[1, 4], is_causal=True)
"""

__version__ = "0.1.0"

from . import reference
from .errors import InvalidProblem, Unsupported
from .functional import dilated_attention
from .info import (
    Backend,
    attention_pattern,
    backends,
    count_pairs,
    explain,
    offset_table,
    presets,
    print_plan,
    versions,
    workspace_bytes,
)
from .modules import DilatedAttention, MultiheadDilatedAttention

__all__ = [
    "Backend",
    "DilatedAttention",
    "InvalidProblem",
    "MultiheadDilatedAttention",
    "Unsupported",
    "attention_pattern",
    "backends",
    "count_pairs",
    "dilated_attention",
    "explain",
    "offset_table",
    "presets",
    "print_plan",
    "reference",
    "versions",
    "workspace_bytes",
]
