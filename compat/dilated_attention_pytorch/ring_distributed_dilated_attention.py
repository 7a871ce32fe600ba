"""Ring attention over ranks: a placeholder."""

from .left_out import DISTRIBUTED, LeftOut


class RingDistributedDilatedAttention(LeftOut, instead=DISTRIBUTED):
    """Ring attention over ranks."""
