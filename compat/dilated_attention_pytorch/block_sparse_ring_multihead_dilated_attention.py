"""Block-sparse multi-head attention: placeholders until it exists."""

from __future__ import annotations

from typing import Any

from .left_out import BLOCK_SPARSE, LeftOut, left_out


class BlockSparseRingMultiheadDilatedAttention(LeftOut, instead=BLOCK_SPARSE):
    """Projections around block-sparse attention."""


def create_block_sparse_multihead_attention(
    *_: Any, **__: Any
) -> BlockSparseRingMultiheadDilatedAttention:
    """Left out: raises Unsupported."""
    left_out("create_block_sparse_multihead_attention", BLOCK_SPARSE)


def create_adaptive_sparse_multihead_attention(
    *_: Any, **__: Any
) -> BlockSparseRingMultiheadDilatedAttention:
    """Left out: raises Unsupported."""
    left_out("create_adaptive_sparse_multihead_attention", BLOCK_SPARSE)
