"""Options of the modules as values: the fields are the constructors' arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..left_out import BLOCK_SPARSE, DISTRIBUTED, MEMORY_POOL, LeftOut
from ..options_without_effect import warn_if_given
from ..utils.validation import ValidationMixin, invalid


def _require_positive(**sizes: float) -> None:
    for name, size in sizes.items():
        if size <= 0:
            raise invalid(name, "> 0", size, f"{name} must be positive")


@dataclass
class DilatedAttentionConfig(ValidationMixin):
    """Options of an attention module.

    Args:
        segment_lengths: segment length of every group of heads.
        dilation_rates: dilation of every group of heads.
        dropout: probability of dropping an attention weight, in training.
        use_tf32: no effect on results; warns if not True.
        device: kept for the caller; attention has no parameters and runs where its inputs are.
        dtype: as device.
        strict_lengths: refuse lengths that the longest segment does not divide, as the package
            does. The operator takes any length.

    Raises:
        InvalidProblem: a value breaks a rule.

    Example:
        >>> from dilated_attention_pytorch.core import DilatedAttentionConfig
        >>> DilatedAttentionConfig([64, 256], [1, 4]).num_groups
        2
    """

    segment_lengths: list[int]
    dilation_rates: list[int]
    dropout: float = 0.0
    use_tf32: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    strict_lengths: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        self.segment_lengths = list(self.segment_lengths)
        self.dilation_rates = list(self.dilation_rates)
        self.validate_segment_dilation_match(self.segment_lengths, self.dilation_rates)
        self.validate_positive_values(self.segment_lengths, "segment_lengths")
        self.validate_positive_values(self.dilation_rates, "dilation_rates")
        self.validate_dropout_prob(self.dropout)
        self.device = None if self.device is None else torch.device(self.device)
        warn_if_given(use_tf32=self.use_tf32)

    @property
    def num_groups(self) -> int:
        """Number of groups of heads, one per (segment, dilation)."""
        return len(self.segment_lengths)

    @property
    def max_segment_length(self) -> int:
        """The longest segment."""
        return max(self.segment_lengths)


@dataclass
class MultiheadConfig(ValidationMixin):
    """Options of projections and norms around an attention module.

    Args:
        embed_dim: width of the model.
        num_heads: number of heads; divides embed_dim.
        bias: whether projections have a bias.
        layer_norm: whether there are norms.
        layer_norm_eps: of the norms.
        gamma_init: gain of value and output projections at initialisation (MAGNETO).
        device: of the parameters; None is torch's default.
        dtype: of the parameters; None is torch's default.

    Raises:
        InvalidProblem: a value breaks a rule.

    Example:
        >>> from dilated_attention_pytorch.core import MultiheadConfig
        >>> MultiheadConfig(embed_dim=768, num_heads=12).head_dim
        64
    """

    embed_dim: int
    num_heads: int
    bias: bool = True
    layer_norm: bool = True
    layer_norm_eps: float = 1e-5
    gamma_init: float = 1.0
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        _require_positive(
            embed_dim=self.embed_dim,
            layer_norm_eps=self.layer_norm_eps,
            gamma_init=self.gamma_init,
        )
        self.validate_head_dim(self.embed_dim, self.num_heads)
        self.device = None if self.device is None else torch.device(self.device)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.embed_dim // self.num_heads


@dataclass
class RingAttentionConfig(DilatedAttentionConfig):
    """Options of a ring module. The further ones have no effect on results and warn if given.

    Args:
        block_size: no effect; positive.
        ring_size: no effect; positive.
        use_checkpointing: no effect.
        use_memory_pool: no effect.
        max_cached_buffers: no effect; not negative.

    Raises:
        InvalidProblem: a value breaks a rule.
    """

    block_size: int = 1024
    ring_size: int | None = None
    use_checkpointing: bool = True
    use_memory_pool: bool = True
    max_cached_buffers: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(block_size=self.block_size)
        if self.ring_size is not None:
            _require_positive(ring_size=self.ring_size)
        if self.max_cached_buffers < 0:
            raise invalid("max_cached_buffers", ">= 0", self.max_cached_buffers)
        warn_if_given(
            block_size=self.block_size,
            ring_size=self.ring_size,
            use_checkpointing=self.use_checkpointing,
            use_memory_pool=self.use_memory_pool,
            max_cached_buffers=self.max_cached_buffers,
        )


class SparseAttentionConfig(LeftOut, instead=BLOCK_SPARSE):
    """Options of block-sparse modules."""


class DistributedConfig(LeftOut, instead=DISTRIBUTED):
    """Options of modules over ranks."""


class MemoryPoolConfig(LeftOut, instead=MEMORY_POOL):
    """Options of a memory pool."""
