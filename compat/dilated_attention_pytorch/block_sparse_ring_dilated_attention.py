"""Block-sparse attention: its options, and placeholders until it exists."""

from __future__ import annotations

from dataclasses import dataclass

from .left_out import BLOCK_SPARSE, MEMORY_POOL, LeftOut
from .utils.sparse_pattern_utils import SparsePatternGenerator
from .utils.validation import invalid

__all__ = [
    "BlockSparseMemoryPool",
    "BlockSparseRingDilatedAttention",
    "ContentAdaptiveSparsity",
    "SparsePatternConfig",
    "SparsePatternGenerator",
]


@dataclass
class SparsePatternConfig:
    """Options of a block pattern: values only, so that programs which build them get that far.

    Args:
        pattern_type: kind of pattern.
        sparsity_ratio: fraction of blocks that is kept.
        block_size: positions per block; positive.
        local_window_size: positions of a local window.
        global_tokens: positions that see all and are seen by all.
        adaptation_rate: the package never read it.
        min_sparsity: the package never read it.
        max_sparsity: the package never read it.

    Raises:
        InvalidProblem: block_size is not positive.
    """

    pattern_type: str = "dilated_sparse"
    sparsity_ratio: float = 0.25
    block_size: int = 128
    local_window_size: int = 512
    global_tokens: int = 64
    adaptation_rate: float = 0.1
    min_sparsity: float = 0.05
    max_sparsity: float = 0.95

    def __post_init__(self) -> None:
        if self.block_size <= 0:
            raise invalid("block_size", "> 0", self.block_size, "block_size must be positive")


class ContentAdaptiveSparsity(LeftOut, instead=BLOCK_SPARSE):
    """Blocks chosen by content."""


class BlockSparseRingDilatedAttention(LeftOut, instead=BLOCK_SPARSE):
    """Attention within active blocks."""


class BlockSparseMemoryPool(LeftOut, instead=MEMORY_POOL):
    """A pool of buffers."""
