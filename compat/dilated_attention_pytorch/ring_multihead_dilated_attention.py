"""Multi-head attention with one projection, segments first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .core.base import FusedMultiheadDilatedAttention
from .core.config import MultiheadConfig, RingAttentionConfig
from .options_without_effect import warn_if_given
from .ring_dilated_attention import RingDilatedAttention


class RingMultiheadDilatedAttention(FusedMultiheadDilatedAttention):
    """One projection, a norm and :class:`RingDilatedAttention`; returns (output, None).

    Args:
        embed_dim: width of the model.
        num_heads: number of heads; divides embed_dim.
        segment_lengths: segment length of every group of heads.
        dilation_rates: dilation of every group of heads.
        dropout: probability of dropping an attention weight, in training.
        bias: whether projections have a bias.
        layer_norm: whether what attention returns is normalised.
        layer_norm_eps: of the norms.
        gamma_init: gain of value and output projections at initialisation.
        block_size: no effect; positive; warns if not 1024.
        ring_size: no effect; positive; warns if given.
        use_checkpointing: no effect; warns if not True.
        use_tf32: no effect on results; warns if not True.
        use_flash_attention: no effect; warns if not True.
        compile_model: no effect; warns if True.
        device: of the parameters.
        dtype: of the parameters.
        strict_lengths: refuse lengths that the longest segment does not divide.

    Raises:
        InvalidProblem: a value breaks a rule.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import RingMultiheadDilatedAttention
        >>> attention = RingMultiheadDilatedAttention(64, 8, [16, 64], [1, 4])
        >>> attention(torch.randn(2, 128, 64))[0].shape
        torch.Size([2, 128, 64])
    """

    attention_config: RingAttentionConfig

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        block_size: int = 1024,
        ring_size: int | None = None,
        use_checkpointing: bool = True,
        use_tf32: bool = True,
        use_flash_attention: bool = True,
        compile_model: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        strict_lengths: bool = True,
    ) -> None:
        warn_if_given(use_flash_attention=use_flash_attention, compile_model=compile_model)
        super().__init__(
            MultiheadConfig(
                embed_dim, num_heads, bias, layer_norm, layer_norm_eps, gamma_init, device, dtype
            ),
            RingAttentionConfig(
                list(segment_lengths), list(dilation_rates), dropout, use_tf32, device, dtype,
                block_size, ring_size, use_checkpointing, strict_lengths=strict_lengths,
            ),
        )  # fmt: skip

    @classmethod
    def from_config(
        cls, multihead_config: MultiheadConfig, attention_config: RingAttentionConfig
    ) -> RingMultiheadDilatedAttention:
        """The module of these options; device and dtype are those of multihead_config."""
        options = {**vars(attention_config), **vars(multihead_config)}
        del options["use_memory_pool"], options["max_cached_buffers"]  # not arguments here
        return cls(**options)

    def _create_attention_module(self) -> RingDilatedAttention:
        return RingDilatedAttention.from_config(self.attention_config)
