"""The names of `dilated_attention_pytorch`, computed by `dilated` (preset "fork").

Thin and for programs that exist; new ones use `dilated`. What changed is told in
"Coming from dilated_attention_pytorch" of its documentation.
"""

__version__ = "0.1.0"

from .block_sparse_ring_dilated_attention import (
    BlockSparseMemoryPool,
    BlockSparseRingDilatedAttention,
    ContentAdaptiveSparsity,
    SparsePatternConfig,
    SparsePatternGenerator,
)
from .block_sparse_ring_distributed_dilated_attention import (
    BlockSparseRingDistributedDilatedAttention,
    DistributedSparseConfig,
    DistributedSparsePattern,
)
from .block_sparse_ring_multihead_dilated_attention import (
    BlockSparseRingMultiheadDilatedAttention,
    create_adaptive_sparse_multihead_attention,
    create_block_sparse_multihead_attention,
)
from .core import (
    create_adaptive_sparse_attention,
    create_block_sparse_attention,
    create_dilated_attention,
    create_multihead_dilated_attention,
)
from .dilated_attention import DilatedAttention
from .distributed_dilated_attention import DistributedMultiheadDilatedAttention
from .improved_dilated_attention import ImprovedDilatedAttention
from .improved_distributed_dilated_attention import (
    DistributedImprovedDilatedAttention,
    DistributedImprovedMultiheadDilatedAttention,
)
from .improved_multihead_dilated_attention import ImprovedMultiheadDilatedAttention
from .long_net import LongNet, LongNetLM
from .multihead_dilated_attention import MultiheadDilatedAttention
from .ring_dilated_attention import RingDilatedAttention, UnfoldRingDilatedAttention
from .ring_distributed_dilated_attention import RingDistributedDilatedAttention
from .ring_multihead_dilated_attention import RingMultiheadDilatedAttention
from .transformer import DilatedTransformerDecoderLayer, DilatedTransformerEncoderLayer
from .utils.sparse_pattern_utils import (
    PatternConfig,
    PatternOptimizer,
    PatternQualityAnalyzer,
    PatternType,
)

__all__ = [
    "BlockSparseMemoryPool",
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDistributedDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "ContentAdaptiveSparsity",
    "DilatedAttention",
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "DistributedImprovedDilatedAttention",
    "DistributedImprovedMultiheadDilatedAttention",
    "DistributedMultiheadDilatedAttention",
    "DistributedSparseConfig",
    "DistributedSparsePattern",
    "ImprovedDilatedAttention",
    "ImprovedMultiheadDilatedAttention",
    "LongNet",
    "LongNetLM",
    "MultiheadDilatedAttention",
    "PatternConfig",
    "PatternOptimizer",
    "PatternQualityAnalyzer",
    "PatternType",
    "RingDilatedAttention",
    "RingDistributedDilatedAttention",
    "RingMultiheadDilatedAttention",
    "SparsePatternConfig",
    "SparsePatternGenerator",
    "UnfoldRingDilatedAttention",
    "create_adaptive_sparse_attention",
    "create_adaptive_sparse_multihead_attention",
    "create_block_sparse_attention",
    "create_block_sparse_multihead_attention",
    "create_dilated_attention",
    "create_multihead_dilated_attention",
]
