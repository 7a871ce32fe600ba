"""Base classes, configurations, factory and the plain functions of the package."""

from ..utils.attention_utils import (
    HAS_FLASH_ATTN,
    HAS_SDPA,
    apply_dilated_attention_pattern,
    apply_rotary_embeddings,
    compute_alibi_bias,
    compute_attention_scores,
    compute_rotary_embeddings,
    create_block_diagonal_mask,
    create_dilated_mask,
    merge_attention_heads,
    optimize_attention_computation,
    split_attention_heads,
    standard_attention,
)
from ..utils.validation import ValidationMixin
from .base import BaseDilatedAttention, BaseMultiheadDilatedAttention
from .config import (
    DilatedAttentionConfig,
    DistributedConfig,
    MemoryPoolConfig,
    MultiheadConfig,
    RingAttentionConfig,
    SparseAttentionConfig,
)
from .factory import (
    create_adaptive_sparse_attention,
    create_block_sparse_attention,
    create_dilated_attention,
    create_multihead_dilated_attention,
    register_attention,
    register_multihead_attention,
)
from .memory_pool import UnifiedMemoryPool, get_global_memory_pool, reset_global_memory_pool

__all__ = [
    "HAS_FLASH_ATTN",
    "HAS_SDPA",
    "BaseDilatedAttention",
    "BaseMultiheadDilatedAttention",
    "DilatedAttentionConfig",
    "DistributedConfig",
    "MemoryPoolConfig",
    "MultiheadConfig",
    "RingAttentionConfig",
    "SparseAttentionConfig",
    "UnifiedMemoryPool",
    "ValidationMixin",
    "apply_dilated_attention_pattern",
    "apply_rotary_embeddings",
    "compute_alibi_bias",
    "compute_attention_scores",
    "compute_rotary_embeddings",
    "create_adaptive_sparse_attention",
    "create_block_diagonal_mask",
    "create_block_sparse_attention",
    "create_dilated_attention",
    "create_dilated_mask",
    "create_multihead_dilated_attention",
    "get_global_memory_pool",
    "merge_attention_heads",
    "optimize_attention_computation",
    "register_attention",
    "register_multihead_attention",
    "reset_global_memory_pool",
    "split_attention_heads",
    "standard_attention",
]
