"""Multi-head attention over ranks: a placeholder."""

from .left_out import DISTRIBUTED, LeftOut


class DistributedMultiheadDilatedAttention(LeftOut, instead=DISTRIBUTED):
    """Multi-head attention over ranks."""
