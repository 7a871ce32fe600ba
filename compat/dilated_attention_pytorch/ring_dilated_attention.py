"""The name `RingDilatedAttention`: the same operator, on one rank or many."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .core.base import BaseDilatedAttention
from .core.config import RingAttentionConfig
from .left_out import MEMORY_POOL, LeftOut


class RingDilatedAttention(BaseDilatedAttention):
    """:class:`DilatedAttention` under another name; its memory is linear in n anyway.

    Over ranks its calls take `sequence_groups` of :mod:`dilated.distributed`, which chooses how
    rows travel; results have the bits of one rank.

    Args:
        segment_lengths: segment length of every group of heads.
        dilation_rates: dilation of every group of heads.
        dropout: probability of dropping an attention weight, in training.
        use_tf32: no effect on results; warns if not True.
        block_size: no effect; positive; warns if not 1024.
        ring_size: no effect; positive; warns if given.
        use_checkpointing: no effect; warns if not True.
        device: kept in the configuration; attention runs where its inputs are.
        dtype: as device.
        strict_lengths: refuse lengths that the longest segment does not divide.

    Raises:
        InvalidProblem: a value breaks a rule.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import RingDilatedAttention
        >>> q, k, v = torch.randn(3, 2, 128, 8, 16).unbind(0)
        >>> RingDilatedAttention([16, 64], [1, 4])(q, k, v).shape
        torch.Size([2, 128, 8, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        use_tf32: bool = True,
        block_size: int = 1024,
        ring_size: int | None = None,
        use_checkpointing: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        strict_lengths: bool = True,
    ) -> None:
        config = RingAttentionConfig(
            list(segment_lengths), list(dilation_rates), dropout, use_tf32, device, dtype,
            block_size, ring_size, use_checkpointing, strict_lengths=strict_lengths,
        )  # fmt: skip
        super().__init__(config)

    @classmethod
    def from_config(cls, config: RingAttentionConfig) -> RingDilatedAttention:
        """The module of these options."""
        options = dict(vars(config))
        del options["use_memory_pool"], options["max_cached_buffers"]
        return cls(**options)


UnfoldRingDilatedAttention = RingDilatedAttention


class RingAttentionMemoryPool(LeftOut, instead=MEMORY_POOL):
    """A pool of buffers."""
