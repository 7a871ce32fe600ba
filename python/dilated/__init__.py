"""Dilated attention (LongNet and relatives): one exact operator for PyTorch, with a C++ core.

out = dilated.dilated_attention(q, k, v, segments=[2048, 8192], dilations=[1, 4], is_causal=True)
"""

__version__ = "0.1.0"

from . import reference
from ._options import AttentionOptions
from ._plan import Plan, plan
from .errors import InvalidProblem, Unsupported
from .functional import dilated_attention
from .info import Backend, backends, presets, versions
from .modules import DilatedAttention
from .multihead import MultiheadDilatedAttention
from .received import attention_received
from .windows import merge, window_attention

__all__ = [
    "AttentionOptions",
    "Backend",
    "DilatedAttention",
    "InvalidProblem",
    "MultiheadDilatedAttention",
    "Plan",
    "Unsupported",
    "attention_received",
    "backends",
    "dilated_attention",
    "merge",
    "plan",
    "presets",
    "reference",
    "versions",
    "window_attention",
]
