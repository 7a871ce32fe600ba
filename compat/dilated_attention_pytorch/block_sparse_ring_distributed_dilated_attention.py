"""Block-sparse attention over ranks: placeholders."""

from .left_out import BLOCK_SPARSE, DISTRIBUTED, LeftOut


class BlockSparseRingDistributedDilatedAttention(LeftOut, instead=DISTRIBUTED):
    """Block-sparse attention over ranks."""


class DistributedSparseConfig(LeftOut, instead=BLOCK_SPARSE):
    """Options of a block pattern over ranks."""


class DistributedSparsePattern(LeftOut, instead=BLOCK_SPARSE):
    """Kinds of block patterns over ranks."""


class HierarchicalSparsePatternGenerator(LeftOut, instead=BLOCK_SPARSE):
    """Makes block patterns over ranks."""


class GradientCompressor(LeftOut, instead="torch's communication hooks of DDP"):
    """Compresses gradients."""
