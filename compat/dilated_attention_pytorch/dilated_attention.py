"""The standard attention module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dilated.errors import Unsupported, message

from .core.base import BaseDilatedAttention
from .core.config import DilatedAttentionConfig


def refuse_op(op: Any, name: str) -> None:
    """Raise Unsupported if there is an xFormers operator.

    Args:
        op: what the caller gave.
        name: the class that it was given to.
    """
    if op is not None:
        hint = "the operator is the only implementation; see dilated.backends()"
        raise Unsupported(message("op", "None", type(op).__name__, hint, name))


class DilatedAttention(BaseDilatedAttention):
    """Dilated attention of (batch, n, heads, head_dim), preset "fork" of `dilated`.

    Args:
        segment_lengths: segment length of every group of heads.
        dilation_rates: dilation of every group of heads.
        softmax_scale: factor of the scores; None means head_dim ** -0.5.
        attention_dropout: probability of dropping an attention weight, in training.
        op: must be None.
        **kw: use_tf32, device, dtype, strict_lengths of :class:`DilatedAttentionConfig`.

    Raises:
        InvalidProblem: a value breaks a rule.
        TypeError: an unknown option.
        Unsupported: an op.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import DilatedAttention
        >>> attention = DilatedAttention([16, 64], [1, 4])
        >>> q, k, v = torch.randn(3, 2, 128, 8, 16).unbind(0)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([2, 128, 8, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: Any | None = None,
        **kw: Any,
    ) -> None:
        refuse_op(op, "DilatedAttention")
        config = DilatedAttentionConfig(
            list(segment_lengths), list(dilation_rates), attention_dropout, **kw
        )
        super().__init__(config, softmax_scale)

    @classmethod
    def from_config(cls, config: DilatedAttentionConfig) -> DilatedAttention:
        """The module of these options."""
        options = dict(vars(config))
        return cls(attention_dropout=options.pop("dropout"), **options)


def create_dilated_attention(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int], **kw: Any
) -> DilatedAttention:
    """:class:`DilatedAttention` of the same arguments."""
    return DilatedAttention(segment_lengths, dilation_rates, **kw)
