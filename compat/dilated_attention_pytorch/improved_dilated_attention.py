"""The name `ImprovedDilatedAttention`: the same operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .core.base import BaseDilatedAttention
from .core.config import DilatedAttentionConfig


class ImprovedDilatedAttention(BaseDilatedAttention):
    """:class:`DilatedAttention` under another name and with other arguments.

    Args:
        segment_lengths: segment length of every group of heads.
        dilation_rates: dilation of every group of heads.
        dropout: probability of dropping an attention weight, in training.
        use_tf32: no effect on results; warns if not True.
        **kw: device, dtype, strict_lengths of :class:`DilatedAttentionConfig`.

    Raises:
        InvalidProblem: a value breaks a rule.
        TypeError: an unknown option.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import ImprovedDilatedAttention
        >>> q, k, v = torch.randn(3, 2, 128, 8, 16).unbind(0)
        >>> ImprovedDilatedAttention([16, 64], [1, 4])(q, k, v).shape
        torch.Size([2, 128, 8, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        use_tf32: bool = True,
        **kw: Any,
    ) -> None:
        config = DilatedAttentionConfig(
            list(segment_lengths), list(dilation_rates), dropout, use_tf32, **kw
        )
        super().__init__(config)

    @classmethod
    def from_config(cls, config: DilatedAttentionConfig) -> ImprovedDilatedAttention:
        """The module of these options."""
        return cls(**vars(config))


def create_improved_dilated_attention(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int], **kw: Any
) -> ImprovedDilatedAttention:
    """:class:`ImprovedDilatedAttention` of the same arguments."""
    return ImprovedDilatedAttention(segment_lengths, dilation_rates, **kw)
