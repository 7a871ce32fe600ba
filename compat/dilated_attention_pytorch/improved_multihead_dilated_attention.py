"""Multi-head attention with one projection, dilations first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .core.base import FusedMultiheadDilatedAttention
from .core.config import DilatedAttentionConfig, MultiheadConfig
from .improved_dilated_attention import ImprovedDilatedAttention


class ImprovedMultiheadDilatedAttention(FusedMultiheadDilatedAttention):
    """One projection, a norm and :class:`ImprovedDilatedAttention`; returns (output, None).

    Args:
        embed_dim: width of the model.
        num_heads: number of heads; divides embed_dim.
        dilation_rates: dilation of every group of heads. First, unlike elsewhere.
        segment_lengths: segment length of every group of heads.
        dropout: probability of dropping an attention weight, in training.
        bias: whether projections have a bias.
        layer_norm: whether what attention returns is normalised.
        layer_norm_eps: of the norms.
        gamma_init: gain of value and output projections at initialisation.
        device: of the parameters.
        dtype: of the parameters.
        use_tf32: no effect on results; warns if not True.
        strict_lengths: refuse lengths that the longest segment does not divide.

    Raises:
        InvalidProblem: a value breaks a rule.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import ImprovedMultiheadDilatedAttention
        >>> attention = ImprovedMultiheadDilatedAttention(64, 8, [1, 4], [16, 64])
        >>> out, weights = attention(torch.randn(2, 128, 64))
        >>> out.shape, weights
        (torch.Size([2, 128, 64]), None)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        use_tf32: bool = True,
        *,
        strict_lengths: bool = True,
    ) -> None:
        super().__init__(
            MultiheadConfig(
                embed_dim, num_heads, bias, layer_norm, layer_norm_eps, gamma_init, device, dtype
            ),
            DilatedAttentionConfig(
                list(segment_lengths), list(dilation_rates), dropout, use_tf32, device, dtype,
                strict_lengths=strict_lengths,
            ),
        )  # fmt: skip

    @classmethod
    def from_config(
        cls, multihead_config: MultiheadConfig, attention_config: DilatedAttentionConfig
    ) -> ImprovedMultiheadDilatedAttention:
        """The module of these options; device and dtype are those of multihead_config."""
        return cls(**{**vars(attention_config), **vars(multihead_config)})

    def _create_attention_module(self) -> ImprovedDilatedAttention:
        return ImprovedDilatedAttention.from_config(self.attention_config)


def create_improved_multihead_dilated_attention(
    embed_dim: int,
    num_heads: int,
    dilation_rates: Sequence[int],
    segment_lengths: Sequence[int],
    **kw: Any,
) -> ImprovedMultiheadDilatedAttention:
    """:class:`ImprovedMultiheadDilatedAttention` of the same arguments."""
    return ImprovedMultiheadDilatedAttention(
        embed_dim, num_heads, dilation_rates, segment_lengths, **kw
    )
