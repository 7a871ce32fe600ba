"""One sequence over many ranks: exact dilated attention on contiguous shards.

out = dilated.distributed.dilated_attention(
    q, k, v, sequence_groups=dilated.distributed.SequenceGroups(), segments=[...], dilations=[...]
)
"""

from ..errors import DistributedAttentionError
from ._attention import dilated_attention
from ._groups import SequenceGroups

__all__ = ["DistributedAttentionError", "SequenceGroups", "dilated_attention"]
