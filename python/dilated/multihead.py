"""Multi-head dilated attention, a drop-in for self-attention by ``nn.MultiheadAttention``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._inputs import require_parameter_dtype
from ._options import COLUMN_SUM_PRESETS
from ._ranks import telling_ranks
from ._torch_masks import key_mask_of, refuse, require_causal_mask
from .errors import InvalidProblem, Unsupported, message
from .modules import DilatedAttention

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import SupportsIndex

    from typing_extensions import Unpack

    from ._options import AttentionOptions, Integers
    from .distributed import SequenceGroups


class _NoFusedWeights:
    """Stands where nn.TransformerEncoder looks for the weights of its fused layer: it does not fuse
    what has a __torch_function__ of its own, and so calls this attention instead.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise Unsupported(
            message("in_proj_weight", "q_proj, k_proj and v_proj", "in_proj_weight",
                    "projections are separate")
        )  # fmt: skip


class MultiheadDilatedAttention(nn.Module):
    """Multi-head dilated self-attention with the argument names of ``nn.MultiheadAttention``.

    Input and output are (batch, seqlen, embed_dim). Arguments of ``nn.MultiheadAttention`` that
    have no meaning here raise :class:`dilated.Unsupported` rather than being ignored. It can be the
    ``self_attn`` of an ``nn.TransformerEncoderLayer``, alone or inside ``nn.TransformerEncoder``.

    Args:
        embed_dim: Width of the model.
        num_heads: Number of query heads; divides embed_dim.
        segments: Segment length of every branch.
        dilations: Dilation of every branch.
        dropout: Probability of dropping an attention weight, in training.
        bias: Whether projections have a bias.
        num_kv_heads: Number of key/value heads; None means num_heads.
        batch_first: Must be True.
        add_bias_kv, add_zero_attn, kdim, vdim: Must keep their defaults.
        device, dtype: Of the parameters.
        row_shift, **options: As in :class:`DilatedAttention`.

    Example:
        >>> import torch, dilated
        >>> attention = dilated.MultiheadDilatedAttention(64, 4, [16, 64], [1, 4])
        >>> x = torch.randn(2, 100, 64)
        >>> out, weights = attention(x, x, x, is_causal=True)
        >>> out.shape, weights
        (torch.Size([2, 100, 64]), None)
    """

    # What torch's encoder asks before it fuses a layer, and with it this attention, away.
    batch_first = True
    in_proj_bias = None
    in_proj_weight = _NoFusedWeights()
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segments: Integers,
        dilations: Integers,
        dropout: float = 0.0,
        bias: bool = True,
        num_kv_heads: int | None = None,
        *,
        batch_first: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        row_shift: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        if not batch_first:
            refuse(
                "batch_first", "True", batch_first, "transpose (seqlen, batch, embed_dim) inputs"
            )
        if add_bias_kv:
            refuse("add_bias_kv", "False", add_bias_kv, "an extra key has no position")
        if add_zero_attn:
            refuse("add_zero_attn", "False", add_zero_attn, "an extra key has no position")
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width not in (None, embed_dim):
                refuse(name, f"embed_dim = {embed_dim}", width, "self-attention only")
        if "layout" in options:
            refuse(
                "layout", "none", repr(options["layout"]), "inputs are (batch, seqlen, embed_dim)"
            )
        if "dropout_p" in options:
            refuse("dropout_p", "none", repr(options["dropout_p"]), "the argument is dropout")
        options["dropout_p"] = dropout
        if num_heads < 1 or embed_dim % num_heads != 0:
            expected = f"a divisor of embed_dim = {embed_dim}"
            raise InvalidProblem(message("num_heads", expected, str(num_heads)))
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads != 0:
            expected = f"a divisor of num_heads = {num_heads}"
            raise InvalidProblem(message("num_kv_heads", expected, str(num_kv_heads)))
        self.head_dim = embed_dim // num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias, device, dtype)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias, device, dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.attention = DilatedAttention(segments, dilations, row_shift=row_shift, **options)
        if self.attention.is_causal:
            self._refuse_sums_over_the_future()
        self.reset_parameters()

    def _refuse_sums_over_the_future(self) -> None:
        preset = self.attention.options.get("preset")
        if preset in COLUMN_SUM_PRESETS:
            hint = "it divides by sums over all positions, later ones too"
            refuse("is_causal", f"False with preset '{preset}'", True, hint)

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases, as ``nn.MultiheadAttention``."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        self.out_proj.reset_parameters()
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    @telling_ranks
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        sequence_groups: SequenceGroups | None = None,
        shards: Sequence[SupportsIndex] | None = None,
    ) -> tuple[Tensor, None]:
        """Project, attend, project.

        Args:
            query: (batch, seqlen, embed_dim).
            key: like query; None means query.
            value: like query; None means key.
            key_padding_mask: bool (batch, seqlen), True = the key is ignored; or float, -inf = the
                key is ignored, else 0.
            need_weights: Must be False: weights would take memory proportional to seqlen squared.
            attn_mask: None, or the causal mask (seqlen, seqlen), bool or float, as torch's layers
                hand it on. It makes the call causal; ``is_causal`` needs no mask.
            average_attn_weights: Has no effect without weights.
            is_causal: True here or in the constructor makes the call causal.
            sequence_groups: The ranks that hold the sequence; rows are then this rank's, and masks
                must be None. None: this process holds it whole.
            shards: Rows of every rank, as in :func:`dilated.distributed.dilated_attention`.

        Returns:
            (output, None).

        Raises:
            InvalidProblem: a shape or a dtype does not fit.
            Unsupported: a request that cannot be honoured.
        """
        if need_weights:
            refuse("need_weights", "False", need_weights, "weights are never formed")
        if query.dim() != 3:
            expected = "3 dimensions (batch, seqlen, embed_dim)"
            raise InvalidProblem(message("query", expected, f"shape {tuple(query.shape)}"))
        if attn_mask is not None:
            if sequence_groups is not None:
                refuse("attn_mask", "None over ranks", "a mask", "is_causal says it")
            require_causal_mask(attn_mask, query.shape[1])
            is_causal = True
        if is_causal:
            self._refuse_sums_over_the_future()
        key = query if key is None else key
        value = key if value is None else value
        for name, given in (("query", query), ("key", key), ("value", value)):
            require_parameter_dtype(name, given, self.q_proj.weight)
        key_mask = None if key_padding_mask is None else key_mask_of(key_padding_mask)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        out = self.attention(
            q, k, v, key_mask=key_mask, is_causal=is_causal,
            sequence_groups=sequence_groups, shards=shards,
        )  # fmt: skip
        return self.out_proj(out.flatten(-2)), None
