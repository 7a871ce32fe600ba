"""Multi-head attention with separate projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .core.base import BaseMultiheadDilatedAttention, initialise
from .core.config import DilatedAttentionConfig, MultiheadConfig
from .dilated_attention import DilatedAttention, refuse_op


class MultiheadDilatedAttention(BaseMultiheadDilatedAttention):
    """Projections, norms and :class:`DilatedAttention`; a call returns a tensor.

    q_ln normalises queries and, again, what attention returns: the package does, and its
    checkpoints depend on it.

    Args:
        embed_dim: width of the model.
        num_heads: number of heads; divides embed_dim.
        dilation_rates: dilation of every group of heads. First, unlike elsewhere.
        segment_lengths: segment length of every group of heads.
        dropout: probability of dropping an attention weight, in training.
        bias: whether projections have a bias.
        layer_norm: whether there are norms.
        layer_norm_eps: of the norms.
        gamma_init: gain of value and output projections at initialisation.
        device: of the parameters.
        dtype: of the parameters.
        op: must be None.
        strict_lengths: refuse lengths that the longest segment does not divide.

    Raises:
        InvalidProblem: a value breaks a rule.
        Unsupported: an op.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import MultiheadDilatedAttention
        >>> attention = MultiheadDilatedAttention(64, 8, [1, 4], [16, 64])
        >>> x = torch.randn(2, 128, 64)
        >>> attention(x, is_causal=True).shape
        torch.Size([2, 128, 64])
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
        op: Any | None = None,
        *,
        strict_lengths: bool = True,
    ) -> None:
        refuse_op(op, "MultiheadDilatedAttention")
        super().__init__(
            MultiheadConfig(
                embed_dim, num_heads, bias, layer_norm, layer_norm_eps, gamma_init, device, dtype
            ),
            DilatedAttentionConfig(
                list(segment_lengths), list(dilation_rates), dropout, device=device, dtype=dtype,
                strict_lengths=strict_lengths,
            ),
        )  # fmt: skip

    @classmethod
    def from_config(
        cls, multihead_config: MultiheadConfig, attention_config: DilatedAttentionConfig
    ) -> MultiheadDilatedAttention:
        """The module of these options; device and dtype are those of multihead_config."""
        options = {**vars(attention_config), **vars(multihead_config)}
        del options["use_tf32"]  # not an argument here
        return cls(**options)

    def _create_attention_module(self) -> DilatedAttention:
        return DilatedAttention.from_config(self.attention_config)

    def _init_qkv_projections(self, factory_kwargs: dict[str, Any]) -> None:
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim, self.bias, **factory_kwargs)
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim, self.bias, **factory_kwargs)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim, self.bias, **factory_kwargs)

    def reset_parameters(self) -> None:
        """MAGNETO (arXiv 2210.06423): Xavier-normal, values and output with gain gamma_init."""
        super().reset_parameters()
        initialise(self.q_proj)
        initialise(self.k_proj)
        initialise(self.v_proj, self.gamma_init)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.q_ln is not None and self.k_ln is not None:
            q, k = self.q_ln(q), self.k_ln(k)
        return q, k, v

    def forward(  # type: ignore[override]  # a tensor where the other classes return a tuple
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> Tensor | tuple[Tensor, None]:
        """As in the other classes, but without need_weights only the output is returned."""
        result = super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, is_causal,
            average_attn_weights,
        )  # fmt: skip
        return result if need_weights else result[0]


def create_multihead_dilated_attention(
    embed_dim: int,
    num_heads: int,
    dilation_rates: Sequence[int],
    segment_lengths: Sequence[int],
    **kw: Any,
) -> MultiheadDilatedAttention:
    """:class:`MultiheadDilatedAttention` of the same arguments."""
    return MultiheadDilatedAttention(embed_dim, num_heads, dilation_rates, segment_lengths, **kw)
