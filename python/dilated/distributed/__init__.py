"""One sequence over many ranks: exact dilated attention on contiguous shards.

out = dilated.distributed.dilated_attention(
    q, k, v, sequence_groups=dilated.distributed.SequenceGroups(), segments=[...], dilations=[...]
)
"""

from ..errors import DistributedAttentionError
from . import _compiled  # noqa: F401 - its operators
from ._attention import dilated_attention
from ._groups import SequenceGroups
from ._reductions import mean_loss, sum_gradients, sum_over_ranks, unshard

__all__ = [
    "DistributedAttentionError",
    "SequenceGroups",
    "dilated_attention",
    "mean_loss",
    "sum_gradients",
    "sum_over_ranks",
    "unshard",
]
