"""Encoder and decoder layers with norms in front of every block and inside the feed-forward.

x = x + dropout(self_attn(norm1(x)))          decoder: then the same with multihead_attn, whose
x = x + dropout(linear2(norm(dropout(f(linear1(norm(x)))))))     keys and values are memory
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .core.base import initialise
from .multihead_dilated_attention import MultiheadDilatedAttention
from .utils.validation import invalid

Activation = Callable[[Tensor], Tensor]
_ACTIVATIONS: dict[str, Activation] = {"relu": functional.relu, "gelu": functional.gelu}


def _activation(given: str | Activation) -> Activation:
    if not isinstance(given, str):
        return given
    if given not in _ACTIVATIONS:
        raise invalid("activation", "relu, gelu or a callable", repr(given))
    return _ACTIVATIONS[given]


class _Layer(nn.Module):
    """Options that both layers share, and their feed-forward."""

    linear1: nn.Linear
    linear2: nn.Linear

    def __init__(self, activation: str | Activation, dropout: float, gamma_init: float) -> None:
        super().__init__()
        self.activation = _activation(activation)
        self.gamma_init = gamma_init
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """MAGNETO: Xavier-normal with gain gamma_init. The attentions did their own."""
        initialise(self.linear1, self.gamma_init)
        initialise(self.linear2, self.gamma_init)

    def _feed_forward(self, x: Tensor, outer: nn.LayerNorm, inner: nn.LayerNorm) -> Tensor:
        x = self.dropout(self.activation(self.linear1(outer(x))))
        return cast(Tensor, self.dropout(self.linear2(inner(x))))

    def _attend(
        self, attention: MultiheadDilatedAttention, *inputs: Tensor, **masks: Any
    ) -> Tensor:
        return cast(Tensor, self.dropout(attention(*inputs, **masks)))


class DilatedTransformerEncoderLayer(_Layer):
    """Self-attention and feed-forward; `nn.TransformerEncoder` stacks it.

    Args:
        d_model: width of the model.
        nhead: number of heads; divides d_model.
        segment_lengths: segment length of every group of heads.
        dilation_rates: dilation of every group of heads.
        dim_feedforward: inner width of the feed-forward.
        dropout: of attention weights and of both blocks, in training.
        activation: "relu", "gelu" or a callable.
        layer_norm_eps: of all norms.
        gamma_init: gain at initialisation (MAGNETO, arXiv 2210.06423).
        device: of the parameters.
        dtype: of the parameters.
        strict_lengths: refuse lengths that the longest segment does not divide.

    Raises:
        InvalidProblem: a value breaks a rule.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import DilatedTransformerEncoderLayer
        >>> layer = DilatedTransformerEncoderLayer(64, 8, [16, 64], [1, 4])
        >>> layer(torch.randn(2, 128, 64), is_causal=True).shape
        torch.Size([2, 128, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = functional.relu,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        strict_lengths: bool = True,
    ) -> None:
        super().__init__(activation, dropout, gamma_init)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, **place)
        self.self_attn = MultiheadDilatedAttention(
            d_model, nhead, dilation_rates, segment_lengths, dropout,
            layer_norm_eps=layer_norm_eps, gamma_init=gamma_init, strict_lengths=strict_lengths,
            **place,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, **place)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **place)
        self.norm3 = nn.LayerNorm(dim_feedforward, layer_norm_eps, **place)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **place)
        self.reset_parameters()

    def forward(
        self,
        src: Tensor,
        is_causal: bool = False,
        *,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            src: (batch, n, d_model).
            is_causal: a position sees no later one.
            src_mask: must be None; `nn.TransformerEncoder` hands it on.
            src_key_padding_mask: (batch, n), as key_padding_mask of the attention.

        Returns:
            Like src.

        Raises:
            InvalidProblem, Unsupported: as the attention.
        """
        masks = {"is_causal": is_causal, "attn_mask": src_mask,
                 "key_padding_mask": src_key_padding_mask}  # fmt: skip
        x = src + self._attend(self.self_attn, self.norm1(src), **masks)
        return x + self._feed_forward(x, self.norm2, self.norm3)


class DilatedTransformerDecoderLayer(_Layer):
    """Self-attention, attention to a memory of the same length, and feed-forward.

    Args:
        d_model: width of the model.
        nhead: number of heads; divides d_model.
        segment_lengths: segment length of every group of heads.
        dilation_rates: dilation of every group of heads.
        dim_feedforward: inner width of the feed-forward.
        dropout: of attention weights and of all blocks, in training.
        activation: "relu", "gelu" or a callable.
        layer_norm_eps: of all norms.
        gamma_init: gain at initialisation (MAGNETO, arXiv 2210.06423).
        device: of the parameters.
        dtype: of the parameters.
        strict_lengths: refuse lengths that the longest segment does not divide.

    Raises:
        InvalidProblem: a value breaks a rule.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import DilatedTransformerDecoderLayer
        >>> layer = DilatedTransformerDecoderLayer(64, 8, [16, 64], [1, 4])
        >>> x, memory = torch.randn(2, 2, 128, 64)
        >>> layer(x, memory, tgt_is_causal=True, memory_is_causal=True).shape
        torch.Size([2, 128, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = functional.relu,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        strict_lengths: bool = True,
    ) -> None:
        super().__init__(activation, dropout, gamma_init)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        # The package gives its decoder's self-attention no norms.
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, **place)
        self.self_attn = MultiheadDilatedAttention(
            d_model, nhead, dilation_rates, segment_lengths, dropout, layer_norm=False,
            gamma_init=gamma_init, strict_lengths=strict_lengths, **place,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, **place)
        self.multihead_attn = MultiheadDilatedAttention(
            d_model, nhead, dilation_rates, segment_lengths, dropout,
            layer_norm_eps=layer_norm_eps, gamma_init=gamma_init, strict_lengths=strict_lengths,
            **place,
        )  # fmt: skip
        self.norm3 = nn.LayerNorm(d_model, layer_norm_eps, **place)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **place)
        self.norm4 = nn.LayerNorm(dim_feedforward, layer_norm_eps, **place)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **place)
        self.reset_parameters()

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            tgt: (batch, n, d_model).
            memory: like tgt; position i of it is seen as position i of tgt would be.
            tgt_is_causal: a position sees no later one of tgt.
            memory_is_causal: a position sees no later one of memory.
            tgt_mask: must be None; `nn.TransformerDecoder` hands it on.
            memory_mask: must be None.
            tgt_key_padding_mask: (batch, n), as key_padding_mask of the attention.
            memory_key_padding_mask: the same for memory.

        Returns:
            Like tgt.

        Raises:
            InvalidProblem, Unsupported: as the attention.
        """
        masks = {"is_causal": tgt_is_causal, "attn_mask": tgt_mask,
                 "key_padding_mask": tgt_key_padding_mask}  # fmt: skip
        x = tgt + self._attend(self.self_attn, self.norm1(tgt), **masks)
        masks = {"is_causal": memory_is_causal, "attn_mask": memory_mask,
                 "key_padding_mask": memory_key_padding_mask}  # fmt: skip
        x = x + self._attend(self.multihead_attn, self.norm2(x), memory, memory, **masks)
        return x + self._feed_forward(x, self.norm3, self.norm4)
